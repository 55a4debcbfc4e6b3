"""Triton's kernels: in its interpreter they equal the references, a GPU's compiler takes them, and nobody has to."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sgformer
from sgformer.ops import kernels

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.slow
@needs_triton
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_interpreted.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_what_is_missing_is_one_line(monkeypatch):
    model = sgformer.create_model("sgformer_n", num_classes=2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = importlib.util.find_spec
    for there, words in ((None, "comes with torch's builds for Linux"), (True, "torch finds none here")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a, t=there: t if n == "triton" else found(n, *a))
        for prepare in (sgformer.optimize, sgformer.accelerate):
            with pytest.raises(sgformer.UserError, match=words):
                prepare(model, triton=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(sgformer.UserError, match=r"got one on cpu\); call model.cuda"):
        sgformer.optimize(model, triton=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(sgformer.UserError, match=r"compute capability 8.0 \(got Tesla T4\)"):
        sgformer.accelerate(model, triton=True)
    with pytest.raises(ValueError, match="opaque to torch"):
        sgformer.optimize(model, triton=True, compile=True)


def test_kernels_are_in_use_for_the_block_and_the_thread_alone():
    import threading

    class Always:
        @staticmethod
        def serve(*tensors):
            return True

    x, seen = torch.ones(1), []
    assert kernels.serving(x) is None
    with pytest.raises(KeyError), kernels.using(Always):
        assert kernels.serving(x) is Always
        thread = threading.Thread(target=lambda: seen.append(kernels.serving(x)))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == [None] and kernels.serving(x) is None


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sgformer.backends.triton import kernels

SUMS = "LSE SUMS DELTA DK DV DX DWEIGHT"
TYPES = dict.fromkeys(SUMS.split(), "*fp32") | dict.fromkeys(("scale", "factor"), "fp32")
TYPES |= dict.fromkeys(("VALID", "REAL"), "*u8") | dict.fromkeys(("INDEX", "CHOICE"), "*i64")
head = {"d": 24, "D": 32, "BLOCK_N": 64, "BLOCK_M": 64, "PADDED": True, "PRECISION": "tf32x3"}
asked = {
    "attend": {**head, "PARTIAL_QUERIES": True, "WHOLE": True},
    "receive": {**head, "PARTIAL_QUERIES": True},
    "attend_backward_queries": head,
    "attend_backward_keys": head,
    "aggregate": {"BLOCK_R": 32, "BLOCK_C": 64},
    "aggregate_backward": {"BLOCK_R": 32, "BLOCK_C": 64, "TOKENS": True},
    "most_similar": {"BLOCK_L": 64, "BLOCK_G": 32, "BLOCK_C": 32, "PRECISION": "tf32x3"},
}
for name, constants in asked.items():
    kernel = getattr(kernels, name)
    pointers = {n for n in kernel.arg_names if n.isupper() and len(n) > 1} | set("QKVX")
    types = {n: "*bf16" if n in pointers else "i32" for n in kernel.arg_names} | TYPES
    types |= dict.fromkeys(constants, "constexpr")
    types = {n: types[n] for n in kernel.arg_names}
    values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    made = triton.compile(ASTSource(kernel, types, values), target=GPUTarget("cuda", 80, 32))
    assert made.asm["cubin"]
    print(name, made.metadata.shared)
"""


@pytest.mark.slow
@needs_triton
def test_a_gpu_s_compiler_takes_them(tmp_path):
    """For an Ampere GPU, without one; with no more shared memory than the smallest of its kind has."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    shared = dict(line.split() for line in done.stdout.splitlines())
    assert len(shared) == 7 and all(int(size) <= 99 << 10 for size in shared.values()), shared
