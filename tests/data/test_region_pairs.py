"""Lit regions in the shape of other shadows: what is chosen, and how batches come."""

import numpy as np
import pytest
import torch

from tenfold.data import region_pairs
from tenfold.data.region_pairs import LEAST_PIXELS, MaskShapes, RegionLoader, RegionPairs, stretched
from tenfold.data.sampler import EpochSampler
from tenfold.errors import UserError
from tenfold.nn.shadow_regions import area_ratios, dilated, lit_region

pytestmark = pytest.mark.unit

SIDE = 40


def box(top: int, left: int, height: int, width: int, side: int = SIDE) -> torch.Tensor:
    mask = torch.zeros(side, side, dtype=torch.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


class Photos:
    """Stands in for `ShadowData`: photos whose crops are themselves."""

    name = "photos"
    size = (SIDE, SIDE)

    def __init__(self, masks):
        self.masks = masks

    def train_masks(self):
        return self.masks

    def train_loader(self, *, batch_size, seed, augment, rank=0, world_size=1):
        sampler = EpochSampler(len(self.masks), seed, True, rank, world_size)
        masks, side = self.masks, SIDE

        class Loader:
            def __init__(self):
                self.sampler = sampler

            def __len__(self):
                return -(-len(sampler) // batch_size)

            def __iter__(self):
                keys = list(sampler)
                for first in range(0, len(keys), batch_size):
                    ids = torch.tensor(keys[first : first + batch_size]) % len(masks)
                    yield {
                        "image": ids.to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, side, side),
                        "mask": torch.stack([masks[i] for i in ids.tolist()])[:, None],
                        "target": torch.zeros(len(ids), 3, side, side, dtype=torch.uint8),
                        "id": ids,
                    }

        return Loader()


# Four shadows of about one size in four corners, one of them small, and one nearly everywhere.
MASKS = [
    box(0, 0, 12, 12), box(0, 25, 12, 12), box(25, 0, 12, 13), box(26, 26, 12, 11),
    box(18, 18, 5, 5), box(0, 0, 39, 40),
]  # fmt: skip


def test_regions_never_overlap_the_shadow_and_have_its_area_where_any_mask_does():
    shapes = MaskShapes(MASKS, (SIDE, SIDE))
    chosen = set()
    for epoch in range(60):
        shadow = MASKS[0]
        found = shapes.lit_region(shadow, 0, epoch, 7)
        assert found is not None
        assert not bool((found.mask & shadow).any())
        assert 0.8 <= found.ratio <= 1.2
        expected = lit_region(MASKS[found.shape].float(), shadow.float())
        assert torch.equal(found.mask.float(), expected)
        both = [mask[None, None].float() for mask in (found.mask, shadow)]
        assert area_ratios(*both).item() == pytest.approx(found.ratio)
        assert bool((dilated(both[0], 50) >= both[0]).all())
        chosen.add(found.shape)
    assert chosen == {1, 2, 3}, "each mask that fits is taken, and no other"


def test_the_choice_is_even_and_hangs_on_seed_epoch_and_id_alone():
    shapes = MaskShapes(MASKS, (SIDE, SIDE))
    drawn = [shapes.lit_region(MASKS[0], 3, 0, i).shape for i in range(600)]
    counts = np.bincount(drawn, minlength=4)[1:4]
    assert counts.sum() == 600
    assert np.all(np.abs(counts - 200) < 60), "4.3 standard deviations"
    assert drawn == [shapes.lit_region(MASKS[0], 3, 0, i).shape for i in range(600)]
    for other in ((4, 0), (3, 1)):
        assert drawn != [shapes.lit_region(MASKS[0], *other, i).shape for i in range(600)]


def test_a_chunk_ends_no_search(monkeypatch):
    monkeypatch.setattr(region_pairs, "CHUNK", 2)
    shapes = MaskShapes([box(30, 30, 4, 4)] * 20 + [MASKS[1]], (SIDE, SIDE))
    assert {shapes.lit_region(MASKS[0], 0, i, 0).shape for i in range(20)} == {20}


def test_without_a_mask_that_fits_the_first_of_some_size_is_kept():
    small, tiny = box(30, 30, 5, 5), box(30, 30, 3, 4)
    shapes = MaskShapes([tiny, tiny, small], (SIDE, SIDE))
    large = box(0, 0, 20, 20)
    found = [shapes.lit_region(large, 0, epoch, 0) for epoch in range(20)]
    assert {each.shape for each in found} == {2}, "a ratio of 0.0625, and 0.03 of the others"
    larger = box(0, 0, 28, 28)  # none has 0.05
    assert {shapes.lit_region(larger, 0, epoch, 0).shape for epoch in range(20)} == {2}


def test_only_a_hundred_draws_look_for_some_size(monkeypatch):
    monkeypatch.setattr(region_pairs, "DRAWS", 2)
    masks = [box(30, 30, 3, 4)] * 9 + [box(30, 30, 5, 5)]
    shapes = MaskShapes(masks, (SIDE, SIDE))
    found = {shapes.lit_region(box(0, 0, 20, 20), 0, epoch, 0).shape for epoch in range(40)}
    assert 9 in found
    assert len(found) > 1


def test_too_little_of_a_region_gives_none():
    shapes = MaskShapes(MASKS[:2], (SIDE, SIDE))
    assert shapes.lit_region(box(0, 0, 3, 3), 0, 0, 0) is None, "9 pixels of shadow"
    assert shapes.lit_region(box(0, 0, 40, 37), 0, 0, 0) is None, "the rest is lit nowhere"
    assert shapes.lit_region(torch.zeros(SIDE, SIDE, dtype=torch.uint8), 0, 0, 0) is None


def test_masks_of_any_size_are_stretched_and_useless_ones_left_out():
    masks = [torch.zeros(9, 9, dtype=torch.uint8), torch.ones(5, 7, dtype=torch.uint8)]
    with pytest.raises(UserError, match="none of the 2 masks marks a shadow"):
        MaskShapes(masks, (SIDE, SIDE))
    with pytest.raises(UserError, match="1 photo with its mask: expected at least 2"):
        MaskShapes(masks[:1], (SIDE, SIDE))
    half = box(0, 0, 40, 40, side=80)
    assert torch.equal(stretched(half[None], (SIDE, SIDE)), box(0, 0, 20, 20))
    shapes = MaskShapes([*masks, half[None]], (SIDE, SIDE))
    assert shapes.lit_region(box(20, 20, 20, 20), 0, 0, 0).shape == 2
    with pytest.raises(UserError, match="expected the shapes' size"):
        shapes.lit_region(half, 0, 0, 0)


def test_batches_hold_what_hqss_reads_and_no_photo_without_shadow():
    pairs = RegionPairs(Photos(MASKS[:4]))
    loader = pairs.train_loader(batch_size=3, seed=1, augment="none")
    batches = list(loader)
    assert len(loader) == len(batches) == 2
    for batch in batches:
        assert sorted(batch) == ["id", "image", "lit", "mask"]
        assert batch["lit"].dtype == torch.uint8
        assert batch["lit"].shape == batch["mask"].shape
        assert not bool((batch["lit"] & batch["mask"]).any())
        assert int(batch["lit"].flatten(1).sum(1).min()) >= LEAST_PIXELS
    assert sorted(torch.cat([batch["id"] for batch in batches]).tolist()) == [0, 1, 2, 3]


def test_epochs_differ_and_come_again():
    pairs = RegionPairs(Photos(MASKS[:4]))

    def lit(epoch: int) -> dict[int, int]:
        loader = pairs.train_loader(batch_size=2, seed=1)
        loader.sampler.set_epoch(epoch)
        return {
            int(number): int(mask.argmax())
            for batch in loader
            for number, mask in zip(batch["id"], batch["lit"].flatten(1), strict=True)
        }

    assert lit(3) == lit(3)
    assert len({tuple(sorted(lit(epoch).items())) for epoch in range(6)}) > 1


def test_samples_without_a_region_are_replaced_and_steps_stay():
    dark = box(0, 0, 40, 37)  # lit nowhere
    pairs = RegionPairs(Photos([*MASKS[:2], dark, dark, dark, dark]))
    for batch_size in (1, 2, 3, 6):
        for epoch in range(4):
            loader = pairs.train_loader(batch_size=batch_size, seed=0)
            loader.sampler.set_epoch(epoch)
            batches = list(loader)
            assert len(batches) == len(loader)
            assert all(len(batch["id"]) == batch_size for batch in batches)
            ids = torch.cat([batch["id"] for batch in batches])
            assert set(ids.tolist()) == {0, 1}


def test_an_epoch_without_anything_to_learn_from_says_so():
    masks = [box(0, 0, 40, 37)] * 2
    loader = RegionLoader(
        Photos(masks).train_loader(batch_size=1, seed=0, augment="none"),
        MaskShapes(masks, (SIDE, SIDE)), 0, "photos",
    )  # fmt: skip
    with pytest.raises(UserError, match="photos: no crop of epoch 0 has 10 pixels of shadow"):
        list(loader)
