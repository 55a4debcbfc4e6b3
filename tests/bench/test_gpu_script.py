"""benchmarks/gpu.py, without a GPU: parts keep to their time, what did not fit is named, and nothing runs in vain."""

import re
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu


def test_without_a_gpu_one_line_and_exit_code_2(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out")])
    assert gpu.main() == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "needs a CUDA device" in told.err and not told.out
    assert not list(tmp_path.iterdir())


def test_shares_make_eight_minutes_and_cover_what_is_asked():
    assert gpu.TEST_SECONDS + sum(part.seconds for part in gpu.PARTS) + gpu.RESERVE <= gpu.TOTAL == 480
    cases = [case for part in gpu.PARTS for case in part.cases("cuda")]
    assert {c.image_size for c in cases} == {224, 512, 1024} and {c.mode for c in cases} == {"infer", "train"}
    ours = {(c.backend, c.precision) for c in cases if c.model == gpu.OURS}
    assert ours == {(b, p) for b in ("eager", "triton", "compile") for p in ("fp32", "bf16")}
    assert {c.backend for c in cases if c.model != gpu.OURS} == {"eager", "compile"}
    assert len({part.name for part in gpu.PARTS}) == len(gpu.PARTS)


def test_every_test_with_the_mark_is_in_the_file_that_runs():
    marked = [path for path in (gpu.ROOT / "tests").rglob("*.py") if re.search(r"mark\.gpu\b", path.read_text())]
    assert [p.name for p in marked if p != Path(__file__)] == ["test_gpu.py"] and gpu.TESTS[-1] == "tests/test_gpu.py"


def test_a_command_that_takes_too_long_may_write_what_it_has(tmp_path):
    code = "import time\ntry:\n    print('begun', flush=True)\n    time.sleep(99)\nexcept KeyboardInterrupt:\n"
    assert gpu.run_for([sys.executable, "-c", f"{code}    print('kept')"], 4, tmp_path / "log") is None
    assert (tmp_path / "log").read_text() == "begun\nkept\n"
    assert gpu.run_for([sys.executable, "-c", "raise SystemExit(3)"], 60, tmp_path / "log") == 3


@pytest.mark.slow
def test_table_and_picture_of_what_was_measured_and_names_of_what_was_not(tmp_path):
    modes, backends = ("infer", "train"), ("eager", "triton")
    parts = [gpu.Part(f"small-{m}", 300, ("sgformer_n", "resnet18"), 32, 2, m, backends, ("fp32",)) for m in modes]
    parts.append(gpu.Part("memory", 0, ("sgformer_n",), 64, 2, "train", ("eager",), ("fp32",), memory=True))
    parts.append(gpu.Part("late", 0, ("sgformer_n",), 64, 2, "infer", ("eager",), ("bf16",)))
    before = time.monotonic()
    late = gpu.measure(parts[2:], "cpu", tmp_path, before)
    results = gpu.measure(parts[:2], "cpu", tmp_path, before + 600) + late
    text = gpu.table(results, "6 passed", "A machine.")
    rows = re.findall(r"^\| (?:inference|training) \|.* \d\.\d\d \|$", text, re.M)
    shown = [re.findall(r"`(\w+)` \| (\w+)", row)[0] for row in rows]
    assert shown == 2 * [("sgformer_n", "eager"), ("resnet18", "eager")]
    assert all(row.endswith("| 1.00 |") for row in rows)
    assert "* inference, 32, 2, `sgformer_n`, triton, fp32: triton=True needs" in text
    assert "| training | 64, 2 | `sgformer_n` | eager | fp32 | no time was left |" in text
    assert "* inference, 64, 2, `sgformer_n`, eager, bf16: no time was left" in text
    gpu.picture(results, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
