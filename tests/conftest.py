import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_make_parametrize_id(config, val, argname):
    """Bytes are named by their argument: what is compressed holds the second it was made in, and workers must agree."""
    return argname if isinstance(val, bytes) else None
