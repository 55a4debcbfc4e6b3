"""`sgformer ablate`."""

from __future__ import annotations

from sgformer.core.errors import UserError, require


def ablate(
    config: str | None = None, data: str | None = None, out: str | None = None, minutes: float | None = None
) -> int:
    """Train variants of a network with several seeds, one process a run, and put the results in a table and a plot.

    Args:
        config: YAML file with the variants; recipes/ablations has some
        data: the data set, in place of the one that the file names
        out: folder for runs and tables; runs that are in it are not made again [ablations/NAME]
        minutes: start no run after so many; the same command goes on later
    """
    if config is None:
        raise UserError("--config is missing: a YAML file of variants, e.g. recipes/ablations/significance.yaml")
    if minutes is not None and minutes <= 0:
        raise UserError(f"--minutes must be above 0, got {minutes}")
    for package in ("lightning", "torchmetrics", "matplotlib"):
        require(package, extra="train")
    from pathlib import Path

    from sgformer.tasks.sweep import markdown, read_ablation, run_ablation, summary
    from sgformer.training.run_folder import shown_log

    ablation = read_ablation(config, data)
    folder = out or f"ablations/{Path(config).stem}"
    with shown_log():
        rows = run_ablation(ablation, folder, minutes)
    if rows:
        print(markdown(ablation, summary(rows)))
    print(f"tables and plot: {folder}")
    return 0
