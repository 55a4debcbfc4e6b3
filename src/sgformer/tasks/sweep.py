"""`sgformer ablate`: train variants of one recipe with several seeds, and tabulate the results.

    task: classify
    config: ../scenes_n.yaml        # recipe of all runs, relative to this file; optional
    data: scenes                    # --data overrides it
    options: {epochs: 4}            # for all runs, on top of the recipe
    seeds: [0, 1, 2]
    variants:                       # name: its options; the first is the baseline
      hybrid: {}
      coarse: {significance: coarse}
    grid:                           # instead or in addition: all combinations, named by their values
      significance: [hybrid, uniform]
      aggregation: [linear, mean]

`{variant}` and `{seed}` in an option are replaced by those in the name of a run's folder: with
`weights: FOLDER/runs/{variant}-{seed}` each run of a dense task starts from the classifier of the same change and seed.

Every run is a process of its own, so that no state carries over; finished runs are not repeated, stopped ones are
resumed. The score is that of the last epoch, not of the best one, which would be selected on the validation images.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgformer.core import parse
from sgformer.core.errors import UserError
from sgformer.core.files import appending, distrust_links, make_folder, refuse_links, replacing, try_folder, write_text
from sgformer.core.names import is_address, nearest, without_login
from sgformer.core.names import markdown as escaped
from sgformer.tasks.registry import TASKS, get_task
from sgformer.training.config import RunConfig, make_config, read_yaml, refuse_remote, to_yaml
from sgformer.training.run_folder import RunFolder

log = logging.getLogger("sgformer")

KEYS = ("task", "config", "data", "options", "seeds", "variants", "grid", "score", "question")


@dataclass(frozen=True)
class Ablation:
    """The runs to make.

    Attributes:
        task: "classify", "segment" or "detect".
        common: options of all runs.
        variants: options by name, on top of `common`.
        seeds: one run of each variant per seed.
        score: column of `metrics.csv`.
        question: the question that the runs answer, for the table.
        name: of the tables.
    """

    task: str
    common: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    score: str
    question: str = ""
    name: str = "table"

    def runs(self) -> list[tuple[str, int]]:
        """(variant, seed), all variants of a seed before the next seed, to be comparable if stopped early."""
        return [(name, seed) for seed in self.seeds for name in self.variants]

    def config(self, variant: str, seed: int) -> RunConfig:
        """The settings of a run."""
        options = {**self.common, **self.variants[variant]}
        for name, value in options.items():
            if isinstance(value, str):
                options[name] = value.replace("{variant}", _plain(variant)).replace("{seed}", str(seed))
        return make_config(get_task(self.task).Config, {**options, "seed": seed})


@dataclass
class Row:
    """The results of a variant.

    Attributes:
        variant: its name.
        scores: by seed, fractions.
        parameters: number.
        macs: multiply-accumulates of one image's forward pass (of a detector: of its backbone's).
        seconds: processor time of each run.
    """

    variant: str
    scores: dict[int, float] = field(default_factory=dict)
    parameters: int = 0
    macs: int = 0
    seconds: list[float] = field(default_factory=list)


def read_ablation(path: str | os.PathLike[str], data: str | None = None) -> Ablation:
    """Read and check an ablation file.

    Raises:
        UserError: the file is unreadable, a key is unknown (the nearest is named), or a run's settings are invalid.
    """
    path = Path(path)
    spec = parse.read_yaml(path)
    if not isinstance(spec, Mapping):
        raise UserError(f"{path}: expected lines of `key: value`, got {type(spec).__name__}")
    for key in spec:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), KEYS)}")
    task = spec.get("task", "classify")
    if task not in TASKS:
        raise UserError(f"{path}: task is one of {', '.join(TASKS)}, got {task!r}")
    common: dict[str, Any] = (
        read_yaml(path.parent / spec["config"], get_task(task).Config) if spec.get("config") else {}
    )
    common |= {str(k).replace("-", "_"): v for k, v in (spec.get("options") or {}).items()}
    given = data or spec.get("data")
    if given is None:
        raise UserError(f"{path}: data is missing: set it there, or pass --data")
    kind = get_task(task).Config
    common["data"] = given
    overruled = {"data": data} if data else {}
    variants = {str(k): dict(v or {}) for k, v in (spec.get("variants") or {}).items()}
    if grid := spec.get("grid"):
        for values in itertools.product(*grid.values()):
            variants["-".join(map(str, values))] = dict(zip(grid, values, strict=True))
    seeds = tuple(spec.get("seeds", [0]))
    if not variants or not seeds or not all(isinstance(s, int) for s in seeds):
        raise UserError(f"{path}: expected variants or a grid, and seeds as a list of integers")
    for name in variants:
        if not re.fullmatch(r"[\w.+=:,/() -]+", name):
            raise UserError(f"{path}: a variant's name is letters, digits, spaces and -_.+=:,/(), got {name!r}")
    if len({_plain(name) for name in variants}) < len(variants):
        raise UserError(f"{path}: two variants would share a folder, as their names differ only in punctuation")
    ablation = Ablation(
        task, common, variants, seeds, spec.get("score", get_task(task).score), spec.get("question", ""), path.stem
    )
    for name in variants:
        try:
            config = ablation.config(name, seeds[0])
        except UserError as error:
            raise UserError(f"{path}: variant {name}: {error}") from None
        refuse_remote(path, kind, config.to_dict(), overruled, downloads=False)
    return ablation


def run_ablation(ablation: Ablation, out: str | os.PathLike[str], minutes: float | None = None) -> list[Row]:
    """Make or resume the unfinished runs, and write the tables after each.

    Args:
        ablation: what to run.
        out: folder; `runs/VARIANT-SEED/` are run folders, `NAME.csv`, `NAME.md`, `NAME.png` the results. Ablations that
            have a variant in common, by name and settings, can share a folder and its runs.
        minutes: start no new run after this long.

    Raises:
        UserError: the folder holds a run with other settings, a run failed (its log is named) or was stopped.
    """
    folder = Path(out)
    try_folder(folder)
    distrust_links(make_folder(folder))
    make_folder(folder / "runs")
    runs, start = ablation.runs(), time.monotonic()
    for number, (variant, seed) in enumerate(runs, 1):
        place = run_folder(folder, variant, seed)
        if _result(place, ablation.score) is not None:
            _check_same(place, ablation.config(variant, seed))
            continue
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            log.info(f"{len(runs) - number + 1} runs left; the same command continues with them")
            break
        log.info(f"run {number} of {len(runs)}: {variant}, seed {seed}")
        _train(ablation, variant, seed, place)
        write_table(ablation, collect(ablation, folder), folder)
    rows = collect(ablation, folder)
    write_table(ablation, rows, folder)
    return rows


def run_folder(folder: Path, variant: str, seed: int) -> Path:
    """The folder of a run."""
    return folder / "runs" / f"{_plain(variant)}-{seed}"


def _plain(variant: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+=-]+", "_", variant).strip("_")


def _train(ablation: Ablation, variant: str, seed: int, place: Path) -> None:
    refuse_links(place)
    config = ablation.config(variant, seed)
    command = [sys.executable, "-m", "sgformer", "train", ablation.task]
    if (place / "config.yaml").exists():
        _check_same(place, config)
        command += ["--resume", str(place)]
    else:
        recipe = place.with_name(f"{place.name}.yaml")
        write_text(recipe, to_yaml({**config.to_dict(), "run": None}))
        command += ["--config", str(recipe), "--run", str(place)]
    if is_address(config.data or ""):  # not in files
        command += ["--data", str(config.data)]
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    output = place.with_name(f"{place.name}.log")
    with appending(output) as file:
        status = _run(command, file)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if place.is_dir():
        cost = {"seconds": 0.0, "processor_seconds": 0.0}
        if (place / "cost.json").exists():  # of an earlier part of this run
            cost = _read_cost(place)
        cost["seconds"] += time.monotonic() - clock
        cost["processor_seconds"] += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        write_text(place / "cost.json", json.dumps(cost))
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise UserError(f"{variant}, seed {seed}, was stopped; the same command resumes it")
    if status:
        last = output.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise UserError(f"{variant}, seed {seed}, stopped with status {status} ({' '.join(last)}); see {output}")


def _run(command: list[str], output: Any) -> int:
    """Run a process and return its status; signals are forwarded to it, so that training saves its state."""
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # received before the process started

    def forward(number: int, frame: Any) -> None:
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    handlers: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, forward)
    except ValueError:  # not in the main thread, which handles signals
        pass
    try:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        for signum in early:
            process.send_signal(signum)
        return process.wait()
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def _check_same(place: Path, config: RunConfig) -> None:
    stored = read_yaml(place / "config.yaml", type(config))
    planned = RunFolder(place).environment().get("planned") or {}
    # Options newer than the run have their defaults.
    settings = {**type(config)().resolved().to_dict(), **stored, "minutes": planned.get("minutes")}
    for name, value in config.with_weights().to_dict().items():
        value = without_login(value) if isinstance(value, str) else value
        if config.is_auto(name):  # follows from the others and the data
            continue
        if name not in ("run", "workers", "device", "devices") and settings[name] != value:
            raise UserError(f"{place} was trained with {name} {settings[name]}, not {value}: pass another --out")


def _result(place: Path, score: str) -> float | None:
    """The score of a finished run's last validation, a fraction; None if it is not finished."""
    if not (place / "report.md").exists():
        return None
    values = [row[score] for row in parse.read_table(place / "metrics.csv") if row.get(score)]
    if not values:
        raise UserError(f"{place}/metrics.csv lacks the column {score}")
    try:
        return float(values[-1])
    except ValueError:
        raise UserError(f"{place}/metrics.csv: {score} must be a number, got {values[-1][:40]!r}") from None


