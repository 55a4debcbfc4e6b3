"""`sgformer bench`."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Literal

from sgformer.core.errors import UserError, require
from sgformer.core.files import make_folder, try_folder, write_json
from sgformer.core.terminal import say


def bench(
    models: list[str] = ["sgformer_s"],  # noqa: B006
    image_size: list[int] = [224],  # noqa: B006
    batch_size: list[int] = [1],  # noqa: B006
    mode: list[Literal["infer", "train"]] = ["infer"],  # noqa: B006
    backend: list[Literal["eager", "optimize", "triton", "compile", "onnxruntime", "openvino"]] = ["eager"],  # noqa: B006
    coarse: list[Literal["global", "window"]] | None = None,
    tokens: list[float] = [1.0],  # noqa: B006
    grad_checkpointing: bool = False,
    precision: list[Literal["fp32", "bf16", "fp16", "int8"]] = ["fp32"],  # noqa: B006
    baseline: str | None = None,
    rounds: int = 5,
    seconds: float = 1.0,
    memory: bool = True,
    threads: int | None = None,
    device: str = "auto",
    out: str = "bench",
) -> int:
    """Compare the time and memory of networks: every combination, in interleaved rounds of one run.

    Args:
        models: timm names, sgformer_*, plain_s (benchmarks/plain.py), FILE.py:FUNCTION
        image_size: pixels, height and width
        batch_size: images per batch
        mode: infer; train is forward, loss, backward
        backend: eager; optimize, triton: ours, accelerate in training; compile; onnxruntime; openvino (performance.md)
        coarse: reach of the coarse heads, sgformer and plain only [the model's default]
        tokens: key/value tokens of sgformer_*, as multiples of those it was built with: .25 to 4
        grad_checkpointing: less memory, more time
        precision: arithmetic; optimize, openvino: bf16, int8; others: bf16, fp16, mixed
        baseline: ratios are to this one of the models [the first]
        rounds: rounds per case; the median is reported
        seconds: minimum length of a round
        memory: measure peak memory, each case in a fresh process
        threads: CPU threads [torch's default]
        device: auto, cpu, cuda, cuda:1, mps
        out: folder for bench.json and plots
    """
    require("rich", extra="bench")
    require("matplotlib", extra="bench")
    from sgformer.bench import Case, run
    from sgformer.bench.cases import check_model
    from sgformer.bench.report import Progress, draw, print_table, to_json
    from sgformer.core.device import find_device

    for name, values in (("image-size", image_size), ("batch-size", batch_size), ("rounds", [rounds])):
        least = 32 if name == "image-size" else 1
        if min(values) < least:
            raise UserError(f"--{name} must be {least} or more, got {min(values)}")
    if threads is not None and threads < 1:
        raise UserError(f"--threads must be above 0, got {threads}")
    if seconds < 0:
        raise UserError(f"--seconds must be 0 or more, got {seconds:g}")
    for budget in tokens:
        if not 0.25 <= budget <= 4:
            raise UserError(f"--tokens must be between .25 and 4, got {budget:g}")
    for model in models:
        check_model(model)
    if baseline is not None and baseline not in models:
        raise UserError(f"--baseline {baseline} is not among --models {' '.join(models)}")
    where = str(find_device(device))
    cases = [
        Case(model, size, batch, kind, way, reach, grad_checkpointing, width, where, threads, budget)
        for kind, size, batch, reach, way, model, width, budget in itertools.product(
            mode, image_size, batch_size, coarse or [None], backend, models, precision, tokens
        )
    ]
    folder = Path(out)
    try_folder(folder)
    make_folder(folder)
    results: list = []
    try:
        with Progress() as progress:
            run(cases, rounds, seconds, memory, results, progress)
    finally:  # after Ctrl-C too, keep what was measured
        done = [r for r in results if r.seconds or r.error]
        if done:
            write_json(folder / "bench.json", to_json(done, ["sgformer", *sys.argv[1:]], baseline or models[0]))
            print_table(done, baseline or models[0])
            draw(done, folder)
    say(f"wrote {folder / 'bench.json'} and plots")
    return 0
