"""What is done with trained weights."""

import torch

from sgformer.data.formats import open_data
from sgformer.data.imagefolder import ImageFolderDataset, collate
from sgformer.data.preparing import eval_transform
from sgformer.models.load import build_network
from sgformer.training.validate import validate
from toy.module import ToyModule

network = build_network


def predict(weights, images, *, device="cpu"):
    """See `Task.predict`: (name, number) of each image."""
    model, transform = build_network(weights).to(device), eval_transform(weights.metadata["image_size"], 1.0)
    for name, image in images:
        with torch.inference_mode():
            yield (name, model(transform(image)[None].to(device)).item()), image


def evaluate(weights, data, *, split="val", batch_size=64, out=None, **machine):
    """See `Task.evaluate`."""
    listing = open_data("classes", data, split)
    dataset = ImageFolderDataset(listing, eval_transform(weights.metadata["image_size"], 1.0))
    module = ToyModule(build_network(weights), listing.classes)
    return validate(module, dataset, collate, batch_size=batch_size, **machine)[0]