def _read_cost(place: Path) -> dict[str, float]:
    """The time that a run took so far, by the names in its `cost.json`."""
    cost = parse.read_json(place / "cost.json", parse.MAX_SMALL)
    names = ("seconds", "processor_seconds")
    if not isinstance(cost, dict) or not all(isinstance(cost.get(name), float | int) for name in names):
        raise UserError(f"{place / 'cost.json'}: damaged; remove it to count the time of this run anew")
    return {name: float(cost[name]) for name in names}


def collect(ablation: Ablation, folder: Path) -> list[Row]:
    """The results of the finished runs, one row per variant that has any."""
    rows = {name: Row(name) for name in ablation.variants}
    for variant, seed in ablation.runs():
        place = run_folder(folder, variant, seed)
        score = _result(place, ablation.score)
        if score is None:
            continue
        row = rows[variant]
        row.scores[seed] = score
        cost = place / "cost.json"
        if cost.exists():
            row.seconds.append(_read_cost(place)["processor_seconds"])
        if not row.parameters:
            kind = get_task(ablation.task).Config
            stored = make_config(kind, read_yaml(place / "config.yaml", kind))
            row.parameters, row.macs = network_cost(place, ablation.task, stored.image_hw)
    return [row for row in rows.values() if row.scores]


def network_cost(run: Path, task: str, size: tuple[int, int]) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image of `size`, of a run's network (of a detector's backbone)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sgformer.tasks.api import load_model

    model: Any = get_task(task).measured(load_model(run))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, *size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """The table: scores in percent; differences to the first variant over the seeds that both have."""
    table = []
    for row in rows:
        scores = [100 * v for v in row.scores.values()]
        pairs = [100 * (v - rows[0].scores[s]) for s, v in row.scores.items() if s in rows[0].scores]
        table.append(
            {
                "variant": row.variant,
                "runs": len(scores),
                "mean": statistics.mean(scores),
                "sd": statistics.stdev(scores) if len(scores) > 1 else None,
                "least": min(scores),
                "most": max(scores),
                "difference": statistics.mean(pairs) if pairs and row is not rows[0] else None,
                "difference_sd": statistics.stdev(pairs) if len(pairs) > 1 and row is not rows[0] else None,
                "parameters": row.parameters,
                "macs": row.macs,
                "processor_seconds": statistics.mean(row.seconds) if row.seconds else None,
            }
        )
    return table


