"""The tutorials run, one after the other as a reader would, with smaller numbers."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sgformer.cli import main

for package in ("lightning", "matplotlib", "sklearn", "skimage", "pycocotools"):
    pytest.importorskip(package)
TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
ORDER = ("train", "detect", "segment", "explain", "export", "gpus")
SMALLER = {
    "--train 2000 --val 200": "--train 40 --val 20",
    "--train 400 --val 40": "--train 8 --val 4",
    "--epochs 8": "--epochs 1",
    "--warmup-epochs 1": "--warmup-epochs 0",
    "--epochs 9": "--epochs 2",
    "--epochs 6": "--epochs 1",
    "--lr-drops '[5]'": "--lr-drops '[1]'",
    "--steps 300 --val-every 150": "--steps 2 --val-every 1",
    "--limit 4": "--limit 1",
}


def blocks(page: str) -> list[tuple[str, str]]:
    text = (TUTORIALS / f"{page}.md").read_text()
    return re.findall(r"^```(sh|python)\n(.*?)^```", text, re.S | re.M)


def test_every_tutorial_is_run():
    assert {p.stem for p in TUTORIALS.glob("*.md")} == set(ORDER)
    everything = "".join((TUTORIALS / f"{page}.md").read_text() for page in ORDER)
    assert [number for number in SMALLER if number not in everything] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tutorials(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for page in ORDER:
        for language, text in blocks(page):
            if language == "python":
                exec(compile(text, f"{page}.md", "exec"), {})
                continue
            for number, smaller in SMALLER.items():
                text = text.replace(number, smaller)
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line)
                if words[:2] in (["sgformer", "train"], ["sgformer", "eval"]):
                    words += ["--workers", "0"]  # quicker than starting processes for a few images
                if words[0] == "torchrun":
                    words = [sys.executable, "-m", "torch.distributed.run", *words[1:], "--workers", "0"]
                    assert subprocess.run(words, env=environment, timeout=300).returncode == 0, f"{page}.md: {line}"
                else:
                    assert words[0] == "sgformer" and main(words[1:]) == 0, f"{page}.md: {line}"
    made = (
        "runs/photos/report.md",
        "predictions",
        "found.json",
        "seen",
        "labelled",
        "explained/index.html",
        "fields.onnx",
    )
    for left in made:
        assert (tmp_path / left).exists(), left
