"""How long the command line takes to answer, and `predict` on one image beside importing torch and reading the weights.

python benchmarks/startup.py                        # medians of interleaved rounds, with their range
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Nothing heavy is imported here: a process starts with the peak memory of the one that starts it.
PREPARE = """
import sys, numpy as np, sgformer
from PIL import Image
about = {"task": "classify", "model": "sgformer_n", "image_size": 64, "classes": list("abcdefghij")}
sgformer.save_model(sgformer.create_model("sgformer_n", num_classes=10, img_size=64), sys.argv[1], about)
Image.fromarray(np.full((200, 150, 3), 90, np.uint8)).save(sys.argv[2])
"""
SGFORMER = [sys.executable, "-m", "sgformer"]
QUESTIONS = (
    "--help",
    "--version",
    "train classify --help",
    "predict --help",
    "eval --no-such-option",
    "no-such-command",
)


def timed(command: list[str]) -> tuple[float, float]:
    """Wall-clock seconds and largest memory in MB of a process, whatever its status."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0  # waited for
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        weights, image = Path(folder) / "n.safetensors", Path(folder) / "a.png"
        subprocess.run([sys.executable, "-c", PREPARE, str(weights), str(image)], check=True)
        read = f"import torch; from safetensors.torch import load_file; load_file({str(weights)!r})"
        commands = {words: [*SGFORMER, *words.split()] for words in QUESTIONS}
        commands["importing torch, reading weights"] = [sys.executable, "-c", read]
        commands["predict, one image"] = [*SGFORMER, "predict", str(weights), str(image)]
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                found[name].append(timed(command))
    for name, values in found.items():
        seconds = [s for s, _ in values]
        middle, memory = statistics.median(seconds), max(m for _, m in values)
        print(f"{name:<34}{middle:7.3f} s ({min(seconds):.3f} to {max(seconds):.3f})  {memory:5.0f} MB")
    pairs = zip(found["predict, one image"], found["importing torch, reading weights"], strict=True)
    ratios = [a / b for (a, _), (b, _) in pairs]
    print(f"predict takes {statistics.median(ratios):.2f} times as long ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
