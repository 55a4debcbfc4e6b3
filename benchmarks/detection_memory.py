"""Time and peak memory of one training step of Mask R-CNN, forward and backward, on random pixels.

python benchmarks/detection_memory.py --model sgformer_s --height 800 --width 1333 --batch 1 --device cpu
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

import torch

from sgformer.models.pyramid import pyramid_backbone
from sgformer.tasks.detect.network import Detector


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sgformer_s")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--objects", type=int, default=7, help="per image, the mean of COCO")
    parser.add_argument("--coarse", choices=("global", "window"), default="global")
    parser.add_argument("--grad-checkpointing", action="store_true")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    coarse = args.coarse if args.model.startswith("sgformer") else None
    backbone = pyramid_backbone(args.model, coarse=coarse, grad_checkpointing=args.grad_checkpointing)
    model = Detector(backbone, num_classes=80).to(args.device)
    corner = torch.rand(args.objects, 2) * torch.tensor([args.width - 128, args.height - 128])
    boxes = torch.cat([corner, corner + 16 + 100 * torch.rand(args.objects, 2)], 1)
    masks = torch.zeros(args.objects, args.height, args.width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    target = {"boxes": boxes, "labels": torch.arange(args.objects) % 80 + 1, "masks": masks}
    target = {name: value.to(args.device) for name, value in target.items()}
    images = [torch.rand(3, args.height, args.width, device=args.device) for _ in range(args.batch)]

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, busy = time.perf_counter(), time.process_time()
    losses = model(images, [target] * args.batch)
    sum(losses.values()).backward()
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        scale = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    print(
        json.dumps(
            {
                **vars(args),
                "seconds": round(time.perf_counter() - start, 1),
                "cpu_seconds": round(time.process_time() - busy, 1),
                "threads": torch.get_num_threads(),
                "peak_gib": round(peak / 2**30, 2),
                "before_gib": round(before * 1024 / 2**30, 2),
                "finite": all(bool(value.isfinite()) for value in losses.values()),
                "parameters_without_gradient": missing,
                "torch": torch.__version__,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
