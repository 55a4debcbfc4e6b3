"""What a training takes on 1, 8 and 64 GPUs: an estimate, not a measurement. Prints the tables of docs/notes/scale.md.

Counted: multiply-adds of a training step, forward and backward, tensors and weights (on torch's meta device, so that no
arithmetic is done). Measured elsewhere and passed in: images that a core decodes. Assumed and passed in: what a GPU
achieves, what it takes to start a kernel, what the links carry, how many cores a GPU has.

python benchmarks/scale.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import sgformer.models.registry  # noqa: F401 - registers the sizes with timm
from sgformer.models.pyramid import pyramid_backbone
from sgformer.tasks.detect.network import Detector
from sgformer.tasks.segment.network import Segmenter


@dataclass(frozen=True)
class Cost:
    """Of one training step: FLOPs of an image (a multiply-add is two), kernels of a step, parameters."""

    flops: float
    kernels: int
    parameters: int


@dataclass(frozen=True)
class Plan:
    """A training: images per update, updates, an image's cost, and how quickly a core decodes one (ImageNet: 1)."""

    title: str
    batch: int
    steps: int
    cost: Callable[[str], Cost]
    decoding: float


@dataclass(frozen=True)
class Machine:
    """What is assumed of a GPU and what surrounds it."""

    peak: float  # FLOP/s
    kernel: float  # seconds from one kernel's start to the next
    cores: int  # for each GPU
    decode: float  # images a second that a core decodes and augments
    inside: float  # bytes a second between GPUs of a machine, in one direction
    outside: float  # and for each GPU between machines
    node: int = 8  # GPUs in a machine


class Kernels(TorchDispatchMode):
    """Counts operations that start a kernel. Optimiser and average start few, as they take all tensors at once."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in str(func):
            self.count += 1
        return func(*args, **(kwargs or {}))


def backward_of_convolution(out: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Two convolutions as large as the one forward; torch 2.15 counts grouped ones as if they were dense."""
    transposed = rest[4]
    positions = math.prod((x if transposed else out)[2:])
    return 2 * x[0] * positions * math.prod(weight) * 2


def count(parts: Callable[[], list[torch.Tensor]]) -> tuple[float, int]:
    """FLOPs and kernels of computing some tensors, and of the backward pass from them."""
    custom = {torch.ops.aten.convolution_backward: backward_of_convolution}
    with FlopCounterMode(display=False, custom_mapping=custom) as flops, Kernels() as kernels:
        sum(part.float().sum() for part in parts()).backward()  # type: ignore[union-attr]
    return flops.get_total_flops(), kernels.count


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@cache
def classification(name: str, size: int = 224) -> Cost:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000, drop_path_rate=0.1).train()
        flops, kernels = count(lambda: [model(torch.zeros(2, 3, size, size))])
    return Cost(flops / 2, kernels, _size(model))


@cache
def segmentation(name: str, size: int = 512) -> Cost:
    with torch.device("meta"):
        model = Segmenter(pyramid_backbone(name), "upernet", 150).train()
        flops, kernels = count(lambda: list(model(torch.zeros(2, 3, size, size)).values()))
    return Cost(flops / 2, kernels, _size(model))


@cache
def detection(name: str, height: int = 640, width: int = 864, regions: int = 512, with_masks: int = 128) -> Cost:
    """Of Mask R-CNN: as many regions an image as are sampled for training, a quarter of them with masks."""
    with torch.device("meta"):
        model = Detector(pyramid_backbone(name), num_classes=80).train()
        heads: Any = model.heads

        def parts() -> list[torch.Tensor]:
            maps = dict(enumerate(model.backbone(torch.zeros(2, 3, height, width))))
            objectness, deltas = heads.rpn.head(list(heads.fpn(maps).values()))
            boxes = heads.roi_heads.box_predictor(heads.roi_heads.box_head(torch.zeros(2 * regions, 256, 7, 7)))
            masks = heads.roi_heads.mask_head(torch.zeros(2 * with_masks, 256, 14, 14))
            return [*objectness, *deltas, *boxes, heads.roi_heads.mask_predictor(masks)]

        flops, kernels = count(parts)
    return Cost(flops / 2, kernels, _size(model))


