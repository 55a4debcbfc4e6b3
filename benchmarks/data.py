"""Images a second of processor time that one core reads, decodes and augments for training: from a folder, from tar
shards of the same images, and with timm's own data set; beside what the networks can take.

Writes photographs of noise and gradients as JPEG files to a temporary folder, and reads them with no worker processes.

python benchmarks/data.py --images 200 --image-size 224 --models sgformer_s sgformer_b
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform

import sgformer.models.registry  # noqa: F401 - registers the sizes with timm
from sgformer.data.imagefolder import ImageFolderDataset, scan
from sgformer.data.sharding import make_shards
from sgformer.data.shards import open_split
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


def training_rate(name: str, image_size: int, batch: int = 2, steps: int = 3) -> float:
    """Images a second of processor time that a training step of a network takes on one core."""
    model = timm.create_model(name, num_classes=1000, img_size=image_size).train()
    images = torch.randn(batch, 3, image_size, image_size)
    seconds = []
    for _ in range(steps + 1):
        start = time.process_time()
        model(images).float().logsumexp(1).mean().backward()
        seconds.append(time.process_time() - start)
    return batch / statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="*", default=[], help="networks of ours whose training step is timed, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = (args.image_size, args.image_size)
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", args.images), ("val", 4)):
            write_photos(Path(folder) / "photos" / split, count)
        photos = Path(folder) / "photos"
        shards = make_shards(photos, Path(folder) / "shards")
        timm_transform = create_transform(
            (3, *size),
            is_training=True,
            auto_augment="rand-m9-mstd0.5-inc1",
            re_prob=0.25,
            re_mode="pixel",
            interpolation="random",
        )
        sets = {
            "folder": ImageFolderDataset(scan(photos), train_transform(size)),
            "shards": ImageFolderDataset(open_split(shards), train_transform(size)),
            "timm": create_dataset("", photos / "train", transform=timm_transform),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sets}
        for number in range(args.rounds + 1):
            for name in ("folder", "shards"):
                sets[name].set_epoch(number)  # other draws in every round, as timm's are
            for name, data in sets.items():
                start = time.process_time()
                for i in range(len(data)):
                    data[i]
                if number:  # the first round fills caches
                    seconds[name].append(time.process_time() - start)
    rates = {name: args.images / statistics.median(s) for name, s in seconds.items()}
    result = {
        "images_per_s_per_core": rates,
        "spread": {name: [args.images / max(s), args.images / min(s)] for name, s in seconds.items()},
        "times_timm": {name: rates[name] / rates["timm"] for name in ("folder", "shards")},
        "training_images_per_s_per_core": {name: training_rate(name, args.image_size) for name in args.models},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
