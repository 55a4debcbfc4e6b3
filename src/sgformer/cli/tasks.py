"""`eval` and `predict` serve every task: which one the weights are for, and which options belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgformer.core.errors import UserError
from sgformer.training.config import dashed

#: What --data means to each task.
DATA = {
    "classify": "the folder with val/CLASS/*, or folder or address of shards",
    "segment": "the folder with images/validation and annotations/validation",
    "detect": "the COCO folder, or its val JSON",
}
#: The options of `eval` and `predict` that only some tasks have.
OWN = {
    "classify": {"crop_pct", "top", "batch_size"},
    "segment": {"multi_scale", "flip", "sliding"},
    "detect": {"images", "score"},
}


def task_of(weights: str) -> str:
    """The task that weights were trained for; released weights classify.

    Raises:
        UserError: there are no such weights.
    """
    from sgformer.models.load import read_metadata

    task = read_metadata(weights).get("task", "classify")
    if task not in OWN:
        raise UserError(f"{weights}: weights for {task!r}, which this version does not know")
    return task


def options_of_task(weights: str, task: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that were given (neither None nor False).

    Raises:
        UserError: one of them belongs to other tasks.
    """
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    for name in given:
        if name not in OWN[task]:
            owners = " and ".join(other for other, names in OWN.items() if name in names)
            raise UserError(f"--{dashed(name)} is for weights of {owners}; {weights} is for {task}")
    return given
