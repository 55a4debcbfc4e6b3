"""First call of a compiled network, and what another size compiles anew: `optimize` for one size and for all, which
compiles blocks, and `torch.compile` of the bare network for all sizes.

There is no cache on the disk.

python benchmarks/compile_time.py --model sgformer_s
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import sgformer


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sgformer_s")
    parser.add_argument("--image-size", type=int, nargs="+", default=[224, 288])
    args = parser.parse_args()
    torch.manual_seed(0)
    model = sgformer.create_model(args.model).eval()
    plain = sgformer.optimize(model, pack=False)
    told = {"model": args.model, "threads": torch.get_num_threads()}
    kinds = {
        "": lambda: sgformer.optimize(model, compile=True),
        "dynamic, ": lambda: sgformer.optimize(model, compile=True, dynamic=True),
        "bare, dynamic, ": lambda: torch.compile(model, dynamic=True),
    }
    for kind, make in kinds.items():
        torch.compiler.reset()
        fast = make()
        with fresh_cache(), torch.no_grad():
            for size in args.image_size:
                image, before = torch.randn(1, 3, size, size), counters["stats"]["unique_graphs"]
                start = time.perf_counter()
                out = fast(image)
                told[f"{kind}first call at {size}, s"] = round(time.perf_counter() - start, 1)
                told[f"{kind}graphs compiled at {size}"] = counters["stats"]["unique_graphs"] - before
                expected = plain(image)
                told[f"{kind}difference at {size}"] = ((out - expected).abs().max() / expected.abs().max()).item()
                times = [seconds(lambda: fast(image)) for _ in range(5)]  # noqa: B023 - called at once
                told[f"{kind}later calls at {size}, ms"] = round(1000 * statistics.median(times), 1)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
