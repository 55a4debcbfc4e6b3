"""What two processes do for `test_fsdp.py`: python -m torch.distributed.run ... sharing_out.py PHOTOS OUT"""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from photos import QUICK

from sgformer.api import evaluate, train_classifier
from sgformer.errors import UserError
from sgformer.tasks.classify import ClassificationTask
from sgformer.tasks.common import own
from sgformer.training.callbacks import Checkpoints

# Nothing is drawn by chance, so that the number of processes makes no difference; SGD shows gradients as they are.
PLAIN = {**QUICK, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "opt": "sgd", "lr": 10.0, "device": "cpu"}
RANDOM = {**QUICK, "device": "cpu", "clip_grad": 1.0, "strategy": "fsdp"}
held = {}


def look(callback, trainer, task):
    """How much of the whole this process holds."""
    average = next(c for c in trainer.callbacks if type(c).__name__ == "WeightAverage").average.module
    moments = [v for state in trainer.optimizers[0].state.values() for v in state.values() if v.ndim]
    for name, tensors in {
        "model": task.model.parameters(),
        "average": average.parameters(),
        "moments": moments,
    }.items():
        tensors = list(tensors)
        held[name] = [sum(own(t).numel() for t in tensors), sum(t.numel() for t in tensors)]


def main(photos: str, out: Path) -> None:
    rank = os.environ["RANK"]
    runs = {
        "fsdp": {**PLAIN, "strategy": "fsdp", "max_steps": 2},
        "fsdp_accumulated": {**PLAIN, "strategy": "fsdp", "max_steps": 2, "accumulate": 2, "grad_checkpointing": True},
        "ddp_random": {**RANDOM, "strategy": "ddp", "max_steps": 6},
        "fsdp_random": {**RANDOM, "max_steps": 6},
        "fsdp_resumed": {**RANDOM, "max_steps": 3},  # inside the first epoch
    }
    end = Checkpoints.on_train_end
    for name, options in runs.items():
        if name == "fsdp_random":
            Checkpoints.on_train_end = lambda self, *args: (look(self, *args), end(self, *args))[1]
        train_classifier(data=photos, run=str(out / name), **options)
        Checkpoints.on_train_end = end
    train_classifier(resume=out / "fsdp_resumed", max_steps=6)
    result = evaluate(out / "fsdp_random", photos, workers=0, device="cpu", batch_size=2)

    step = ClassificationTask.training_step

    def spoilt(task, batch, batch_idx):
        loss = step(task, batch, batch_idx)
        return loss * float("nan") if task.global_step == 3 and rank == "1" else loss

    ClassificationTask.training_step = spoilt
    try:
        train_classifier(data=photos, run=str(out / "nan"), **RANDOM)
        said = ""
    except UserError as error:
        said = str(error)
    facts = {"held": held, "images": result.images, "top1": result.top1, "said": said}
    (out / f"{rank}.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
