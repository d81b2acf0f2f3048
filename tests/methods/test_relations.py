"""Relations of slices against worked examples, and against difference vectors one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tenfold.errors import UserError
from tenfold.methods import column_strips, pairwise_distance_angle_loss, patches, row_strips

pytestmark = pytest.mark.parity

CUTS = {"rows": row_strips, "columns": column_strips, "patches": patches}
TEACHER = [[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]
STUDENT = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


def parts(student, teacher, **options):
    """Return distances' part, angles' part, and the whole with the paper's weights."""
    weights = ((1.0, 0.0), (0.0, 1.0), (1.0, 2.0))
    return [
        float(
            pairwise_distance_angle_loss(
                student.detach(), teacher, distance_weight=d, angle_weight=a, **options
            )
        )
        for d, a in weights
    ]


def naive_angles(vectors):
    """Return all cosines of vectors `(N, D)` from their difference vectors, `(N, N, N)`."""
    differences = vectors[None] - vectors[:, None]
    units = functional.normalize(differences, dim=2, eps=1e-12)
    return torch.einsum("ijd,ikd->ijk", units, units)


def naive_loss(student, teacher, distance_weight=1.0, angle_weight=2.0):
    """Return R of one image's slices `(N, D)`, with autograd for the rest."""

    def deltas(vectors):
        off = ~torch.eye(len(vectors), dtype=torch.bool)
        differences = (vectors[None] - vectors[:, None])[off]
        distances = differences.square().sum(dim=1).clamp(min=1e-12).sqrt()
        full = torch.zeros(off.shape, dtype=vectors.dtype)
        full[off] = distances / distances.mean()
        return full

    distance = functional.smooth_l1_loss(deltas(student), deltas(teacher))
    angle = functional.smooth_l1_loss(naive_angles(student), naive_angles(teacher))
    return distance_weight * distance + angle_weight * angle


def formula_pair():
    c = torch.arange(3, dtype=torch.float64)[:, None, None]
    i = torch.arange(64, dtype=torch.float64)[None, :, None]
    j = torch.arange(96, dtype=torch.float64)[None, None, :]
    teacher = torch.sin(0.13 * (c + 1) * i + 0.07 * (c + 2) * j + c)
    student = 0.8 * teacher + 0.2 * torch.cos(0.05 * (c + 1) * i - 0.11 * j)
    return student[None], teacher[None]


def random_pair(shape, dtype=torch.float32, seed=0, apart=0.5):
    random = torch.Generator().manual_seed(seed)
    teacher = torch.randn(shape, generator=random, dtype=dtype)
    return teacher + apart * torch.randn(shape, generator=random, dtype=dtype), teacher


# -- the sheet's values ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [None, 1, 2, 3, 100])
def test_three_points_by_hand(dtype, block):
    student = torch.tensor([STUDENT], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([TEACHER], dtype=dtype)
    found = parts(student, teacher, block=block)
    assert found == pytest.approx([0.00348125, 0.00074448, 0.00497021], abs=6e-9)

    loss = pairwise_distance_angle_loss(student, teacher, block=block)
    loss.backward()
    expected = torch.tensor([[[-0.0350, 0.0347], [0.0349, 0.0001], [0.0001, -0.0349]]])
    assert loss.dtype == dtype
    torch.testing.assert_close(student.grad, expected.to(dtype), atol=6e-5, rtol=0)


def test_collinear_points():
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    found = naive_angles(points)
    assert found[1, 0, 2] == -1
    assert found[1, 2, 3] == 1
    assert found[2, 2, 3] == 0
    # All cosines of points on a line are 1 or -1 in whatever order they lie: 0, 1, 3, 7 beside
    # 1, 0, 3, 7 differ by 2 in those at vertices 0 and 1 that look at one another's other side.
    other = points[[1, 0, 2, 3]]
    apart = (naive_angles(other) - found).abs()
    assert set(apart.unique().tolist()) == {0.0, 2.0}
    expected = (apart == 2).sum() * 1.5 / 4**3  # Huber of 2
    assert parts(other[None], points[None])[1] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rows", (0.00083660, 0.00375307, 0.00834274)),
        ("columns", (0.00047175, 0.00112046, 0.00271266)),
        ("patches", (0.00008329, 0.00014181, 0.00036691)),
    ],
)
def test_formula_image(name, expected, dtype):
    student, teacher = (CUTS[name](x.to(dtype)) for x in formula_pair())
    assert parts(student, teacher) == pytest.approx(expected, abs=2e-7)


