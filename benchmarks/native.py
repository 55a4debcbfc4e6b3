"""The native kernels beside what torch has: matrix products of every shape that S multiplies, and S as a whole.

python benchmarks/native.py
export ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2  # what torch may use, for
python benchmarks/native.py --march haswell
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import sgformer
from sgformer.backends import native
from sgformer.backends.native_modules import NativeLinear, PackedLinear


def shapes(model: sgformer.SGFormer, size: int) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs of the linear maps of one image."""
    found = {}
    for i, stage in enumerate(model.stages):
        for name, module in stage.blocks.named_modules():
            if type(module) is torch.nn.Linear and name.endswith(("proj_in", "proj", "fc1", "fc2")):
                found[(size // 4 // 2**i) ** 2, module.in_features, module.out_features] = None
    return list(found)


def milliseconds(ways: list[Callable[[], object]], rounds: int) -> list[float]:
    """Medians of interleaved rounds."""
    seen: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way()
    for _ in range(rounds):
        for way, times in zip(ways, seen, strict=True):
            start = time.perf_counter()
            way()
            times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times) for times in seen]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--march", default="native", help="what the compiler's -march is told")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    if args.march != "native":
        native.build.PROCESSOR = f"-march={args.march}"
    model = sgformer.create_model("sgformer_s").eval()
    print(
        f"{native.lanes()} floats in a vector, {torch.get_num_threads()} threads\n\nGFLOP/s: native, oneDNN packed, MKL"
    )
    for batch in (1, 8):
        for rows, n, width in shapes(model, 224):
            x, linear = torch.randn(batch, rows, n), torch.nn.Linear(n, width)
            ways = [layer.__call__ for layer in (NativeLinear(linear), PackedLinear(linear), linear)]
            times = milliseconds([lambda way=way, x=x: way(x) for way in ways], args.rounds)
            rates = [f"{2e-6 * batch * rows * n * width / t:5.0f}" for t in times]
            print(f"batch {batch}, {rows:5} x {n:4} x {width:4} {' '.join(rates)}")
    print("\nS, ms: eager, packed, native")
    networks = [model, sgformer.optimize(model, native=False), sgformer.optimize(model, native=True)]
    for batch in (1, 8):
        x = torch.randn(batch, 3, 224, 224)
        times = milliseconds([lambda net=net, x=x: net(x) for net in networks], args.rounds)
        print(f"batch {batch}: " + ", ".join(f"{t:.0f}" for t in times))


if __name__ == "__main__":
    main()
