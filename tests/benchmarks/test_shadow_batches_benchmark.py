"""The loader beside ours gives the same codes from the same draws."""

from __future__ import annotations

import pytest
import torch

import shadow_batches
from tenfold.data.shadow_crops import Crops
from tenfold.errors import UserError

pytestmark = pytest.mark.path


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_DATA", str(tmp_path / "cache"))
    shadow_batches.write_set(tmp_path, 3, (60, 80))
    return tmp_path


def test_both_give_the_same_codes(root, monkeypatch):
    crops = Crops((40, 40), (40, 75), 0)
    apart = shadow_batches.difference(root, crops)
    assert set(apart) == {"photo", "mask", "target"}
    assert 0 < apart["photo"] < shadow_batches.ALIKE
    # Other draws give other codes.
    monkeypatch.setattr(
        shadow_batches.PerSample,
        "part",
        lambda self, path, view, photo: torch.zeros(40, 40, *([3] if photo else [])).numpy(),
    )
    with pytest.raises(UserError, match="codes differ"):
        shadow_batches.difference(root, crops)


def test_both_go_through_all_photos(root):
    crops = Crops((40, 40), (40, 75), 0)
    for contender in (shadow_batches.Loop(root, crops, 0), shadow_batches.Ours(root, crops, 0)):
        assert shadow_batches.through(contender) == 3
        ((codes, mask, target),) = contender.epoch()
        assert codes.shape == target.shape == (3, 3, 40, 40)
        assert codes.dtype == target.dtype == mask.dtype == torch.float32
        assert mask.shape == (3, 1, 40, 40)


def test_nothing_is_kept_in_memory(root):
    ours = shadow_batches.Ours(root, Crops((40, 40), (40, 75), 0), 0)
    part = ours.data._train
    read = []
    reading = part.triplets.triplet
    part.triplets.triplet = lambda index: read.append(index) or reading(index)
    for _ in range(2):
        shadow_batches.through(ours)
    assert sorted(read) == [0, 0, 1, 1, 2, 2]
