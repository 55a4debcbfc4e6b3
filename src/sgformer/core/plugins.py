"""Python files of the user's that a command runs first: models for timm's registry, and what `sgformer.register_...`
takes, i.e. sources of significance, formats of data and exports, heads, sizes.

    sgformer --plugin mine.py train classify --significance centre ...

Only the command line and the environment name them: weights, recipes and run folders never do, as they may come from a
stranger. The name travels in the environment, so that every process that a command starts has run the file, too.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import zlib
from pathlib import Path

from sgformer.core.errors import UserError

VARIABLE = "SGFORMER_PLUGINS"  # paths as in PATH


def add(path: str | os.PathLike[str]) -> None:
    """Have `load` run a file here and in all processes that this one starts.

    Raises:
        UserError: there is no such file.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise UserError(f"--plugin {path}: no such file")
    held = [p for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p]
    os.environ[VARIABLE] = os.pathsep.join([*(p for p in held if p != str(file)), str(file)])


def load() -> None:
    """Run the files that were added, each once in a process.

    Raises:
        UserError: one is not there or fails; names the line.
    """
    for path in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        name = f"sgformer_plugin_{Path(path).stem}_{zlib.crc32(path.encode()):08x}"  # stems may be alike
        if getattr(sys.modules.get(name), "__file__", None) == path:
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise UserError(f"--plugin {path}: not a Python file (its name should end in .py)")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            if os.environ.get("SGFORMER_DEBUG"):
                raise
            traced = error.__traceback__
            while traced is not None and traced.tb_frame.f_code.co_filename != path:
                traced = traced.tb_next
            where = f", line {traced.tb_lineno}" if traced else ""
            raise UserError(f"--plugin {path}{where}: {type(error).__name__}: {error}") from error
