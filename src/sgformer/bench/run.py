"""Measures cases in interleaved rounds, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sgformer.bench.cases import EXPORTED, Case, Unsupported, build, create
from sgformer.bench.memory import peak_memory
from sgformer.core.errors import UserError


@dataclass
class Result:
    """The measurements of a case.

    Attributes:
        case: the measured case.
        seconds: duration of one step, one value per round.
        first: seconds of the first step, compilation included; compiler caches on disk are not used.
        memory: peak bytes (:func:`sgformer.bench.memory.peak_memory`); None: not measured.
        macs: multiply-accumulates of a forward pass on one image.
        parameters: number of parameters.
        error: why the time or the memory is missing.
    """

    case: Case
    seconds: list[float] = field(default_factory=list)
    first: float | None = None
    memory: int | None = None
    macs: int | None = None
    parameters: int | None = None
    error: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def images_per_second(self) -> float | None:
        return self.case.batch_size / self.median if self.median else None

    def to_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.case),
            "median_s": self.median,
            "min_s": min(self.seconds, default=None),
            "max_s": max(self.seconds, default=None),
            "rounds_s": self.seconds,
            "first_call_s": self.first,
            "images_per_s": self.images_per_second,
            "peak_memory_bytes": self.memory,
            "macs": self.macs,
            "parameters": self.parameters,
            "error": self.error,
        }


def run(
    cases: Sequence[Case],
    rounds: int = 5,
    seconds: float = 1.0,
    memory: bool = True,
    results: list[Result] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Measure all cases; a failure is recorded in that case's result and does not affect the others.

    Cases with the same image size, batch size and mode are in memory together and take turns, round by round.

    Args:
        rounds: turns of each case; the median is reported, the minimum and maximum give the spread.
        seconds: minimum duration of a turn, which has at least one step.
        memory: also measure peak memory, each case in a fresh process.
        results: filled as the measurements come in, so that an interrupted caller keeps them.
        report: called with a status line.
    """
    results = [] if results is None else results
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.mode, case.image_size, case.batch_size), []).append(case)
    for group in groups.values():
        current = [Result(case) for case in group]
        results += current
        for result in current:
            _count(result)
        _time(current, rounds, seconds, report)
        if memory:
            for result in current:
                if result.seconds and result.case.backend not in EXPORTED:
                    report(f"memory: {result.case.label()}")
                    try:
                        result.memory = peak_memory(result.case)
                    except Unsupported as error:
                        result.error = f"memory: {error}"
    return results


def _count(result: Result) -> None:
    """Count parameters and MACs on the meta device, without computing anything."""
    case = result.case
    result.parameters, result.macs = _counts(
        Case(case.model, case.image_size, coarse=case.coarse, tokens=case.tokens)  # what counts are the same for
    )


@functools.lru_cache(maxsize=64)
def _counts(case: Case) -> tuple[int | None, int | None]:
    parameters = None
    try:
        with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model = create(case)
            parameters = sum(p.numel() for p in model.parameters())
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 3, case.image_size, case.image_size))
        return parameters, counter.get_total_flops() // 2
    except Exception:  # a network that fails on the meta device, or everywhere: then its first step reports the error
        return parameters, None


def _time(results: list[Result], rounds: int, seconds: float, report: Callable[[str], None]) -> None:
    steps: list[tuple[Result, Callable[[], Any]]] = []
    for result in results:
        report(f"first call: {result.case.label()}")
        try:
            with _fresh_compiler_cache(result.case):
                start = time.perf_counter()
                step = build(result.case)
                built = time.perf_counter()
                step()
                # The first call includes an export, but not the initialisation of weights.
                result.first = time.perf_counter() - (start if result.case.backend in EXPORTED else built)
            step()
        except Exception as error:  # anything a network, a compiler or an exporter may raise: reported, not fatal
            result.error = _one_line(error)
            continue
        steps.append((result, step))
    for number in range(rounds):
        report(f"round {number + 1} of {rounds}")
        for result, step in list(steps):
            try:
                count, start = 0, time.perf_counter()
                while not count or time.perf_counter() - start < seconds:
                    step()
                    count += 1
                result.seconds.append((time.perf_counter() - start) / count)
            except RuntimeError as error:
                result.error, result.seconds = _one_line(error), []
                steps.remove((result, step))
    del steps
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _fresh_compiler_cache(case: Case) -> Any:
    if case.backend != "compile":
        return contextlib.nullcontext()
    from torch._inductor.utils import fresh_cache  # torch has no public API for an uncached first call

    return fresh_cache()


def _one_line(error: BaseException) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    text = str(error) if isinstance(error, Unsupported | UserError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:200]
