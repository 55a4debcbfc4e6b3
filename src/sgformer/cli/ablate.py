"""`sgformer ablate`."""

from __future__ import annotations

from sgformer.core.errors import UserError, require


def ablate(
    config: str | None = None, data: str | None = None, out: str | None = None, minutes: float | None = None
) -> int:
    """Train variants of a network with several seeds, one process per run, and tabulate and plot the results.

    Args:
        config: YAML file with the variants; recipes/ablations has some
        data: data set; overrides the one in the file
        out: folder for runs and tables; finished runs in it are not repeated [ablations/NAME]
        minutes: start no new run after this long; the same command resumes
    """
    if config is None:
        raise UserError("--config is missing: a YAML file of variants, e.g. recipes/ablations/significance.yaml")
    if minutes is not None and minutes <= 0:
        raise UserError(f"--minutes must be above 0, got {minutes}")
    for package in ("lightning", "torchmetrics", "matplotlib"):
        require(package, extra="train")
    from pathlib import Path

    from sgformer.core.terminal import say
    from sgformer.tasks.sweep import markdown, read_ablation, run_ablation, summary
    from sgformer.training.run_folder import shown_log

    ablation = read_ablation(config, data)
    folder = out or f"ablations/{Path(config).stem}"
    with shown_log():
        rows = run_ablation(ablation, folder, minutes)
    if rows:
        say(*markdown(ablation, summary(rows)).split("\n"))
    say(f"tables and plot: {folder}")
    return 0