IMAGENET, COCO = 1_281_167, 117_266
PLANS = (
    Plan("ImageNet, 300 epochs at 224", 1024, 300 * (IMAGENET // 1024), classification, 1.0),
    Plan("COCO 3x, Mask R-CNN", 16, 36 * (COCO // 16), detection, 0.25),
    Plan("ADE20K 160k, UPerNet at 512", 16, 160_000, segmentation, 0.25),
)


def all_reduce(parameters: int, gpus: int, machine: Machine, passes: float = 2.0) -> float:
    """Seconds to sum float32 gradients over all GPUs in a ring; `passes`: 2 for DDP, 3 for FSDP."""
    share = passes * 4 * parameters
    inside, nodes = min(gpus, machine.node), math.ceil(gpus / machine.node)
    within = share * (inside - 1) / inside / machine.inside
    # Between machines each GPU carries its part of the ring that its machine's GPUs share.
    between = share * (nodes - 1) / nodes / (machine.outside * inside)
    return within + between


def step_parts(plan: Plan, cost: Cost, gpus: int, share: float, machine: Machine) -> dict[str, float]:
    """Seconds that each thing needs for an update; all go on at the same time, so that the longest counts."""
    images = plan.batch / gpus
    return {
        "arithmetic": images * cost.flops / (share * machine.peak),
        "kernel starts": cost.kernels * machine.kernel,
        "decoding": images / (machine.cores * machine.decode * plan.decoding),
        "all-reduce": all_reduce(cost.parameters, gpus, machine),
    }


def hours(seconds: float) -> str:
    value = seconds / 3600
    return f"{value:.0f} h" if value >= 10 else f"{value:.1f} h"


def tables(machine: Machine, shares: list[float], models: list[str], counts: list[int]) -> str:
    lines = ["| | GFLOPs an image | kernels a step | parameters | held by each GPU, DDP | FSDP on 8 | gradients |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for plan in PLANS:
        for name in models:
            cost = plan.cost(name)
            millions = cost.parameters / 1e6
            values = [f"{plan.title}, {name[-1].upper()}", f"{cost.flops / 1e9:.1f}", cost.kernels, f"{millions:.1f} M"]
            values += [f"{20 * millions / 1e3:.2f} GB", f"{20 * millions / 8e3:.2f} GB", f"{4 * millions:.0f} MB"]
            lines.append(f"| {' | '.join(map(str, values))} |")
    for plan in PLANS:
        heads = [f"{gpus} GPU{'s' * (gpus > 1)}, {100 * share:.0f} %" for gpus in counts for share in shares]
        lines += ["", f"**{plan.title}**, {plan.steps} updates of {plan.batch} images", ""]
        lines += [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for name in models:
            cells = []
            for gpus in counts:
                for share in shares:
                    if gpus > plan.batch:
                        cells.append("batch too small")
                        continue
                    parts = step_parts(plan, plan.cost(name), gpus, share, machine)
                    longest = max(parts, key=parts.__getitem__)
                    cells.append(f"{hours(plan.steps * parts[longest])}, {longest}")
            lines.append(f"| {name[-1].upper()} | {' | '.join(cells)} |")
    middle = shares[len(shares) // 2]
    lines += ["", f"Milliseconds of an update, ImageNet, {100 * middle:.0f} %", ""]
    lines += ["| | arithmetic | kernel starts | decoding | all-reduce, DDP | FSDP |", "|---|---|---|---|---|---|"]
    for name in models:
        for gpus in counts:
            cost = PLANS[0].cost(name)
            parts = list(step_parts(PLANS[0], cost, gpus, middle, machine).values())
            values = [*parts, all_reduce(cost.parameters, gpus, machine, passes=3)]
            lines.append(f"| {name[-1].upper()}, {gpus} | {' | '.join(f'{1e3 * value:.1f}' for value in values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sgformer_s", "sgformer_m", "sgformer_b"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25, 0.4], help="of the peak, achieved")
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s: an H100's published dense bfloat16")
    parser.add_argument("--kernel", type=float, default=5e-6, help="seconds between starts of kernels")
    parser.add_argument("--cores", type=int, default=14, help="CPU cores for each GPU")
    parser.add_argument("--decode", type=float, default=330, help="images/s of a core, from benchmarks/data.py")
    parser.add_argument("--inside", type=float, default=450e9, help="bytes/s in one direction: NVLink of an H100")
    parser.add_argument("--outside", type=float, default=50e9, help="bytes/s for each GPU between machines: 400 Gb/s")
    asked = parser.parse_args()
    machine = Machine(asked.peak, asked.kernel, asked.cores, asked.decode, asked.inside, asked.outside)
    print(tables(machine, asked.shares, asked.models, asked.gpus))


if __name__ == "__main__":
    main()
