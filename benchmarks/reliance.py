"""Does a trained network rely on its guidance? Change it without training again, and see what is lost.

    python benchmarks/reliance.py demo/run --data demo/scenes
    python benchmarks/reliance.py demo/scenes-dense/segment --data demo/scenes-dense/ade20k
    python benchmarks/reliance.py runs/n64 --data TINY --image-size 128 --limit 2000

Two kinds of change: tokens ranked by something else, and the key/value tokens of all self-guided blocks replaced by
what holds less. Weights of a classifier (top-1) or of a semantic segmentation whose images have one size (mIoU).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import sgformer
from sgformer.explaining.base import ranked_by
from sgformer.models.backbone import GuidedBlock
from sgformer.models.load import find_weights, read_metadata

Measure = Callable[[], tuple[float, Tensor | None]]

RANKINGS = ("coarse", "fine", "uniform", "random", "inverted", "feature-norm")
CONTENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "each token the mean of all": lambda few: few.mean(1, keepdim=True).expand_as(few),
    "the tokens of another image": lambda few: few.roll(1, 0),
    "tokens of zeros": torch.zeros_like,
}


def changes(model: Any) -> Iterator[str]:
    """Change the network in place, one way after the other; the name of each."""
    blocks = [module for module in model.modules() if isinstance(module, GuidedBlock)]
    yield "none"
    for name in RANKINGS:
        with ranked_by(model, name):
            yield f"ranked by {name}"
    for name, change in CONTENTS.items():
        hooks = [
            block.attn.aggregate.register_forward_hook(
                lambda _, inputs, output, change=change: (change(output[0]), output[1])
            )
            for block in blocks
        ]
        yield name
        for hook in hooks:
            hook.remove()


def photographs(model: Any, data: str, split: str, limit: int | None) -> tuple[Any, list[int], Tensor]:
    """The listing of a split, which of its images are taken, in random order, and their classes."""
    from sgformer.tasks.classify.predict import open_named

    listing = open_named(data, split, model.metadata)
    order = torch.randperm(len(listing), generator=torch.Generator().manual_seed(0))[:limit]  # neighbours of any class
    return listing, order.tolist(), torch.tensor(listing.targets)[order]


def preparation(model: Any, size: int | None) -> Callable[[Any], Tensor]:
    """Makes an image what the network takes, at its own size unless one is given."""
    from sgformer.data.preparing import eval_transform, preprocessing

    return eval_transform(**preprocessing(model.metadata) | ({"image_size": (size, size)} if size else {}))


def classifier(
    weights: str, data: str, split: str, batch: int, size: int | None, limit: int | None
) -> tuple[Any, Measure]:
    """The network, and what measures it: top-1 in percent, and which images are right."""
    from sgformer.data.imagefolder import ImageFolderDataset

    model = sgformer.load_model(weights)
    listing, order, classes = photographs(model, data, split, limit)
    dataset = ImageFolderDataset(listing, preparation(model, size))
    images = torch.stack([dataset[i].image for i in order])

    def score() -> tuple[float, Tensor]:
        right = torch.cat([model(x).argmax(1) for x in images.split(batch)]) == classes
        return 100 * right.float().mean().item(), right

    return model, score


def segmenter(weights: str, data: str, batch: int) -> tuple[Any, Measure]:
    """The network, and what measures it: mIoU in percent."""
    from sgformer.data.ade20k import LabelledFolderDataset, scan
    from sgformer.data.dense_transforms import as_tensors, normalized
    from sgformer.data.preparing import Normalization
    from sgformer.tasks.segment.network import class_probabilities
    from sgformer.tasks.segment.predict import inference_settings

    model = sgformer.load_model(weights)
    metadata = model.metadata
    how = inference_settings(metadata)
    normalization = Normalization.of(metadata)
    listing = scan(data, "validation", metadata["classes"], metadata["reduce_zero_label"])
    dataset = LabelledFolderDataset(listing, as_tensors)
    samples = [dataset[i] for i in range(len(dataset))]
    n = len(listing.classes)

    def score() -> tuple[float, None]:
        counts = torch.zeros(n, n, dtype=torch.int64)
        for start in range(0, len(samples), batch):
            part = samples[start : start + batch]
            guess = class_probabilities(
                model, normalized(torch.stack([s.image for s in part]), normalization), how
            ).argmax(1)
            truth = torch.stack([s.target for s in part])
            known = truth != listing.ignore
            counts += torch.bincount(truth[known] * n + guess[known], minlength=n * n).view(n, n)
        return 100 * (counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())).nanmean().item(), None

    return model, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="a run folder or .safetensors")
    parser.add_argument("--data", required=True, help="the validation data, in the layout of the task")
    parser.add_argument("--split", default="val", help="classifiers: of the data")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--image-size", type=int, help="classifiers: pixels; by default as trained")
    parser.add_argument("--limit", type=int, help="classifiers: so many images, drawn at random")
    given = parser.parse_args()
    weights = str(find_weights(given.weights))
    task = read_metadata(weights).get("task", "classify")
    if task not in ("classify", "segment"):
        parser.error(f"weights for {task}; classifiers and segmentations can be measured here")
    if task == "segment":
        model, score = segmenter(weights, given.data, given.batch_size)
        print("| change | mIoU, % |\n|---|---|")
    else:
        model, score = classifier(weights, given.data, given.split, given.batch_size, given.image_size, given.limit)
        print("| change | top-1, % | against none, points ± standard error of the paired difference |\n|---|---|---|")
    own = None
    with torch.no_grad():
        for name in changes(model):
            value, right = score()
            own = right if own is None else own
            print(f"| {name} | {value:.1f} |{paired(right, own)}", flush=True)


def paired(right: Tensor | None, own: Tensor | None) -> str:
    """The last column: the mean difference over the same images."""
    if right is None or own is None:
        return ""
    if right is own:
        return "  |"
    difference = 100 * (right.float() - own.float())
    return f" {difference.mean():+.2f} ± {difference.std() / len(difference) ** 0.5:.2f} |"


if __name__ == "__main__":
    main()
