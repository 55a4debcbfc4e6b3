"""Reports of measured cases: a table, JSON, plots."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sgformer import __version__
from sgformer.bench.cases import Case
from sgformer.bench.run import Result
from sgformer.core.names import printable
from sgformer.viz.bench import draw_growth, draw_throughput


class Progress:
    """``with Progress() as report: report("...")``: a status line on the terminal."""

    def __enter__(self) -> Callable[[str], None]:
        from rich.console import Console
        from rich.markup import escape

        self.status = Console(stderr=True).status("")
        self.status.start()
        return lambda line: self.status.update(escape(printable(line)))

    def __exit__(self, *_: Any) -> None:
        self.status.stop()


def ratio(result: Result, results: Sequence[Result], baseline: str) -> float | None:
    """Speedup over the baseline with the same sizes and mode, on the same backend if measured, otherwise eager."""
    for backend in (result.case.backend, "eager"):
        reference = dataclasses.replace(result.case, model=baseline, backend=backend, tokens=1.0)
        for other in results:
            if other.case == reference and other.median and result.median:
                return other.median / result.median
    return None


def machine() -> dict[str, Any]:
    """The hardware and the package versions of the measurements."""
    facts = {
        "processor": _processor(),
        "cores": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sgformer": __version__,
    }
    for name in ("timm", "onnxruntime", "openvino"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    return facts


def to_json(results: Sequence[Result], command: Sequence[str], baseline: str) -> dict[str, Any]:
    rows = [{**r.to_dict(), "times_baseline": ratio(r, results, baseline)} for r in results]
    return {"command": " ".join(command), "machine": machine(), "baseline": baseline, "results": rows}


COLUMNS = ("network", "images/s", "ms", "spread", "first call", "memory", "GMACs", "params", "x {}")


def print_table(results: Sequence[Result], baseline: str) -> None:
    """One row per case, grouped by mode, sizes and options."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120)
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for r in results:
        c = r.case
        groups.setdefault((c.mode, c.image_size, c.batch_size, c.coarse, c.grad_checkpointing), []).append(r)
    for (mode, size, batch, coarse, checkpointing), group in groups.items():
        title = f"{'inference' if mode == 'infer' else 'training step'}, {size} px, batch {batch}"
        title += (f", coarse {coarse}" if coarse else "") + (", gradient checkpointing" if checkpointing else "")
        title += f", {' and '.join(dict.fromkeys(r.case.precision for r in group))} on {group[0].case.device}"
        table = Table(title=title, title_justify="left", box=None, header_style="bold")
        for i, name in enumerate(COLUMNS):
            title = escape(name.format(printable(baseline)))
            table.add_column(title, justify="left" if i == 0 else "right", no_wrap=i > 0)
        for r in group:
            table.add_row(*map(escape, row(r, results, baseline)))
        console.print(table)
        for r in group:
            if r.error:
                console.print(f"  {short(r.case)}: {printable(r.error)}", markup=False, highlight=False)
        console.print()


def row(r: Result, results: Sequence[Result], baseline: str) -> list[str]:
    """A result's figures as text, in the order of :data:`COLUMNS`; "-" for missing figures."""
    factor = ratio(r, results, baseline)
    figures = [
        r.images_per_second and f"{r.images_per_second:.1f}",
        r.median and f"{r.median * 1e3:.0f}",
        r.seconds and f"{min(r.seconds) * 1e3:.0f}-{max(r.seconds) * 1e3:.0f}",
        r.first and f"{r.first:.1f} s",
        r.memory and f"{r.memory / 2**20:.0f} MiB",
        r.macs and f"{r.macs / 1e9:.2f}",
        r.parameters and f"{r.parameters / 1e6:.1f} M",
        factor and f"{factor:.2f}",
    ]
    return [short(r.case), *(text or "-" for text in figures)]


def short(case: Case) -> str:
    tokens = "" if case.tokens == 1 else f", tokens x {case.tokens:g}"
    how = [
        *([case.backend] if case.backend != "eager" else []),
        *([case.precision] if case.precision != "fp32" else []),
    ]
    return printable(case.model) + (f" ({', '.join(how)})" if how else "") + tokens


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Plot throughput against MACs for every mode, size and batch, and growth with image size if there are several."""
    points = [
        {
            "label": short(r.case) + (f", {r.case.coarse}" if r.case.coarse else ""),
            "setting": f"{r.case.mode}, batch {r.case.batch_size}",
            "size": r.case.image_size,
            "gmacs": (r.macs or 0) / 1e9,
            "images_per_s": r.images_per_second,
            "seconds": r.median,
            "memory": r.memory,
        }
        for r in results
        if r.median
    ]
    written = []
    for setting in dict.fromkeys((p["setting"], p["size"]) for p in points):
        here = [p for p in points if (p["setting"], p["size"]) == setting and p["gmacs"]]
        if len(here) > 1:
            name = f"throughput {setting[0]} {setting[1]}".replace(",", "").replace(" ", "-")
            written.append(folder / f"{name}.png")
            draw_throughput(here, f"{setting[0]}, {setting[1]} px", written[-1])
    for setting in dict.fromkeys(p["setting"] for p in points):
        here = [p for p in points if p["setting"] == setting]
        if len({p["size"] for p in here}) > 1:
            written.append(folder / f"{('growth ' + setting).replace(',', '').replace(' ', '-')}.png")
            draw_growth(here, setting, written[-1])
    return written


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
