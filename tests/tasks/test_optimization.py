from __future__ import annotations

import pytest
import torch
from torch import nn

from tenfold.errors import UserError
from tenfold.tasks.optimization import make_optimizer, make_schedule

pytestmark = pytest.mark.unit


def parameters():
    return list(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).parameters())


def test_norms_and_biases_do_not_decay():
    optimizer = make_optimizer("sgd", parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    decays = {p.ndim: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {4: 1e-4, 1: 0.0}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_names_of_torch_and_timm_with_options():
    assert isinstance(make_optimizer("adamw", parameters()), torch.optim.AdamW)
    made = make_optimizer({"name": "sgd", "momentum": 0.5, "nesterov": True}, parameters(), lr=1.0)
    assert made.param_groups[0]["momentum"] == 0.5
    assert type(make_optimizer("lamb", parameters())).__name__ == "Lamb"
    with pytest.raises(UserError, match=r"unknown train\.optimizer 'adamv': did you mean adam"):
        make_optimizer("adamv", parameters())
    with pytest.raises(UserError, match=r"train\.optimizer sgd: .*colour"):
        make_optimizer({"name": "sgd", "colour": 3}, parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", [1.0, 0.5, 0.0]),
        ("linear", [1.0, 0.5, 0.0]),
        ("step", [1.0, 0.1, 0.01]),
        ("constant", [1.0, 1.0, 1.0]),
    ],
)
def test_schedules_at_start_middle_end(name, expected):
    optimizer = make_optimizer("sgd", parameters(), lr=1.0)
    schedule = make_schedule(name, optimizer, total_steps=100)
    factor = schedule.lr_lambdas[0]
    assert [factor(0), factor(50), factor(100)] == pytest.approx(expected)


def test_warm_up_rises_to_the_peak():
    schedule = make_schedule("cosine", make_optimizer("sgd", parameters()), 100, warmup_steps=4)
    factor = schedule.lr_lambdas[0]
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
