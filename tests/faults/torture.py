"""The long form: breaks things for real and counts. `make torture`, or with smaller numbers:

python tests/faults/torture.py --kills 10 --images 1000 --only kills images
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import hostile
import killing
import strangers

from sgformer.tasks.classify.config import ClassifyConfig

HANG = 60  # seconds after which an input counts as a hang
MEMORY = 1024  # MiB that an ordinary input may add to the process
FEW = 512  # MiB, for files that are small and well formed; the first of a process imports its libraries
CHUNK = 500


@dataclass
class Count:
    """A row of the table. `lost` is what must be 0."""

    what: str
    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    seconds: float = 0.0
    note: str = ""

    def row(self) -> str:
        outcomes = ", ".join(f"{number} {name}" for name, number in self.outcomes.most_common())
        more = f"; {self.note}" if self.note else ""
        return f"| {self.what} | {self.tried} | {outcomes}{more} | {self.lost} |"


# -- input ------------------------------------------------------------------------------------------------------------


def _try_all(make: Callable[..., Any], attempt: Callable[..., str], seed: int, start: int, stop: int, folder: str,
             report: Any) -> None:  # fmt: skip
    """In a process of its own: inputs `start` to `stop`, each announced before it is tried; making them is no hang."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.chdir(folder)
    for number, given in enumerate(islice(make(seed), stop)):
        report.send(("making" if number < start else "trying", max(number, start), None))
        if number < start:
            continue
        before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            outcome = attempt(given, Path(folder))
        except BaseException:
            outcome = f"lost {traceback.format_exc()[-1500:]}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        report.send((outcome, number, (grown, time.monotonic() - begun)))


def try_inputs(what: str, make: Callable[..., Any], attempt: Callable[..., str], tries: int, seed: int, out: Path,
               memory: float = MEMORY) -> Count:  # fmt: skip
    """Inputs in chunks, each chunk in a process: what crashes or hangs it is counted and kept, and the rest goes on."""
    count, start, begun = Count(what), 0, time.monotonic()
    folder = out / "work"
    folder.mkdir(parents=True, exist_ok=True)
    worst_memory = worst_time = 0.0
    while start < tries:
        heard, report = multiprocessing.Pipe(duplex=False)
        stop = min(tries, start + CHUNK)
        arguments = (make, attempt, seed, start, stop, str(folder), report)
        process = multiprocessing.Process(target=_try_all, args=arguments)
        process.start()
        report.close()
        now = start
        while now < stop:
            problem = None
            try:
                if not killing.patiently(lambda heard=heard: heard.poll(1), HANG):
                    problem = f"hang of more than {HANG} s"
                else:
                    outcome, now, used = heard.recv()
                    if outcome in ("making", "trying"):
                        continue
                    worst_memory, worst_time = max(worst_memory, used[0]), max(worst_time, used[1])
                    if outcome.startswith("lost"):
                        problem = outcome
                    elif used[0] > memory:
                        problem = f"{used[0]:.0f} MiB of memory"
            except EOFError:
                process.join()
                problem = f"crash, exit code {process.exitcode}"
            count.tried += 1
            if problem:
                count.lost += 1
                _keep(out, what, next(islice(make(seed), now, None)), problem)
            else:
                count.outcomes[outcome] += 1
            now += 1
            if problem and not problem.startswith("lost"):
                break
        process.kill()
        process.join()
        start = now
    count.seconds = time.monotonic() - begun
    count.note = f"at most {worst_time:.1f} s and {worst_memory:.0f} MiB each"
    return count


def _keep(out: Path, what: str, given: Any, problem: str) -> None:
    """The input that did it, and why, for a look and for a test."""
    folder = out / "finds" / what.replace(" ", "_").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)
    name, data = given if isinstance(given, tuple) else ("command", json.dumps(given).encode())
    (folder / name).write_bytes(data)
    (folder / f"{name}.txt").write_text(problem)
    print(f"LOST {what} {name}: {problem}", flush=True)


def an_image(given: Any, folder: Path) -> str:
    return hostile.try_image(*given)


def weights(given: Any, folder: Path) -> str:
    return hostile.try_weights(*given, folder)


def meanings(given: Any, folder: Path) -> str:
    return strangers.try_meaning(*given, folder)


