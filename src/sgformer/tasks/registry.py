"""The tasks, one line each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from sgformer.core.errors import UserError
from sgformer.core.names import dashed, nearest
from sgformer.training.task import Task

#: Name -> import path of its `Task`.
TASKS = {
    "classify": "sgformer.tasks.classify:Classify",
    "detect": "sgformer.tasks.detect:Detect",
    "keypoints": "sgformer.tasks.keypoints:Keypoints",
    "segment": "sgformer.tasks.segment:Segment",
}


def get_task(name: Any) -> Task:
    """A task by its name.

    Raises:
        UserError: there is no such task.
    """
    if name not in TASKS:
        raise UserError(f"no task named {name!r}{nearest(str(name), TASKS)}; the tasks are {', '.join(TASKS)}")
    module, _, kind = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), kind)()


def task_of(name: Any, source: Any) -> Task:
    """The task of weights or of an exported file.

    Raises:
        UserError: this version lacks it.
    """
    if name not in TASKS:
        raise UserError(f"{source}: weights for {name!r}, which this version does not support")
    return get_task(name)


def refuse_foreign(options: Mapping[str, Any], task: Task, kind: str, source: Any) -> None:
    """Raise UserError if an option was given that belongs to other tasks only.

    Args:
        options: by name, with underscores.
        task: of the weights.
        kind: "eval_options" or "predict_options".
        source: of the weights, for the message.
    """
    for name in options:
        owners = [other for other in TASKS if name in getattr(get_task(other), kind)]
        if owners and task.name not in owners:
            raise UserError(f"--{dashed(name)} is for weights of {' and '.join(owners)}; {source} is for {task.name}")
