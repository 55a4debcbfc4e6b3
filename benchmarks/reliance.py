"""Does a trained classifier rely on its guidance? Change it without training again, and count the answers that change.

    python benchmarks/reliance.py demo/run --data demo/scenes

Two kinds of change: tokens ranked by something else, and the key/value tokens of all self-guided blocks replaced by
what holds less. Prints a table: top-1, and how many right answers were lost and won.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import sgformer
from sgformer.backbone import GuidedBlock
from sgformer.data.imagefolder import ImageFolderDataset, scan
from sgformer.data.transforms import eval_transform, preprocessing
from sgformer.training.weights import find_weights

RANKINGS = ("coarse", "fine", "uniform", "random", "inverted", "feature-norm")
CONTENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "each token the mean of all": lambda few: few.mean(1, keepdim=True).expand_as(few),
    "the tokens of another image": lambda few: few.roll(1, 0),
    "tokens of zeros": torch.zeros_like,
}


def variants(weights: str) -> Iterator[tuple[str, Any]]:
    """The network as it was trained, and changed."""
    yield "as trained", sgformer.load_model(weights)
    for name in RANKINGS:
        yield f"ranked by {name}", sgformer.load_model(weights, significance=name)
    for name, change in CONTENTS.items():
        model = sgformer.load_model(weights)
        for module in model.modules():
            if isinstance(module, GuidedBlock):
                module.attn.aggregate.register_forward_hook(
                    lambda _, inputs, output, change=change: (change(output[0]), output[1])
                )
        yield name, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="a run folder or .safetensors of a classifier")
    parser.add_argument("--data", required=True, help="folder with val/CLASS/*")
    parser.add_argument("--batch-size", type=int, default=100)
    given = parser.parse_args()
    weights = str(find_weights(given.weights))
    metadata = sgformer.load_model(weights).metadata
    listing = scan(given.data, "val", metadata["classes"])
    dataset = ImageFolderDataset(listing, eval_transform(**preprocessing(metadata)))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))  # neighbours of any class
    images = torch.stack([dataset[i].image for i in order.tolist()])
    classes = torch.tensor(listing.targets)[order]
    first = None
    print(f"| {len(images)} images | top-1, % | lost | won |\n|---|---|---|---|")
    for name, model in variants(weights):
        with torch.no_grad():
            right = torch.cat([model(x).argmax(1) for x in images.split(given.batch_size)]) == classes
        first = right if first is None else first
        lost, won = int((first & ~right).sum()), int((right & ~first).sum())
        print(f"| {name} | {100 * right.float().mean():.1f} | {lost} | {won} |", flush=True)


if __name__ == "__main__":
    main()
