"""The command line: `sgformer COMMAND ...`. One file per command; user errors print one line and exit with status 2."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Sequence

from sgformer._version import __version__
from sgformer.cli.parser import HelpShown, run_function
from sgformer.core import plugins
from sgformer.core.errors import UserError, how_to_install
from sgformer.core.names import nearest
from sgformer.core.processes import ignore_image_warnings
from sgformer.core.terminal import say
from sgformer.tasks.registry import TASKS, get_task

# Command -> (module, function, what it does). Training commands take the raw arguments; the parameters of the others
# are their options.
COMMANDS = {
    **{f"train {name}": ("sgformer.cli.train", "train", get_task(name).about) for name in TASKS},
    "eval": ("sgformer.cli.evaluate", "evaluate", "evaluate trained weights on a validation set"),
    "predict": ("sgformer.cli.predict", "predict", "classify images, or segment or detect what is on them"),
    "explain": ("sgformer.cli.explain", "explain", "show what a trained network attended to"),
    "export": ("sgformer.cli.export", "export", "export a network to another runtime: ONNX, OpenVINO, torch.export"),
    "app": ("sgformer.cli.app", "app", "serve a page that shows what trained networks attend to"),
    "ablate": ("sgformer.cli.ablate", "ablate", "train variants with several seeds and compare them"),
    "localization": ("sgformer.cli.localization", "localization", "measure whether salient tokens fall on the objects"),
    "bench": ("sgformer.cli.bench", "bench", "compare the time and memory of networks"),
    "convert": ("sgformer.cli.convert", "convert", "convert released .pth weights to .safetensors"),
    "data check": ("sgformer.cli.data", "data_check", "check a data set before training on it"),
    "data from": ("sgformer.cli.data", "data_from", "write a data set of another tool in a layout that training reads"),
    "data shards": ("sgformer.cli.data", "data_shards", "pack an image folder into tar shards"),
    "data index": ("sgformer.cli.data", "data_index", "index tar shards made elsewhere"),
    "data scenes": ("sgformer.cli.data", "data_scenes", "compose a data set of digits on photographs, offline"),
}

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success, 2 after an error the user can fix, 130 when interrupted.
    """
    for stream in (sys.stdout, sys.stderr):  # what a terminal's encoding lacks is shown as an escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--"]:  # `torchrun -m sgformer -- train ...`: torchrun would claim --run without it
        del arguments[0]
    try:
        with warnings.catch_warnings():
            ignore_image_warnings()
            return _dispatch(arguments)
    except HelpShown:
        return 0
    except UserError as error:
        if os.environ.get("SGFORMER_DEBUG"):
            raise
        say(f"sgformer: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # stdout was closed, e.g. by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:  # torch is not installed: exported files run without it
        missing = str(error.name)
        if missing not in ("torch", "torchvision", "timm", "safetensors") and not missing.startswith("sgformer."):
            raise
        needs = f"needs {missing}, which is not installed"
        if missing.startswith("sgformer."):  # installed as sgformer-runtime, a subset of the package
            needs = f"is not part of sgformer-runtime: uninstall that, and {how_to_install()}"
        say(f"sgformer: error: this command {needs}", file=sys.stderr)
        return 2
    except OSError as error:  # no space, no permission, no such folder
        if os.environ.get("SGFORMER_DEBUG") or error.strerror is None:
            raise
        say(f"sgformer: error: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("SGFORMER_DEBUG") or not _out_of_memory(error):
            raise
        say("sgformer: error: out of memory: smaller images or batches (--image-size, --batch-size)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("sgformer: interrupted", file=sys.stderr)
        return INTERRUPTED


def _out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or torch, on the CPU or a GPU, got no more memory."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _dispatch(arguments: list[str]) -> int:
    while arguments[:1] == ["--plugin"]:
        if len(arguments) < 2:
            raise UserError("--plugin needs a Python file to run before the command")
        plugins.add(arguments[1])
        arguments = arguments[2:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(*_overview())
        return 0
    if arguments[0] == "--version":
        say(f"sgformer {__version__}")
        return 0
    plugins.load()
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            module, name_in_module, _ = COMMANDS[name]
            function = getattr(importlib.import_module(module), name_in_module)
            if name.startswith("train "):
                return function(name.removeprefix("train "), arguments[words:])
            return run_function(function, name, arguments[words:])
    group = [name for name in COMMANDS if name.startswith(arguments[0] + " ")]
    if group and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        say(*_overview(group))
        return 0 if len(arguments) > 1 else 2
    tried = " ".join(arguments[:2] if group else arguments[:1])
    hint = nearest(tried, [*COMMANDS, *{name.split()[0] for name in COMMANDS}])
    raise UserError(f"unknown command {tried!r}{hint or '; see sgformer --help'}")


def _overview(names: Sequence[str] = tuple(COMMANDS)) -> list[str]:
    names = [name for name in names if importlib.util.find_spec(COMMANDS[name][0])]  # sgformer-runtime has only one
    return [
        "sgformer: the self-guided vision transformer",
        "",
        "usage: sgformer [--plugin FILE.py] COMMAND [options]",
        "",
        *(f"  {name:<16} {COMMANDS[name][2]}" for name in names),
        "",
        "sgformer COMMAND --help shows a command's options; sgformer --version the version. A plugin is a Python",
        "file that runs before the command and registers models, heads, data formats and the like.",
    ]
