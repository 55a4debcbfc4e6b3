"""examples/slurm.sh with a scheduler that only writes down what it is told."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (138, True), (143, True), (2, False)])
@pytest.mark.parametrize("begun", [False, True])
def test_a_job_that_was_warned_goes_back_into_the_queue(tmp_path, status, requeued, begun):
    for name, body in {"srun": f"exit {status}", "scontrol": "exit 0"}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> "{tmp_path}/said"\n{body}\n')
        (tmp_path / name).chmod(0o755)
    if begun:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/config.yaml").touch()
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run([SCRIPT, tmp_path / "run", "--data", "images"], env=environment)
    said = (tmp_path / "said").read_text()
    assert done.returncode == status and ("scontrol requeue 7" in said) == requeued
    asked = f"--resume {tmp_path}/run --devices 8\n" if begun else f"--run {tmp_path}/run --devices 8 --data images"
    assert f"srun sgformer train classify {asked}" in said
