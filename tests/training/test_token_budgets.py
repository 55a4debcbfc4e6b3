"""`--token-budget-range`: one training for many token budgets."""

import pytest
import torch
from photos import QUICK, make_photos

from sgformer.core.errors import UserError
from sgformer.tasks.api import train
from sgformer.tasks.classify.config import ClassifyConfig
from sgformer.training import callbacks

pytest.importorskip("lightning")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def test_every_update_draws_one_and_validation_has_all_tokens(photos, tmp_path, monkeypatch):
    drawn, saved = [], callbacks.set_token_budget
    monkeypatch.setattr(
        callbacks, "set_token_budget", lambda model, budget: (drawn.append(budget), saved(model, budget))
    )
    options = {**QUICK, "data": str(photos), "token_budget_range": ".25,2", "ema": 0.0}
    straight = train("classify", run=str(tmp_path / "straight"), max_steps=6, **options).path
    assert drawn[1::2] == [1.0] * 6 and len(set(drawn[::2])) > 2
    assert set(drawn[::2]) <= set(ClassifyConfig(token_budget_range=".25,2").token_budgets)

    train("classify", run=str(tmp_path / "run"), max_steps=2, **options)
    run = train("classify", resume=tmp_path / "run", max_steps=6).path
    states = [torch.load(r / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for r in (straight, run)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert drawn[12:] == drawn[:12]


def test_ranges():
    budgets = ClassifyConfig(token_budget_range=".25,2").token_budgets
    assert budgets == pytest.approx((0.25, 2**-1.5, 0.5, 2**-0.5, 1, 2**0.5, 2))
    assert ClassifyConfig().token_budgets == (1.0,)


@pytest.mark.parametrize("wrong", ["2,.25", "1", "a,b", ".1,2", "1,9", "nan,2", "1,1"])
def test_a_wrong_range_is_refused(wrong):
    with pytest.raises(UserError, match=r"--token-budget-range must be LEAST,MOST between 0.25 and 4"):
        ClassifyConfig(token_budget_range=wrong)


def test_other_networks_have_no_tokens():
    with pytest.raises(UserError, match="--token-budget-range is for sgformer models"):
        ClassifyConfig(model="resnet10t", token_budget_range=".5,2")
