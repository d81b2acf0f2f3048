"""The loop beside the evaluator gives the same figures, from memory and from files."""

from __future__ import annotations

import numpy as np
import pytest

import shadow_evaluation

pytestmark = pytest.mark.path


def test_both_give_the_same_figures(tmp_path):
    photos = shadow_evaluation.make_photos(3, 60, 80)
    loop = shadow_evaluation.loop_over(photos, np.float64)
    assert loop.shape == (3, 3, 4)
    assert np.isfinite(loop).all()
    ours = shadow_evaluation.ours_of(shadow_evaluation.as_batch(photos))
    np.testing.assert_allclose(ours, loop, atol=shadow_evaluation.EQUAL)
    shadow_evaluation.write_photos(photos, tmp_path)
    loop = shadow_evaluation.loop_over_folders(tmp_path, np.float32)
    ours = shadow_evaluation.ours_of_folders(tmp_path, 1)
    np.testing.assert_allclose(ours, loop, atol=shadow_evaluation.EQUAL)


def test_what_differs_is_not_timed():
    contenders = {"loop": lambda: np.zeros(3), "ours": lambda: np.full(3, 0.01)}
    with pytest.raises(ValueError, match=r"figures differ by 0\.01"):
        shadow_evaluation.compare(contenders, 3, 2)


def test_the_codes_of_both_are_the_same():
    found = shadow_evaluation.colours(2, 2)
    assert 0 <= found["largest_difference"] < 1e-5
    assert found["speedup"]["median"] > 0