# -- invariances -----------------------------------------------------------------------------------


def test_shift_scale_and_rotation_are_no_relations():
    _, teacher = random_pair((1, 12, 7))
    turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1)))[0]
    assert pairwise_distance_angle_loss(2.5 * teacher + 3, teacher) < 1e-10
    assert pairwise_distance_angle_loss(teacher @ turn, teacher) < 1e-10


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6])
def test_gradient_goes_with_the_inverse_of_scale(scale):
    student, teacher = random_pair((1, 8, 5))
    gradients = []
    for factor in (1.0, scale):
        leaf = (student * factor).requires_grad_()
        pairwise_distance_angle_loss(leaf, teacher).backward()
        gradients.append(leaf.grad * factor)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


def test_order_of_slices_is_no_relation():
    student, teacher = random_pair((1, 9, 4), torch.float64)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    expected = pairwise_distance_angle_loss(student, teacher)
    found = pairwise_distance_angle_loss(student[:, order], teacher[:, order])
    torch.testing.assert_close(found, expected)


def test_rows_of_the_transposed_image_are_its_columns():
    student, teacher = formula_pair()
    expected = pairwise_distance_angle_loss(column_strips(student), column_strips(teacher))
    found = pairwise_distance_angle_loss(row_strips(student.mT), row_strips(teacher.mT))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


# -- batches, gradients, the direct form -----------------------------------------------------------


@pytest.mark.parametrize("block", [None, 1, 4, 5])
def test_a_batch_is_the_mean_of_its_images(block):
    student, teacher = random_pair((3, 10, 6), torch.float64)
    one, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    found = pairwise_distance_angle_loss(one, teacher, block=block)
    each = [
        pairwise_distance_angle_loss(other[b : b + 1], teacher[b : b + 1], block=block)
        for b in range(3)
    ]
    expected = torch.stack(each).mean()
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(("batch", "block"), [(1, None), (2, 3)])
def test_gradcheck(batch, block):
    student, teacher = random_pair((batch, 4, 5), torch.float64)

    def loss(slices):
        return pairwise_distance_angle_loss(slices, teacher, block=block)

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


def test_gradcheck_beyond_the_huber_threshold():
    student, teacher = random_pair((1, 5, 2), torch.float64, seed=3, apart=4.0)
    assert (naive_angles(student[0]) - naive_angles(teacher[0])).abs().max() > 1
    assert torch.autograd.gradcheck(
        lambda x: pairwise_distance_angle_loss(x, teacher), student.requires_grad_()
    )


