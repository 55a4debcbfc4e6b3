"""A second look: crop the window that the first look found significant, look again, and average the two answers.

    python benchmarks/second_look.py sgformer_n --data TINY
    python benchmarks/second_look.py runs/imagenette --data imagenette-tenth --split test

The window has the image's shape and --crop of its sides, lies where the map's sum is largest, and is cut from the
photograph in its own pixels, so that a large photograph shows more in it. Beside it: windows in the middle and at
random, the mirrored image as the second look, and one look at an image of sqrt(2) times the side, which costs about as
much as two. Differences are paired, against one look.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from reliance import paired, photographs, preparation
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sgformer
from sgformer.data.image import height_and_width
from sgformer.data.preparing import preprocessing
from sgformer.models.load import find_weights

CELLS = 32  # maps are searched on a grid of so many rows and columns


def window(values: Tensor, crop: float) -> tuple[float, float]:
    """Where the window of a map (h, w) with the largest sum begins: (left, top) as fractions of the sides."""
    fine = F.interpolate(values[None, None].float(), (CELLS, CELLS), mode="bilinear", align_corners=False)
    side = max(1, round(crop * CELLS))
    sums = F.avg_pool2d(fine, side, 1)[0, 0]
    row, column = divmod(int(sums.argmax()), sums.shape[1])
    return column / CELLS, row / CELLS


def cut(image: Image.Image, left: float, top: float, crop: float) -> Image.Image:
    w, h = image.size
    return image.crop((round(left * w), round(top * h), round(min(1, left + crop) * w), round(min(1, top + crop) * h)))


def mean_map(maps: dict[str, Tensor], i: int, side: int = 24) -> Tensor:
    """Image i's maps of all blocks, each with mean 1, enlarged and averaged."""
    each = [
        F.interpolate(m[i][None, None].float(), (side, side), mode="bilinear", align_corners=False) / m[i].mean()
        for m in maps.values()
    ]
    return torch.cat(each).mean(0)[0]


def macs(model: Any, side: int) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="of a classifier: a name, a run folder or .safetensors")
    parser.add_argument("--data", required=True, help="a folder with SPLIT/CLASS/*")
    parser.add_argument("--split", default="val")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--crop", type=float, default=0.75, help="the window's share of the sides")
    parser.add_argument("--limit", type=int, help="so many photographs, drawn at random")
    given = parser.parse_args()
    model = sgformer.load_model(str(find_weights(given.weights))).eval()
    listing, order, targets = photographs(model, given.data, given.split, given.limit)
    side = given.image_size or max(height_and_width(preprocessing(model.metadata)["image_size"]))
    larger = 32 * round(side * math.sqrt(2) / 32)
    prepare, prepare_larger = preparation(model, side), preparation(model, larger)
    draw = torch.Generator().manual_seed(1)
    room = 1 - given.crop

    places: dict[str, Callable[[Any, int], tuple[float, float]]] = {
        "where significance is": lambda seen, i: window(mean_map(seen.significance, i), given.crop),
        "where the fine heads' part is": lambda seen, i: window(mean_map(seen.fine, i), given.crop),
        "where significance is least": lambda seen, i: window(-mean_map(seen.significance, i), given.crop),
        "in the middle": lambda seen, i: (room / 2, room / 2),
        "at random": lambda seen, i: tuple((room * torch.rand(2, generator=draw)).tolist()),  # type: ignore[return-value]
    }
    answers: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for start in range(0, len(order), 50):
            images = list(listing.read_many(order[start : start + 50]))
            x = torch.stack([prepare(image) for image in images])
            seen = model.inspect(x)
            first = seen.logits.softmax(1)
            answers.setdefault("one look", []).append(first)
            answers.setdefault(f"one look, {larger} pixels", []).append(
                model(torch.stack([prepare_larger(image) for image in images])).softmax(1)
            )
            answers.setdefault("a second, mirrored", []).append(first + model(x.flip(3)).softmax(1))
            for name, place in places.items():
                again = torch.stack([prepare(cut(im, *place(seen, i), given.crop)) for i, im in enumerate(images)])
                answers.setdefault(f"a second, {name}", []).append(first + model(again).softmax(1))
    one, more = macs(model, side), macs(model, larger)
    print(f"{len(order)} photographs, {side} pixels, a window of {given.crop:.0%} of the sides\n")
    print("| Looks | Cost | Top-1, % | Against one look, points ± standard error of the paired difference |")
    print("|---|---|---|---|")
    own = torch.cat(answers["one look"]).argmax(1) == targets
    for name, parts in answers.items():
        right = own if name == "one look" else torch.cat(parts).argmax(1) == targets
        cost = 1 if name == "one look" else more / one if name.startswith("one") else 2
        print(f"| {name} | {cost:.2f} | {100 * right.float().mean():.1f} |{paired(right, own)}")


if __name__ == "__main__":
    main()
