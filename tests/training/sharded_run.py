"""What two processes do for `test_fsdp.py`: python -m torch.distributed.run ... sharded_run.py PHOTOS OUT"""

import copy
import json
import os
import sys
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parents[1]))
from photos import QUICK

from sgformer.core.errors import UserError
from sgformer.tasks.api import evaluate, train
from sgformer.tasks.classify.module import ClassificationModule
from sgformer.training.callbacks import Checkpoints
from sgformer.training.config import ELEMENTWISE
from sgformer.training.run_folder import RunFolder
from sgformer.training.sharded import full, local_shard, shard

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
        held[name] = [sum(local_shard(t).numel() for t in tensors), sum(t.numel() for t in tensors)]


def differences():
    """How far weights that are shared out come from whole ones in three steps, by optimiser: (moved, apart)."""
    found = {}
    mesh = init_device_mesh("cpu", (2,))
    for name in ELEMENTWISE:
        torch.manual_seed(0)
        # One process has nothing of the second layer, which has one row.
        whole = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 1))
        start = [p.detach().clone() for p in whole.parameters()]
        parts = shard(copy.deepcopy(whole), mesh)
        images = torch.randn(4, 5)
        for network in (whole, parts):
            optimizer = create_optimizer_v2(network, opt=name, lr=0.1, weight_decay=0.05)
            for _ in range(3):
                network(images).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        pairs = [(p.detach(), full(q.detach())) for p, q in zip(whole.parameters(), parts.parameters(), strict=True)]
        moved = max((p - q).abs().max().item() for (p, _), q in zip(pairs, start, strict=True))
        found[name] = moved, max((p - q).abs().max().item() for p, q in pairs)
    return found


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
        train("classify", data=photos, run=str(out / name), **options)
        Checkpoints.on_train_end = end
        torch.distributed.barrier()  # the first process alone puts the last state in its place
    train("classify", resume=out / "fsdp_resumed", max_steps=6)
    torch.distributed.barrier()
    result = evaluate(out / "fsdp_random", photos, workers=0, device="cpu", batch_size=2)

    usable = RunFolder.usable_checkpoint
    if rank == "1":
        RunFolder.usable_checkpoint = lambda folder: (None, 0)  # as if its machine saw an older state of the folder
    try:
        train("classify", resume=out / "fsdp_resumed", max_steps=7)
        seen = ""
    except UserError as error:
        seen = str(error)
    RunFolder.usable_checkpoint = usable

    step = ClassificationModule.training_step

    def spoilt(task, batch, batch_idx):
        loss = step(task, batch, batch_idx)
        return loss * float("nan") if task.global_step == 3 and rank == "1" else loss

    ClassificationModule.training_step = spoilt
    try:
        train("classify", data=photos, run=str(out / "nan"), **RANDOM)
        said = ""
    except UserError as error:
        said = str(error)
    facts = {
        "held": held,
        "images": result.images,
        "top1": result.top1,
        "said": said,
        "seen": seen,
        "optimisers": differences(),
    }
    (out / f"{rank}.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