@pytest.mark.parametrize("block", [None, 7])
def test_like_the_direct_form(block):
    student, teacher = random_pair((1, 64, 48))
    direct, ours = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = naive_loss(direct[0], teacher[0])
    found = pairwise_distance_angle_loss(ours, teacher, block=block)
    expected.backward()
    found.backward()
    assert abs(found.item() / expected.item() - 1) < 1e-5
    assert (ours.grad - direct.grad).norm() / direct.grad.norm() < 1e-4


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(3, 12),
    width=st.integers(1, 9),
    block=st.integers(1, 13),
    seed=st.integers(0, 2**16),
    weights=st.sampled_from([(1.0, 2.0), (0.0, 1.0), (3.0, 0.0)]),
)
def test_any_shape_is_like_the_direct_form(count, width, block, seed, weights):
    student, teacher = random_pair((2, count, width), torch.float64, seed=seed)
    direct, ours = student.clone().requires_grad_(), student.clone().requires_grad_()
    each = [naive_loss(s, t, *weights) for s, t in zip(direct, teacher, strict=True)]
    expected = torch.stack(each).mean()
    found = pairwise_distance_angle_loss(
        ours, teacher, distance_weight=weights[0], angle_weight=weights[1], block=block
    )
    expected.backward()
    found.backward()
    # Points that nearly coincide are one point here, from a thousandth of the spread on.
    apart = min(torch.pdist(x).min() / x.std() for x in (*student, *teacher))
    if apart > 5e-3:
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    if apart > 1e-2:
        torch.testing.assert_close(ours.grad, direct.grad, rtol=1e-6, atol=1e-8)


def test_similar_rows_keep_their_precision():
    # Pairs of rows that nearly coincide: a Gram matrix of float32 loses their directions.
    random = torch.Generator().manual_seed(0)

    def pairs():
        centres = torch.randn(1, 16, 1, 300, generator=random)
        near = centres + 2e-3 * torch.randn(1, 16, 2, 300, generator=random)
        return near.flatten(1, 2) + 5

    student, teacher = pairs().requires_grad_(), pairs()
    wide = student.detach().double().requires_grad_()
    found = pairwise_distance_angle_loss(student, teacher)
    expected = naive_loss(wide[0], teacher[0].double())
    found.backward()
    expected.backward()
    assert abs(found.item() / expected.item() - 1) < 1e-5
    assert (student.grad - wide.grad).norm() / wide.grad.norm() < 1e-3