def archives(given: Any, folder: Path) -> str:
    return strangers.try_archive(*given, folder)


def exports(given: Any, folder: Path) -> str:
    return strangers.try_export(*given, folder)


def texts(given: Any, folder: Path) -> str:
    return strangers.try_text(*given, folder)


def annotations(given: Any, folder: Path) -> str:
    return hostile.try_annotations(*given, folder)


def a_tool_file(given: Any, folder: Path) -> str:
    return hostile.try_tool_file(*given, folder)


def a_label_map(given: Any, folder: Path) -> str:
    return hostile.try_label_map(*given, folder)


def shards(given: Any, folder: Path) -> str:
    return hostile.try_shards(*given, folder)


def a_run(given: Any, folder: Path) -> str:
    return hostile.try_run(*given, folder)


def a_recipe(given: Any, folder: Path) -> str:
    return hostile.try_recipe(*given, folder)


def a_command(given: Any, folder: Path) -> str:
    return hostile.try_command(given)


def largest_images(seed: int = 0) -> hostile.Inputs:
    """Whole images just below the bound, small on the disk."""
    for name, depth, color in (("grey", 8, 0), ("sixteen", 16, 0), ("rgb", 8, 2), ("rgba", 8, 6)):
        yield f"largest_{name}.png", hostile.bomb(11585, 11585, depth, color)


# -- kills ------------------------------------------------------------------------------------------------------------


def kill(tries: int, seed: int, out: Path, until: float) -> list[Count]:
    """`tries` kills, shared out over tasks, in chains of a few per run; fewer where time is up (`until`, monotonic)."""
    rng = random.Random(seed)
    phases = list(killing.PHASES)
    tasks = [
        ("classification", killing.classification(out), 0.6),
        ("classification, two loader processes", killing.classification(out, workers=2), 0.2),
        ("segmentation", killing.segmentation(out), 0.1),
        ("detection", killing.detection(out), 0.1),
    ]
    courses = []
    for number, (name, course, share) in enumerate(tasks):
        folder = out / "kills" / str(number)
        folder.mkdir(parents=True)
        reference = killing.undisturbed(course, folder)
        courses.append((Count(f"kill -9, {name}"), reference, killing.Kills(), round(share * tries), folder))
    turn, open_ = 0, courses
    while open_ and time.monotonic() < until and turn < 10 * tries:
        for count, reference, kills, wanted, folder in open_:
            chain = [phases[(turn * 3 + i) % len(phases)] for i in range(3)] + ["any time"]
            rng.shuffle(chain)
            before, begun = (len(kills.lost), sum(kills.by_phase.values())), time.monotonic()
            try:
                killing.kill_and_resume(reference, folder / f"run{turn}", rng, chain[:wanted], kills)
            except TimeoutError as error:
                kills.lost.append(str(error))
            if len(kills.lost) > before[0]:
                count.lost += sum(kills.by_phase.values()) - before[1] or 1
                print(f"LOST {kills.lost[-1]}", flush=True)
            count.tried, count.outcomes["survived"] = kills.survived + count.lost, kills.survived
            count.seconds += time.monotonic() - begun
            count.note = f"in {kills.runs} runs: " + ", ".join(f"{n} {p}" for p, n in kills.by_phase.most_common())
            print(f"{count.what}: {kills.survived} of {count.tried}", flush=True)
        turn += 1
        open_ = [one for one in courses if one[0].tried < one[3]]
    return [count for count, *_ in courses]


# -- whole trainings with odd settings --------------------------------------------------------------------------------


