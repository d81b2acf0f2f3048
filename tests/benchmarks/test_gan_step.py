"""A step of DCD beside the direct one: the same losses, and multiplications counted truly."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import gan_step_dcd

pytestmark = pytest.mark.path


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_backward_passes_of_grouped_convolutions_are_counted_truly(groups):
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    images = torch.randn(2, 8, 50, 40, requires_grad=True)
    forward = 2 * 8 * (8 // groups) * 9 * 50 * 40 / 1e9
    for needed in (True, False):
        images.requires_grad_(needed)
        found = gan_step_dcd.multiplications(lambda: layer(images).sum().backward())
        assert found["convolutions"] == pytest.approx(forward * (2 + needed), abs=6e-4)


def test_both_steps_have_the_same_losses_and_ours_leaves_the_teacher_alone():
    found = gan_step_dcd.dcd_step(batch=1, side=96, rounds=2, teacher=8, ndf=8)
    ours, direct = found["values"]["ours"], found["values"]["direct"]
    for name in ("style", "feature", "dcd"):
        assert ours[name] == pytest.approx(direct[name], rel=1e-4), name
    assert ours["adversarial"] != direct["adversarial"], "of the teacher's image there"
    assert found["teacher_gradients"]["ours"] == 0 < found["teacher_gradients"]["direct"]
    assert found["gmac"]["ours"]["convolutions"] < found["gmac"]["direct"]["convolutions"]


def test_a_step_takes_as_many_multiplications_as_the_paper_needs():
    experiment = gan_step_dcd.open_experiment(256, 64, 64)
    source = torch.zeros(1, 3, 256, 256)
    step = functools.partial(gan_step_dcd.our_step, experiment, source)
    assert gan_step_dcd.multiplications(step)["convolutions"] == pytest.approx(77, abs=0.3)