def write_table(ablation: Ablation, rows: list[Row], folder: Path) -> None:
    """`NAME.csv`, `NAME.md`, `NAME.png` and `NAME-curves.png`."""
    if not rows:
        return
    table = summary(rows)
    with replacing(folder / f"{ablation.name}.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in table)
    write_text(folder / f"{ablation.name}.md", markdown(ablation, table))
    from sgformer.viz.ablation import draw_ablation, draw_runs
    from sgformer.viz.curves import read_metrics

    draw_ablation(
        [(row.variant, [100 * v for v in row.scores.values()]) for row in rows],
        folder / f"{ablation.name}.png",
        ablation.score,
    )
    finished = [(row.variant, run_folder(folder, row.variant, seed)) for row in rows for seed in row.scores]
    curves = [(variant, read_metrics(run / "metrics.csv")[ablation.score]) for variant, run in finished]
    draw_runs(
        [(variant, [(epoch, 100 * score) for epoch, score in points]) for variant, points in curves],
        folder / f"{ablation.name}-curves.png",
        ablation.score,
    )


def markdown(ablation: Ablation, table: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    first = escaped(table[0]["variant"])
    lines = [f"{escaped(ablation.question)}\n"] if ablation.question else []
    lines += [
        f"| variant | {escaped(ablation.score)}, % | least to most | against {first} | runs | parameters | MACs "
        "| time of one |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        spread = "" if row["sd"] is None else f" ± {row['sd']:.1f}"
        against = "" if row["difference"] is None else f"{row['difference']:+.1f}"
        against += "" if row["difference_sd"] is None else f" ± {row['difference_sd']:.1f}"
        seconds = "" if row["processor_seconds"] is None else f"{row['processor_seconds'] / 60:.1f} min"
        name = escaped(row["variant"])
        lines.append(
            f"| {name} | {row['mean']:.1f}{spread} | {row['least']:.1f} to {row['most']:.1f} | {against} | "
            f"{row['runs']} | {row['parameters'] / 1e6:.2f} M | {row['macs'] / 1e6:.0f} M | {seconds} |"
        )
    return "\n".join(lines) + "\n\nMean and standard deviation over seeds; differences within seeds; last epoch.\n"