def odd_trainings(tries: int, seed: int, out: Path) -> Count:
    """Settings that pass the parser, on real data: a run that ends with 0, or a line and 2."""
    rng, begun = random.Random(seed), time.monotonic()
    course = killing.classification(out)
    numbers = ("0", "1", "2", "3", "7", "0.001", "0.5", "0.999", "1e-30", "1e30", "100000")
    no = ("data", "run", "weights", "epochs", "max_steps", "device", "devices", "model", "workers", "compile")
    names = [f.name.replace("_", "-") for f in fields(ClassifyConfig) if f.name not in no]
    count = Count("whole trainings with odd settings")
    folder = out / "odd"
    folder.mkdir()
    for number in range(tries):
        words = []
        for name in rng.sample(names, rng.choice((1, 2, 3))):
            value = rng.choice((*numbers, *hostile.WORDS)) if name not in ("image-size", "batch-size") else str(
                rng.choice((32, 33, 47, 64)))  # fmt: skip
            words.append(f"--{name}={value}")
        run, text = folder / str(number), folder / f"{number}.txt"
        process = killing.Process(course, [*course.begin(run), "--max-steps", "2", *words], text)
        try:
            status = process.wait()
        except TimeoutError:
            status = None
        said = text.read_text()
        fine = status == 0 or (status == 2 and said.count("sgformer: error: ") == 1)
        if not fine or "Traceback" in said:
            count.lost += 1
            print(f"LOST {' '.join(words)}: status {status}: {said[-1500:]}", flush=True)
            if status is None:
                process.process.kill()
        else:
            count.outcomes["trained" if status == 0 else "refused"] += 1
        count.tried += 1
        shutil.rmtree(run, ignore_errors=True)
    count.seconds = time.monotonic() - begun
    return count


# -- all of it --------------------------------------------------------------------------------------------------------

PARTS = {
    "images": ("images", hostile.mutated_images, an_image, MEMORY),
    "largest": ("images just below the bound", largest_images, an_image, 4096),
    "weights": ("weights files, ours and released ones", hostile.mutated_weights, weights, MEMORY),
    "meanings": ("weights with a right checksum that say something else", strangers.mutated_meanings, meanings, FEW),
    "archives": ("small checkpoints of large tensors", strangers.mutated_archives, archives, FEW),
    "exports": ("exported files that say something else", strangers.mutated_exports, exports, FEW),
    "texts": ("recipes, tables and indexes of large values", strangers.mutated_texts, texts, FEW),
    "annotations": ("COCO files", hostile.mutated_annotations, annotations, MEMORY),
    "sources": ("files of other tools", hostile.mutated_tool_files, a_tool_file, MEMORY),
    "labels": ("label maps", hostile.mutated_label_maps, a_label_map, MEMORY),
    "shards": ("tar shards and their indexes", hostile.mutated_shards, shards, MEMORY),
    "runs": ("run folders", hostile.mutated_runs, a_run, 2 * MEMORY),
    "commands": ("command lines", hostile.mutated_commands, a_command, MEMORY),
    "recipes": ("recipes", hostile.mutated_recipes, a_recipe, MEMORY),
}
SIZES = {"images": 10_000, "largest": 4, "weights": 2000, "meanings": 3000, "archives": 1000, "exports": 5000,
         "texts": 5000, "annotations": 10_000, "sources": 2000, "labels": 10_000, "shards": 4000, "runs": 300,
         "commands": 1000, "recipes": 500, "trainings": 40, "kills": 100}  # fmt: skip


def _counts(asked: argparse.Namespace, out: Path) -> Iterator[tuple[str, Count]]:
    """The parts one after the other."""
    begun = time.monotonic()
    for name in asked.only:
        size = getattr(asked, name)
        if name == "kills":
            yield from ((name, count) for count in kill(size, asked.seed, out, begun + 60 * asked.minutes))
        elif name == "trainings":
            yield name, odd_trainings(size, asked.seed, out)
        else:
            what, make, attempt, memory = PARTS[name]
            yield name, try_inputs(what, make, attempt, size, asked.seed, out, memory)


def run() -> int:
    parser = argparse.ArgumentParser(description="break things for real and count")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no kill after so long, whatever --kills says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path("torture"))
    asked = parser.parse_args()
    out = asked.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    counts: list[Count] = []
    begun = time.monotonic()
    for name, count in _counts(asked, out):
        counts.append(count)
        print(f"{name}: {time.monotonic() - begun:.0f} s so far", flush=True)
        table = ["| | tried | | lost |", "|---|---|---|---|", *(count.row() for count in counts)]
        where = f"{platform.machine()}, Python {platform.python_version()}, torch {killing.torch.__version__}"
        table += ["", f"{time.monotonic() - begun:.0f} s in all; {where}."]
        (out / "counts.md").write_text("\n".join(table) + "\n")
    print((out / "counts.md").read_text())
    return 1 if any(count.lost for count in counts) else 0


if __name__ == "__main__":
    sys.exit(run())
