"""What the `predict` commands have in common: where answers go, and what pictures are called."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def write_json(value: Any, target: str, indent: int = 2) -> None:
    """JSON to a file, whole or not at all, or with "-" to standard output."""
    text = json.dumps(value, indent=indent) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    unfinished = Path(f"{target}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, target)


def own_stem(path: str, seen: Counter[str]) -> str:
    """A file's name without its ending, numbered where an image of another folder had it before."""
    stem = Path(path).stem
    seen[stem] += 1
    return stem if seen[stem] == 1 else f"{stem}-{seen[stem]}"
