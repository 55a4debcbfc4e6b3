"""How a classifier stands rotated, blurred and compressed photographs, without training for them.

    python benchmarks/robustness.py sgformer_n --data TINY
    python benchmarks/robustness.py runs/photos --data photos --limit 2000

Every photograph of the validation split is changed as it lies on disk, in its own pixels, before it is resized to what
the network takes: turned about its centre by so many degrees, the corners filled from its mirrored border; blurred by a
Gaussian of so many pixels; stored as JPEG of so low a quality.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter
from reliance import paired, photographs, preparation

import sgformer
from sgformer.models.load import find_weights


def turned(image: Image.Image, degrees: float) -> Image.Image:
    """Without black corners, which would be a change of their own."""
    border = max(image.size) // 2
    padded = Image.fromarray(np.pad(np.asarray(image), ((border, border), (border, border), (0, 0)), mode="reflect"))
    left, top = ((a - b) // 2 for a, b in zip(padded.size, image.size, strict=True))
    whole = padded.rotate(degrees, Image.Resampling.BICUBIC)
    return whole.crop((left, top, left + image.width, top + image.height))


def compressed(image: Image.Image, quality: int) -> Image.Image:
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=quality)
    return Image.open(stored).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda image: image,
    **{f"turned by {d} degrees": lambda image, d=d: turned(image, d) for d in (5, 15, 30, 90)},
    **{f"blurred by {r} pixels": lambda image, r=r: image.filter(ImageFilter.GaussianBlur(r)) for r in (0.5, 1, 2)},
    **{f"JPEG of quality {q}": lambda image, q=q: compressed(image, q) for q in (50, 20, 10)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="of a classifier: a name, a run folder or .safetensors")
    parser.add_argument("--data", required=True, help="a folder with val/CLASS/*")
    parser.add_argument("--image-size", type=int, help="pixels; by default what the weights say")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--limit", type=int, help="so many images, drawn at random")
    given = parser.parse_args()
    model = sgformer.load_model(str(find_weights(given.weights)))
    listing, order, targets = photographs(model, given.data, "val", given.limit)
    transform = preparation(model, given.image_size)
    fast = sgformer.optimize(model)
    print(
        f"{len(order)} images\n\n| Change | Top-1, % | Against none, points ± standard error of the paired difference |"
    )
    print("|---|---|---|")
    own = None
    for name, change in CHANGES.items():
        parts = []
        for start in range(0, len(order), given.batch_size):
            indices = order[start : start + given.batch_size]
            images = torch.stack([transform(change(image)) for image in listing.read_many(indices)])
            with torch.no_grad():
                parts.append(fast(images).argmax(1))
        right = torch.cat(parts) == targets
        own = right if own is None else own
        print(f"| {name} | {100 * right.float().mean():.1f} |{paired(right, own)}", flush=True)


if __name__ == "__main__":
    main()