def test_autocast_and_half_precision():
    student, teacher = random_pair((1, 16, 24))
    expected = parts(student, teacher)
    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert parts(student, teacher) == expected
        loss = pairwise_distance_angle_loss(leaf, teacher)
        loss.backward()
    plain = student.clone().requires_grad_()
    pairwise_distance_angle_loss(plain, teacher).backward()
    assert torch.equal(leaf.grad, plain.grad)

    half = student.bfloat16().requires_grad_()
    loss = pairwise_distance_angle_loss(half, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(parts(student.bfloat16().float(), teacher)[2], rel=1e-6)


def test_the_teacher_gets_no_gradient():
    student, teacher = (x.requires_grad_() for x in random_pair((1, 6, 4)))
    pairwise_distance_angle_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0
    with torch.no_grad():
        assert not pairwise_distance_angle_loss(student, teacher).requires_grad


def test_keeps_nothing_larger_than_the_slices_and_a_matrix():
    student, teacher = random_pair((1, 40, 100))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        pairwise_distance_angle_loss(student.requires_grad_(), teacher)
    assert sorted(kept) == [40 * 40, 40 * 100]


# -- degenerate images -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_two_equal_slices_have_no_angle_and_no_gradient():
    student, teacher = random_pair((1, 10, 6))
    student[:, 4] = student[:, 7]
    student.requires_grad_()
    loss = pairwise_distance_angle_loss(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 1
    # Zero angles at the pair, which still counts in the means.
    expected = naive_loss(student[0].detach(), teacher[0])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_an_image_of_one_colour_counts_as_nothing(who):
    student, teacher = random_pair((2, 6, 4))
    flat = student if who == "student" else teacher
    flat[1] = 0.3
    alone = pairwise_distance_angle_loss(student[:1], teacher[:1])
    student.requires_grad_()
    with pytest.warns(UserWarning, match="all slices of an image are identical"):
        loss = pairwise_distance_angle_loss(student, teacher)
    loss.backward()
    torch.testing.assert_close(loss.detach(), alone / 2)
    assert torch.isfinite(student.grad).all()
    assert not student.grad[1].any()
    assert student.grad[0].any()


# -- slices ----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 3),
    down=st.integers(1, 4),
    across=st.integers(1, 4),
    size=st.integers(1, 3),
    rest=st.integers(0, 2),
)
def test_slices_hold_the_pixels_they_should(batch, channels, down, across, size, rest):
    rest = min(rest, size - 1)
    height, width = down * size + rest, across * size + rest
    images = torch.arange(batch * channels * height * width, dtype=torch.float32)
    images = images.reshape(batch, channels, height, width)
    found = {name: cut(images, size, drop_remainder=rest > 0) for name, cut in CUTS.items()}
    assert found["rows"].shape == (batch, down, channels * size * width)
    assert found["columns"].shape == (batch, across, channels * size * height)
    assert found["patches"].shape == (batch, down * across, channels * size * size)
    for b in range(batch):
        for i in range(down):
            rows = images[b, :, i * size : (i + 1) * size]
            assert torch.equal(found["rows"][b, i], rows.flatten())
            for j in range(across):
                columns = images[b, :, :, j * size : (j + 1) * size]
                assert torch.equal(found["columns"][b, j].sort()[0], columns.flatten().sort()[0])
                patch = rows[..., j * size : (j + 1) * size]
                assert torch.equal(found["patches"][b, i * across + j], patch.flatten())


def test_columns_are_flattened_over_height_and_colours():
    images = torch.arange(12.0).reshape(1, 2, 2, 3)
    assert column_strips(images)[0, 1].tolist() == [1, 7, 4, 10]


def test_memory_format_is_no_matter():
    images = formula_pair()[0]
    for cut in CUTS.values():
        assert torch.equal(cut(images), cut(images.contiguous(memory_format=torch.channels_last)))


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (torch.zeros(1, 4, 5), torch.zeros(1, 4, 6), r"\(1, 4, 5\), of the teacher \(1, 4, 6\)"),
        (torch.zeros(4, 5), torch.zeros(4, 5), r"expected \(B, N, D\)"),
        (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5), "2 slices an image have no angles"),
        (torch.zeros(1, 0, 5), torch.zeros(1, 0, 5), "0 slices an image have no angles"),
        (torch.zeros(1, 3, 0), torch.zeros(1, 3, 0), "expected none of it 0"),
        (torch.zeros(1, 3, 2).int(), torch.zeros(1, 3, 2).int(), "slices of torch.int32"),
        (torch.full((1, 3, 2), torch.nan), torch.eye(3)[None, :, :2], "NaN or infinity"),
        (torch.eye(3)[None], torch.eye(3)[None] / 0, "NaN or infinity"),
    ],
)
def test_refuses_slices(student, teacher, message):
    with pytest.raises(UserError, match=message):
        pairwise_distance_angle_loss(student, teacher)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block=0"),
        ({"distance_weight": -1.0}, "distance_weight=-1.0"),
        ({"angle_weight": float("inf")}, "angle_weight=inf"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(UserError, match=message):
        pairwise_distance_angle_loss(*random_pair((1, 4, 4)), **options)


@pytest.mark.parametrize(
    ("cut", "size", "message"),
    [
        (row_strips, 3, "height of 64 is no multiple of strip=3"),
        (column_strips, 5, "width of 96 is no multiple of strip=5"),
        (patches, 48, "height of 64 is no multiple of patch=48"),
        (patches, 64, "width of 96 is no multiple of patch=64"),
        (patches, 0, "patch=0: expected at least 1 pixel"),
    ],
)
def test_refuses_sides(cut, size, message):
    with pytest.raises(UserError, match=message):
        cut(torch.zeros(1, 3, 64, 96), size)


@pytest.mark.parametrize("cut", list(CUTS.values()))
def test_refuses_what_is_no_batch_of_images(cut):
    with pytest.raises(UserError, match=r"expected \(B, C, H, W\)"):
        cut(torch.zeros(3, 64, 64))
