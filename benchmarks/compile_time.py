"""First call of a network whose blocks are compiled, and what another size compiles anew. No cache on disk.

python benchmarks/compile_time.py --model sgformer_s
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import sgformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sgformer_s")
    parser.add_argument("--image-size", type=int, nargs="+", default=[224, 288])
    args = parser.parse_args()
    torch.manual_seed(0)
    model = sgformer.create_model(args.model).eval()
    plain = sgformer.optimize(model, pack=False)
    fast = sgformer.optimize(model, compile=True)
    told = {"model": args.model, "threads": torch.get_num_threads()}
    with fresh_cache(), torch.no_grad():
        for size in args.image_size:
            image, before = torch.randn(1, 3, size, size), counters["stats"]["unique_graphs"]
            start = time.perf_counter()
            out = fast(image)
            told[f"first call at {size}, s"] = round(time.perf_counter() - start, 1)
            told[f"graphs compiled at {size}"] = counters["stats"]["unique_graphs"] - before
            expected = plain(image)
            told[f"difference at {size}"] = ((out - expected).abs().max() / expected.abs().max()).item()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
