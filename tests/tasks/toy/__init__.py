"""The smallest task: a number for an image. `train/NUMBER/*` and `val/NUMBER/*` in, one number per image out."""

from sgformer.training.task import Task


class Toy(Task):
    name = "toy"
    title = "regression"
    about = "train a network that says a number of an image"
    description = "Train a network that says a number of an image, on DATA/train/NUMBER/* and DATA/val/NUMBER/*."
    example = "--data photos"
    data_help = "the folder with val/NUMBER/*"
    score = "closeness"
