"""The standing measurements: every target beside its figure, for docs/results.md and docs/notes/benchmarks.md.

What `make bench` runs.

Each part can be run alone, so that the machine need not be quiet for long: figures are kept in OUT/PART.json, and the
table is made of whatever is there.

python benchmarks/standing.py --parts inference precision small training growth pixels memory compile data --out bench
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sgformer.bench import Case, run
from sgformer.bench.cases import EXPORTED, Unsupported
from sgformer.bench.memory import peak_memory
from sgformer.bench.report import Progress, draw, machine, print_table, row

ROOT = Path(__file__).parent.parent
OURS, SMALL = "sgformer_s", "sgformer_n"
PLAIN, SWIN, PVT, PVT_SMALL = "plain_s", "swin_tiny_patch4_window7_224", "pvt_v2_b2", "pvt_v2_b0"
OTHERS = ("convnext_tiny", "vit_small_patch16_224")
MIB = 2**20
GOAL = 0.95  # of the time of the quicker one of Swin-T and PVTv2-B2
TITLES = {
    "inference": "Inference",
    "precision": "16 and 8 bits",
    "small": "Small networks",
    "training": "Training steps",
    "growth": "Growth with image size",
    "pixels": "Many pixels",
}


def inference(folder: Path) -> list[dict[str, Any]]:
    ways = [(m, b, n) for n in (1, 8) for b in ("eager", *EXPORTED) for m in (PLAIN, OURS, SWIN, PVT)]
    ways += [(OURS, "optimize", 1), (OURS, "optimize", 8)]
    ways += [(m, "compile", 8) for m in (OURS, SWIN, PVT)]  # minutes each, so at one size
    return timed([Case(m, batch_size=n, backend=b) for m, b, n in ways], folder, rounds=15)


def precision(folder: Path) -> list[dict[str, Any]]:
    ways = ((OURS, "optimize"), (OURS, "openvino"), (SWIN, "openvino"), (PVT, "openvino"))
    kinds = [(m, b, p, n) for n in (1, 8) for p in ("fp32", "bf16", "int8") for m, b in ways]
    return timed([Case(m, batch_size=n, backend=b, precision=p) for m, b, p, n in kinds], folder, rounds=7)


def small(folder: Path) -> list[dict[str, Any]]:
    ways = [(SMALL, "optimize"), *((m, b) for m in (SMALL, PVT_SMALL) for b in ("eager", *EXPORTED))]
    sizes = [(size, n) for size in (64, 128, 224) for n in (1, 8)]
    return timed([Case(m, size, n, backend=b) for size, n in sizes for m, b in ways], folder, rounds=7)


def training(folder: Path) -> list[dict[str, Any]]:
    cases = [Case(m, batch_size=8, mode="train") for m in (PLAIN, OURS, SWIN, PVT, SMALL)]
    cases += [Case(m, batch_size=8, mode="train", backend="optimize") for m in (OURS, SMALL)]
    return timed(cases, folder, rounds=11)


def growth(folder: Path) -> list[dict[str, Any]]:
    cases = [Case(OURS, size, coarse=reach) for size in (224, 448, 896) for reach in ("window", "global")]
    return timed(cases, folder, rounds=3)


def pixels(folder: Path) -> list[dict[str, Any]]:
    """Time and memory over image size, in inference, and what fits of it in training."""
    every = [(OURS, "optimize"), *((m, b) for m in (SWIN, PVT, *OTHERS) for b in ("eager", "openvino"))]
    every.remove((OTHERS[1], "openvino"))  # holds the whole matrix of attention: tens of GiB
    cases = [Case(m, size, backend=b) for size in (512, 1024, 2048) for m, b in every]
    steps = [(OURS, "optimize"), *((m, "eager") for m in (SWIN, PVT, *OTHERS))]
    cases += [Case(m, size, backend=b, mode="train") for size in (512, 1024) for m, b in steps]
    return timed(cases, folder, rounds=2, memory=True)


def timed(cases: list[Case], folder: Path, rounds: int, memory: bool = False) -> list[dict[str, Any]]:
    with Progress() as report:
        results = run(cases, rounds=rounds, memory=memory, report=report)
    print_table(results, PLAIN)
    draw(results, folder)
    return [{**r.to_dict(), "row": row(r, results, PLAIN)} for r in results]


def memory(folder: Path) -> list[dict[str, Any]]:
    cases = [Case(OURS, size) for size in (256, 512, 1024)]
    cases += [Case(PLAIN, 896, mode="train")]
    for backend in ("eager", "optimize"):
        cases += [Case(OURS, 896, mode="train", backend=backend, grad_checkpointing=again) for again in (False, True)]
    told = []
    for case in cases:
        try:
            peak = peak_memory(case)
        except Unsupported as error:
            print(f"{case.label()}: {error}")
            continue
        print(f"{case.label()}: {peak / MIB:.0f} MiB")
        told.append({**vars(case), "peak_memory_bytes": peak})
    return told


def script(name: str, *options: str) -> Any:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *options], capture_output=True, text=True, check=True
    )
    print(done.stdout.strip())
    return json.loads(done.stdout[done.stdout.index("{") :])


RUNNERS = {
    "inference": inference,
    "precision": precision,
    "small": small,
    "training": training,
    "growth": growth,
    "pixels": pixels,
    "memory": memory,
    "compile": lambda folder: script("compile_time.py"),
    "detection": lambda folder: script("detection_memory.py"),
    "data": lambda folder: script("data.py"),
}
PARTS = tuple(RUNNERS)


def targets(found: dict[str, Any]) -> list[tuple[str, str, float | None, bool | None]]:
    """(what is aimed at, unit, figure, whether it is reached); None for what was not measured."""

    def pick(part: str, key: str, **wanted: Any) -> float | None:
        for entry in found.get(part, []):
            if all(entry.get(k) == v for k, v in wanted.items()):
                return entry.get(key)
        return None

    def speed(model: str, batch: int, *backends: str) -> float | None:
        rates = [pick("inference", "images_per_s", model=model, batch_size=batch, backend=b) for b in backends]
        return max((r for r in rates if r), default=None)

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    def of_both(choose: Callable[[float, float], float], a: float | None, b: float | None) -> float | None:
        return choose(a, b) if a and b else None

    every = ("eager", "optimize", "compile", *EXPORTED)
    rows: list[tuple[str, str, float | None, float, bool]] = []  # text, unit, figure, bound, whether larger is better

    def aim(text: str, figure: float | None, bound: float, unit: str = "x", larger: bool = False) -> None:
        rows.append((text, unit, figure, bound, larger))

    for batch, best, eager in ((1, 2.5, 1.8), (8, 2.0, 1.5)):
        plain, head = speed(PLAIN, batch, "eager"), f"inference, batch {batch}"
        aim(f"{head}, best backend: {best}x plain eager", ratio(speed(OURS, batch, *every), plain), best, larger=True)
        aim(f"{head}, eager: {eager}x plain", ratio(speed(OURS, batch, "eager"), plain), eager, larger=True)
        swin = ratio(speed(SWIN, batch, "eager"), speed(OURS, batch, "eager"))
        aim(f"{head}, eager: time at most 1.15x Swin-T's", swin, 1.15)
        best = {model: speed(model, batch, *every) for model in (OURS, SWIN, PVT)}
        for name, other, bound in (("Swin-T", SWIN, 1.0), ("PVTv2-B2", PVT, 1.1 if batch == 1 else 1.0)):
            times = ratio(best[other], best[OURS])
            aim(f"{head}, best backend of each: time at most {bound}x {name}'s", times, bound)
            for backend in (*EXPORTED, *(["compile"] if batch == 8 else [])):
                times = ratio(speed(other, batch, backend), speed(OURS, batch, backend))
                bound = 1.1 if backend in EXPORTED else 1.0
                aim(f"{head}, {backend}: time at most {bound}x {name}'s", times, bound)
        times = ratio(of_both(max, best[SWIN], best[PVT]), best[OURS])
        aim(
            f"{head}, best backend of each: time at most {GOAL}x that of the quicker one of Swin-T and PVTv2-B2",
            times,
            GOAL,
        )
    for batch in (1, 8):
        for kind, gain in (("bf16", 1.9), ("int8", 2.5)):
            head = f"{kind}, batch {batch}"
            full, narrow, exported, swin, pvt = (
                pick("precision", "median_s", model=m, backend=b, precision=p, batch_size=batch)
                for m, b, p in (
                    (OURS, "optimize", "fp32"),
                    (OURS, "optimize", kind),
                    (OURS, "openvino", kind),
                    (SWIN, "openvino", kind),
                    (PVT, "openvino", kind),
                )
            )
            aim(f"{head}: {gain}x our float32", ratio(full, narrow), gain, larger=True)
            aim(f"{head}: time at most 1.05x Swin-T's in OpenVINO at that width", ratio(narrow, swin), 1.05)
            times = ratio(narrow, of_both(min, swin, pvt))
            aim(f"{head}: time at most {GOAL}x that of the quicker one of Swin-T and PVTv2-B2", times, GOAL)
            aim(f"{head}, openvino: time at most 1.1x Swin-T's", ratio(exported, swin), 1.1)
    for size in (64, 128, 224):
        for batch in (1, 8):
            wanted = {"image_size": size, "batch_size": batch}
            n, pvt = (
                min((t for b in every if (t := pick("small", "median_s", model=m, backend=b, **wanted))), default=None)
                for m in (SMALL, PVT_SMALL)
            )
            aim(f"{SMALL}, {size} px, batch {batch}, best backend of each: time at most PVTv2-B0's", ratio(n, pvt), 1.0)

    def least(part: str, key: str, backends: tuple[str, ...], **wanted: Any) -> float | None:
        """Of ours in training, on the best of these backends."""
        seen = [pick(part, key, model=OURS, mode="train", backend=b, **wanted) for b in backends]
        return min((v for v in seen if v), default=None)

    ways = {"best backend": ("eager", "optimize"), "eager": ("eager",)}
    plain, swin = (pick("training", "median_s", model=m) for m in (PLAIN, SWIN))
    for way, backends in ways.items():
        step = least("training", "median_s", backends)
        aim(f"training step, batch 8, {way}: 1.7x plain", ratio(plain, step), 1.7, larger=True)
        aim(f"training step, batch 8, {way}: time at most Swin-T's", ratio(step, swin), 1.0)
    for reach, bound in (("window", 20), ("global", 26)):
        small, large = (pick("growth", "median_s", image_size=s, coarse=reach) for s in (224, 896))
        aim(f"time from 224 to 896 px, coarse {reach}: at most {bound}x", ratio(large, small), bound)
    plain = pick("memory", "peak_memory_bytes", model=PLAIN, mode="train")
    for text, saving, bound in (("", False, 1 / 4), (", checkpointing", True, 1 / 8)):
        for way, backends in ways.items():
            peak = least("memory", "peak_memory_bytes", backends, grad_checkpointing=saving)
            head = f"training memory at 896 px{text}, {way}"
            aim(f"{head}: at most {bound:g} of plain's", ratio(peak, plain), bound, "of plain's")
    small, large = (pick("memory", "peak_memory_bytes", mode="infer", image_size=s) for s in (256, 1024))
    aim("inference memory from 256 to 1024 px: at most 16x, as the pixels", ratio(large, small), 16)
    aim("Mask R-CNN training at 800 x 1333: at most 24 GiB", found.get("detection", {}).get("peak_gib"), 24, "GiB")
    aim("compiled, first call: at most 45 s", found.get("compile", {}).get("first call at 224, s"), 45, "s")
    first = found.get("compile", {}).get("dynamic, first call at 224, s")
    aim("compiled with dynamic sizes, first call: at most 60 s", first, 60, "s")
    anew = found.get("compile", {}).get("dynamic, graphs compiled at 288")
    aim("compiled with dynamic sizes, graphs recompiled for a second size: none", anew, 0, "graphs")
    aim(
        "data: images/s per core at least timm's",
        found.get("data", {}).get("times_timm", {}).get("folder"),
        1.0,
        larger=True,
    )
    read = found.get("data", {}).get("images_per_s_per_core", {}).get("folder")
    needed = pick("training", "images_per_s", model=SMALL, backend="optimize")
    aim(f"data: images/s per core at least what {SMALL} trains on", ratio(read, needed), 1.0, larger=True)
    return [
        (text, unit, figure, None if figure is None else (figure >= bound if larger else figure <= bound))
        for text, unit, figure, bound, larger in rows
    ]


#: Targets of one backend among several: on docs/notes/benchmarks.md only.
DETAIL = re.compile(r", (eager|onnxruntime|openvino|compile):")


def target_table(found: dict[str, Any], detailed: bool) -> list[str]:
    lines = ["| target | measured | reached |", "|---|---|---|"]
    for text, unit, figure, reached in targets(found):
        if DETAIL.search(text) and not detailed:
            continue
        shown = "not measured" if figure is None else f"{figure:.3g}{'x' if unit == 'x' else ' ' + unit}"
        lines.append(f"| {text} | {shown} | {'' if reached is None else 'yes' if reached else '**no**'} |")
    return [*lines, "| GPU | not measured | |"]


def setting(found: dict[str, Any], docs: str) -> list[str]:
    """The command and the machine; `docs` is the way from the page to docs/."""
    m = found.get("machine", {})
    return [
        "```sh",
        "make bench",
        "```",
        "",
        f"{m.get('cores')} cores of {m.get('processor')}, torch {m.get('torch')}, timm {m.get('timm')}, OpenVINO "
        f"{m.get('openvino')}, float32. Ratios are of medians of interleaved rounds within one run.",
        f"Plain is [`benchmarks/plain.py`]({docs}../benchmarks/plain.py), the stand-in for the published code.",
    ]


def markdown(found: dict[str, Any]) -> str:
    """The section of docs/results.md."""
    lines = ["## Speed and memory", "", *setting(found, ""), ""]
    lines += [
        "Targets for the best backend. The [notes](notes/benchmarks.md) have every backend and all measurements;",
        "[performance](performance.md) explains the gaps.",
        "",
        *target_table(found, detailed=False),
    ]
    return "\n".join(lines) + "\n"


def details(found: dict[str, Any]) -> str:
    """docs/notes/benchmarks.md."""
    lines = ["# Notes: benchmarks", "", "`make bench` writes this page.", "", *setting(found, "../"), ""]
    lines += ["## Targets", "", *target_table(found, detailed=True)]
    for part in TITLES:
        if part in found:
            lines += ["", f"## {TITLES[part]}", ""]
            lines += ["| network | size, batch | images/s | ms | range, ms | memory | GMACs | speed-up over plain |"]
            lines += ["|---|---|---|---|---|---|---|---|"]
            for e in found[part]:
                name, rate, median, spread, _, peak, macs, _, factor = e["row"]
                reach = f", coarse {e['coarse']}" if e["coarse"] else ""
                where = f"{e['image_size']} px, {e['batch_size']}" + (", training" if e["mode"] == "train" else "")
                cells = (f"`{name}`{reach}", where, rate, median, spread, peak, macs, factor)
                lines.append(f"| {' | '.join(cells)} |")
            if part in ("inference", "training"):
                lines += ["", "Speed-ups compare the same backend; `optimize` is compared with plain eager."]
    if "memory" in found:
        lines += ["", "## Memory", "", "| network | peak memory of a step, MiB |", "|---|---|"]
        for e in found["memory"]:
            kind = "training step" if e["mode"] == "train" else "inference"
            kind += ", gradient checkpointing" if e["grad_checkpointing"] else ""
            name = e["model"] + (" (optimize)" if e["backend"] == "optimize" else "")
            lines.append(f"| `{name}`, {e['image_size']} px, {kind} | {e['peak_memory_bytes'] / MIB:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--out", default="bench")
    parser.add_argument("--no-docs", action="store_true", help="leave the docs as they are")
    args = parser.parse_args()
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        print(f"-- {part}", flush=True)
        (folder / f"{part}.json").write_text(json.dumps(RUNNERS[part](folder), indent=1) + "\n")
    found = {p: json.loads((folder / f"{p}.json").read_text()) for p in PARTS if (folder / f"{p}.json").is_file()}
    found["machine"] = machine()
    for text, unit, figure, reached in targets(found):
        shown = "-" if figure is None else f"{figure:.3g} {unit}"
        print(f"{text:<66} {shown:>14}  {'' if reached is None else 'yes' if reached else 'NO'}")
    if not args.no_docs:
        page = ROOT / "docs" / "results.md"
        text = page.read_text()
        old = re.search(r"^## Speed and memory\n.*?(?=^## |\Z)", text, re.M | re.S)
        new = markdown(found)
        page.write_text((text.replace(old[0], new + "\n") if old else f"{text.rstrip()}\n\n{new}").rstrip() + "\n")
        (ROOT / "docs" / "notes" / "benchmarks.md").write_text(details(found))


if __name__ == "__main__":
    main()
