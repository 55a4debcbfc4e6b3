"""Questions that no network is needed for are answered without importing one: help, version, mistakes in a command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgformer.cli import COMMANDS

SOURCE = Path(__file__).parents[2] / "src"
HEAVY = ("torch", "torchvision", "timm", "lightning", "numpy", "PIL", "matplotlib", "jsonargparse", "yaml")

# Each line of arguments in turn, in one process: what it returned and printed, and which packages came in with it.
CODE = f"""
import contextlib, io, json, os, sys
sys.path.insert(0, {str(SOURCE)!r})
import sgformer.cli
found = []
for arguments in json.load(sys.stdin):
    there = set(sys.modules)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = sgformer.cli.main(arguments)
    came = sorted(set({HEAVY!r}) & (set(sys.modules) - there))
    found.append([status, out.getvalue(), err.getvalue(), came])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers():
    """Line of arguments -> status, output, errors, and the heavy packages imported for it."""
    lines = [["--help"], ["--version"], [], ["train", "--help"], ["nonsense"], ["data", "nonsense"]]
    for command in COMMANDS:
        lines += [[*command.split(), "--help"], [*command.split(), "--help-all"], [*command.split(), "--nonsense", "3"]]
    environment = {k: v for k, v in os.environ.items() if k != "SGFORMER_PLUGINS"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], input=json.dumps(lines), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return {" ".join(line): answer for line, answer in zip(lines, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("line, start", [("", "sgformer: "), ("--help", "sgformer: "), ("--version", "sgformer ")])
def test_overview_and_version(line, start, answers):
    status, out, err, came = answers[line]
    assert status == 0 and out.startswith(start) and not err and not came


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, answers):
    for option in ("--help", "--help-all"):
        status, out, err, came = answers[f"{command} {option}"]
        assert status == 0 and out.startswith(f"usage: sgformer {command}") and not err
        assert not came


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_that_there_is_not(command, answers):
    status, out, err, came = answers[f"{command} --nonsense 3"]
    assert status == 2 and not out and err.count("\n") == 1 and "unknown option --nonsense" in err
    assert not came


@pytest.mark.parametrize("line", ["nonsense", "data nonsense"])
def test_a_command_that_there_is_not(line, answers):
    status, out, err, came = answers[line]
    assert status == 2 and not out and f"unknown command '{line}'" in err and not came


def test_a_group_of_commands(answers):
    status, out, _, came = answers["train --help"]
    assert status == 0 and "train classify" in out and not came
