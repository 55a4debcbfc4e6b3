"""A process that was killed goes on with --resume, and ends with the bits of one that was not."""

import random
import signal

import killing
import pytest
import torch

pytestmark = pytest.mark.slow  # whole runs, again and again

pytest.importorskip("lightning")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    return killing.undisturbed(killing.classification(folder), folder)


def test_every_phase_is_there(reference):
    assert set(reference.counts) == set(killing.PHASES)


@pytest.mark.parametrize(
    "phases",
    [
        ["backward pass", "averaging weights", "writing a checkpoint"],
        pytest.param(["saving weights", "validation", "results of a validation"], marks=pytest.mark.slow),
        # The first surely hits; moments of the whole run may come after its end, when the machine has become quicker.
        pytest.param(["update", "any time", "any time"], marks=pytest.mark.slow),
    ],
    ids=lambda phases: phases[0],
)
def test_a_killed_run_ends_as_if_it_had_not_been(reference, tmp_path, phases):
    kills = killing.Kills()
    killing.kill_and_resume(reference, tmp_path / "run", random.Random(0), phases, kills)
    assert not kills.lost and kills.survived >= 1


@pytest.mark.parametrize(
    "name", [pytest.param("SIGINT", marks=pytest.mark.slow), pytest.param("SIGTERM", marks=pytest.mark.slow), "SIGUSR1"]
)
def test_a_signal_writes_a_checkpoint_and_the_exit_code_says_so(reference, tmp_path, name):
    number = getattr(signal, name)
    course, run = reference.course, tmp_path / "run"
    process = killing.Process(course, course.begin(run), tmp_path / "out.txt", ("forward pass", 4))
    assert process.wait_for_target()
    process.signal(number)
    assert process.wait() == 128 + number
    said = (tmp_path / "out.txt").read_text()
    assert f"stopped by {name} after step 4; resume with: sgformer train classify --resume {run}" in said
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert killing.Process(course, course.resume(run), tmp_path / "out.txt").wait() == 0
    assert killing.differences(reference.run, run) == []


def test_a_signal_in_the_last_update_still_leaves_a_whole_run(reference, tmp_path):
    """Its validation is done, too: nothing of the run is left for a --resume that has no update to make."""
    course, run = reference.course, tmp_path / "run"
    options = [*course.begin(run), "--max-steps", "4"]
    process = killing.Process(course, options, tmp_path / "out.txt", ("forward pass", 4))
    assert process.wait_for_target()
    process.signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert killing.Process(course, course.resume(run), tmp_path / "out.txt").wait() == 0
    assert (run / "report.md").exists()
