"""Images a second of processor time that one core decodes and augments for training, beside timm's own data set.

Writes photographs of noise and gradients as JPEG files to a temporary folder, and reads them with no
worker processes.

python benchmarks/data.py --images 200 --image-size 224
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform

from sgformer.data.imagefolder import ImageFolderDataset, scan
from sgformer.data.transforms import train_transform


def write_photos(folder: Path, count: int) -> None:
    """Smooth pictures with some grain, 500 x 375 pixels as ImageNet's are on average."""
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), 3)
        grain = generator.normal(0, 8, (375, 500, 1))
        target = folder / f"class{i % 4}"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(target / f"{i}.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = (args.image_size, args.image_size)
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder) / "train", args.images)
        timm_transform = create_transform(
            (3, *size),
            is_training=True,
            auto_augment="rand-m9-mstd0.5-inc1",
            re_prob=0.25,
            re_mode="pixel",
            interpolation="random",
        )
        sets = {
            "sgformer": ImageFolderDataset(scan(folder), train_transform(size)),
            "timm": create_dataset("", Path(folder) / "train", transform=timm_transform),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sets}
        for number in range(args.rounds + 1):
            sets["sgformer"].set_epoch(number)  # other draws in every round, as timm's are
            for name, data in sets.items():
                start = time.process_time()
                for i in range(len(data)):
                    data[i]
                if number:  # the first round fills caches
                    seconds[name].append(time.process_time() - start)
    rates = {name: args.images / statistics.median(s) for name, s in seconds.items()}
    spread = {name: [args.images / max(s), args.images / min(s)] for name, s in seconds.items()}
    print(
        json.dumps({"images_per_s_per_core": rates, "spread": spread, "times_timm": rates["sgformer"] / rates["timm"]})
    )


if __name__ == "__main__":
    main()
