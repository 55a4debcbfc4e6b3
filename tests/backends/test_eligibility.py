"""What makes a part of a network ineligible for kernels that know the inside of it."""

import pytest
import torch.nn as nn

from sgformer.backends.eligibility import HOOKS, intact


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_every_kind_of_hook_is_seen(register):
    layer = nn.Linear(3, 3)
    assert intact(layer, nn.Linear)
    handle = getattr(layer, register)(lambda *_: None)
    assert not intact(layer, nn.Linear)
    handle.remove()
    assert intact(layer, nn.Linear)


def test_all_kinds_of_hooks_are_named():
    """Another one, of a later torch, has to be asked about, too; state dicts' have no part in computing."""
    kinds = {name.removeprefix("_") for name, value in vars(nn.Linear(1, 1)).items() if name.endswith("_hooks")}
    assert {name for name in kinds if "state_dict" not in name} == set(HOOKS)
