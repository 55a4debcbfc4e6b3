"""The folder of a run: settings, environment, log and outputs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sgformer._version import __version__
from sgformer.core.errors import UserError
from sgformer.core.files import (
    appending,
    distrust_links,
    make_folder,
    open_to_append,
    refuse_links,
    to_json,
    try_folder,
    write_text,
)
from sgformer.core.names import dashed, printable, some, without_login
from sgformer.core.parse import MAX_SMALL, read_json
from sgformer.data.identity import Contents, class_differences, read_contents, write_contents
from sgformer.training.config import AUTO, Config, RunConfig, make_config, read_yaml, refuse_remote, to_yaml

log = logging.getLogger("sgformer")
TIME = "%Y-%m-%d %H:%M:%S"
CONFIG = "config.yaml"

# Settings that may change when a run is resumed.
PLACES = ("data", "val_data", "images")  # where the data are: they may move, but not change
RESUME_MAY_CHANGE = ("epochs", "max_steps", "patience", "workers", "device", "devices", "native", "run", *PLACES)


class RunFolder:
    """Paths and small files of a run. Only the main process writes.

    Args:
        path: the folder.
        writes: whether this process writes.
    """

    def __init__(self, path: str | os.PathLike[str], writes: bool = True):
        self.path = Path(path)
        self.writes = writes
        distrust_links(self.path)

    @property
    def checkpoint(self) -> Path:
        """The full training state, for `--resume`."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def previous(self) -> Path:
        """The preceding training state, a fallback if the last is damaged."""
        return self.path / "checkpoints" / "previous.ckpt"

    @property
    def contents(self) -> Path:
        """The names in the data that the run began with, see `data.identity`."""
        return self.path / "data.json.gz"

    @staticmethod
    def try_place(run: str | os.PathLike[str] | None) -> None:
        """Whether a run can be written at a place, by default in `runs`, before the work for it; creates nothing.

        Raises:
            UserError: the folder is not empty, or is a file, or cannot be written.
        """
        folder = Path(run or ("runs" if os.path.isdir("runs") else "."))
        if run is not None:
            leftover = f"{CONFIG}.tmp"  # of a run that was killed while writing its first file
            there = os.path.exists(folder)  # of a name too long, Path.exists raises
            if there and not folder.is_dir():
                raise UserError(f"{folder}: not a folder; pass another --run")
            if there and any(file.name != leftover for file in folder.iterdir()):
                raise UserError(f"{folder}: not empty; pass another --run, or --resume {folder} to continue")
        try_folder(folder, "--run")

    @classmethod
    def create(cls, config: RunConfig, task: str, writes: bool = True) -> RunFolder:
        """Create the folder `config.run`, by default `runs/TASK-MODEL-TIME`, and write `config.yaml`.

        Raises:
            UserError: see `try_place`; another run may have taken the place meanwhile.
        """
        name = f"{task}-{config.model.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = cls(config.run or (_own_folder(Path("runs") / name) if writes else Path("runs") / name), writes)
        if writes:
            cls.try_place(folder.path)
            make_folder(folder.path)
            distrust_links(folder.path)
            folder.write(CONFIG, to_yaml(config.to_dict()))
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str], writes: bool = True) -> RunFolder:
        """Open an existing run.

        Raises:
            UserError: the folder is not a run folder.
        """
        folder = cls(path, writes)
        if not (folder.path / CONFIG).is_file():
            raise UserError(f"{folder.path}: not a run folder (no {CONFIG} in it)")
        return folder

    def check(self) -> None:
        """Look for what a folder of somebody else's may hold to do harm; before it is resumed, not hours later.

        Raises:
            UserError: a link that would be written through; what is neither file nor folder and may be read for ever.
        """
        for name in ("checkpoints", "validation", "significance", "log.txt", "metrics.csv"):
            refuse_links(self.path / name)
        for path in self.path.rglob("*"):
            if path.exists() and not path.is_file() and not path.is_dir():
                raise UserError(f"{path}: neither a file nor a folder; remove it")

    def keep_split(self, split: Mapping[str, Any] | None) -> None:
        """Write which images --val-split kept for validation; of a resumed run, compare.

        Raises:
            UserError: the run began with another split.
        """
        path = self.path / "split.json"
        if split is None:
            return
        if not path.is_file():
            if self.writes:
                self.write("split.json", to_json(split))
            return
        try:
            before = {str(name) for name in read_json(path)["val"]}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: damaged; it names the validation images of this run") from None
        if changed := sorted(before ^ set(split["val"])):
            raise UserError(
                f"{path}: the data changed: {len(changed)} images would be on the other side of the split: "
                f"{some(changed, 4)}; restore them, or start a new run with --weights {self.path}"
            )

    def usable_checkpoint(self) -> tuple[Path | None, int]:
        """The newest intact training state and its number of updates; (None, 0) if there is none yet.

        Damaged states are logged.

        Raises:
            UserError: all existing states are damaged.
        """
        from sgformer.training.state_file import read_step

        states = [path for path in (self.checkpoint, self.previous) if path.exists()]
        damage = []
        for path in states:
            try:
                step = read_step(path)
            except UserError as error:
                damage.append(str(error))
                continue
            for line in damage if self.writes else ():
                log.warning(f"{line}; resuming from {path.name}, step {step}")
            return path, step
        if damage:
            raise UserError("; ".join(damage) + "; remove the damaged files to restart this run from the beginning")
        return None, 0

    def clear_unfinished(self) -> None:
        """Remove the partial files of a killed process, `*.tmp`."""
        if self.writes:
            for file in self.path.rglob("*.tmp"):
                file.unlink()

    def resume_hint(self, command: str, config: RunConfig) -> str:
        """How to resume a stopped run of these settings, and from which step."""
        try:
            path, step = self.usable_checkpoint()
        except UserError as error:
            return str(error)
        if path is None:
            return f"no checkpoint has been written to {self.path} yet"
        return f"step {step} is saved in {path}; resume with: {resume_command(command, self.path, config)}"

    def write(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        if self.writes:
            write_text(self.path / name, text)

    def check_data(self, data: str | None, task: str, splits: Mapping[str, Contents]) -> None:
        """Compare the data with those that the run began with.

        Args:
            data: what messages name.
            task: the run's task, for the advice.
            splits: the contents now.

        Raises:
            UserError: classes, images or annotations were added, removed, renamed or changed; names them.
        """
        from sgformer.models.load import read_metadata  # not at the head: it imports torch

        before = read_contents(self.contents)
        if before is not None:
            found: dict[str, list[str]] = {}
            for name, now in splits.items():
                if differing := before[name].differences(now):
                    found.setdefault(", ".join(differing), []).append(name)
            lines = [f"{' and '.join(names)}: {what}" for what, names in found.items()]
        else:  # a run of an earlier version
            last = self.path / "last.safetensors"
            known = read_metadata(last).get("classes") if last.is_file() else None
            lines = class_differences(known, splits["train"].classes) if known else []
        if lines:
            raise UserError(
                f"{data}: not the data that {self.path} began with; {'; '.join(lines)}. Undo this to resume, or start "
                f"a new run from it: sgformer train {task} --weights {self.path} --data {data}"
            )

    def write_contents(self, splits: Mapping[str, Contents]) -> None:
        """Record the data for `check_data`."""
        if self.writes:
            write_contents(self.contents, splits)

    def write_environment(self, **facts: Any) -> None:
        """`environment.json`: versions, commit, machine, command line, and the given facts."""
        self.write("environment.json", to_json({**environment(), **facts}) + "\n")

    def environment(self) -> dict[str, Any]:
        """Read `environment.json`; empty if it is missing or unreadable."""
        try:
            facts = read_json(self.path / "environment.json", MAX_SMALL)
        except UserError:
            return {}
        return facts if isinstance(facts, dict) else {}

    def note(self, text: str) -> None:
        """Append a line to `log.txt` only; write errors are ignored."""
        if self.writes:
            with suppress(OSError), appending(self.path / "log.txt") as file:
                file.write(f"{time.strftime(TIME)} {printable(without_login(text))}\n")

    def start_log(self) -> logging.Handler:
        """Add a `log.txt` handler to the `sgformer` logger; the caller must remove the returned handler."""
        handler: logging.Handler = logging.NullHandler()
        if self.writes:
            handler = _LogFile(self.path / "log.txt")
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", TIME))
        log.addHandler(handler)
        return handler


def resumed_config(config_class: type[Config], run: str | os.PathLike[str], options: dict[str, Any]) -> Config:
    """A run's stored settings, updated with the options that may change.

    Raises:
        UserError: an option that must not change differs from the run's.
    """
    folder = RunFolder.open(run)
    folder.check()
    # Nothing is derived from the data again: what an older run did not know has its standard value.
    file = folder.path / CONFIG
    values = read_yaml(file, config_class)
    refuse_remote(file, config_class, values, options)
    try:
        stored = make_config(config_class, values).resolved()
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    given = {name: value for name, value in options.items() if value != AUTO or name not in stored.automatic()}
    config = dataclasses.replace(make_config(config_class, {**stored.to_dict(), **given}), run=str(folder.path))
    for name in (field.name for field in dataclasses.fields(config)):
        if name not in RESUME_MAY_CHANGE and getattr(config, name) != getattr(stored, name):
            known = [field.name for field in dataclasses.fields(config)]
            allowed = ", ".join(f"--{dashed(n)}" for n in RESUME_MAY_CHANGE if n != "run" and n in known)
            current = f"--{dashed(name)} is {getattr(stored, name)} in {folder.path}"
            raise UserError(f"{current} and cannot change on resuming (only {allowed} can)")
    return config


def resume_command(command: str, run: str | os.PathLike[str], config: RunConfig) -> str:
    """The command line that resumes a run of these settings."""
    again = "".join(f" --{dashed(name)} {value}" for name, value in config.remote().items())
    return f"sgformer train {command} --resume {run}{again}"


def environment() -> Mapping[str, Any]:
    """Versions, commit, machine and command line of this process."""
    packages = ("torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy", "pillow")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": without_login(shlex.join(sys.argv)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "commit": _commit(),
        "sgformer": __version__,
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, with `+changes` if tracked files differ; None outside a git checkout."""

    def git(*command: str) -> str:
        here = Path(__file__)
        return subprocess.run(
            ["git", "-C", str(here.parent), *command], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not if installed inside another project's checkout
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _own_folder(path: Path) -> Path:
    """Create the folder or, if another run of the same second has it, the first free of `PATH-2`, `PATH-3` ..."""
    for number in itertools.count(1):
        own = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with suppress(FileExistsError):
            own.mkdir(parents=True)
            return own
    raise AssertionError


class _LogFile(logging.StreamHandler):  # type: ignore[type-arg]
    """Drops lines silently on a full disk; the error that stops the run reports the cause."""

    def __init__(self, path: Path):
        super().__init__(open_to_append(path))

    def close(self) -> None:
        with suppress(OSError):
            self.stream.close()
        super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _Terminal(logging.Handler):
    """Prints messages to the current standard output, which a progress bar may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        text, encoding = self.format(record), getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


@contextmanager
def shown_log() -> Iterator[None]:
    """Show this package's log on the terminal, unless the program has configured logging itself."""
    level, handler = log.level, _Terminal()
    if not log.hasHandlers():
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
