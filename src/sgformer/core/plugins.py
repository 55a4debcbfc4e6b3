"""User-supplied Python files that a command runs first: models for timm's registry, and whatever `sgformer.register_*`
takes: significance sources, data and export formats, heads, detectors, sizes.

    sgformer --plugin mine.py train classify --significance centre ...

They are named on the command line and in the environment only. Weights, recipes and run folders may be untrusted, so
they never name plugins. The environment carries the paths to every process that a command starts.
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
    """Register a file for `load`, in this process and in all its child processes.

    Raises:
        UserError: the file does not exist.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise UserError(f"--plugin {path}: no such file")
    paths = [p for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p]
    os.environ[VARIABLE] = os.pathsep.join([*(p for p in paths if p != str(file)), str(file)])


def load() -> None:
    """Run the registered files, each once per process.

    Raises:
        UserError: a file cannot be found or raises; names the file and the line.
    """
    for path in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        name = f"sgformer_plugin_{Path(path).stem}_{zlib.crc32(path.encode()):08x}"  # stems may collide
        if getattr(sys.modules.get(name), "__file__", None) == path:
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise UserError(f"--plugin {path}: not a Python file (the name must end in .py)")
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
