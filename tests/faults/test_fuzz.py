"""What fuzzing has found to be worth keeping, tried again."""

from pathlib import Path

import fuzz
import pytest

pytest.importorskip("pycocotools")


@pytest.mark.parametrize("target", fuzz.TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_corpus_and_finds(target):
    kept = [f for kind in ("corpus", "finds") for f in sorted(Path(fuzz.HERE, kind, target).glob("*"))]
    assert kept
    for data in (*fuzz.seeds(target), *(file.read_bytes() for file in kept)):
        fuzz.TARGETS[target](data)
