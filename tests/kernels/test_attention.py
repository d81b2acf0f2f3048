"""Attention against float64."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tenfold.kernels import native
from tenfold.kernels.attention import attention

pytestmark = pytest.mark.parity


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.double() @ k.double().transpose(-2, -1) * factor
    return scores.softmax(dim=-1) @ v.double()


def close(given: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert given.shape == expected.shape
    assert given.dtype == torch.float32
    assert given.transpose(1, 2).is_contiguous()
    if expected.numel():
        size = expected.abs().max().clamp_min(1e-3)
        assert float((given - expected).abs().max() / size) < bound


def of_one_linear(batch: int, heads: int, tokens: int, depth: int) -> tuple[Tensor, ...]:
    qkv = torch.randn(batch, tokens, 3 * heads * depth)
    return qkv.reshape(batch, tokens, 3, heads, depth).permute(2, 0, 3, 1, 4).unbind(0)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_double_precision(data: st.DataObject) -> None:
    draw = data.draw
    batch, heads = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    queries = draw(st.sampled_from([0, 1, 5, 6, 7, 12, 16, 33, 50, 65]))
    keys = draw(st.sampled_from([1, 2, 7, 8, 15, 16, 17, 31, 48, 50, 65, 130, 255, 257, 530]))
    depth = draw(st.sampled_from([1, 3, 4, 8, 15, 16, 17, 20, 32, 40, 64, 80, 130]))
    scale = draw(st.sampled_from([None, None, 1.0, 0.3, -0.2, 0.0]))
    torch.manual_seed(draw(st.integers(0, 999)))

    def tensor(tokens: int) -> Tensor:
        layout = draw(st.sampled_from(["contiguous", "heads last", "every second", "expanded"]))
        if layout == "contiguous":
            return torch.randn(batch, heads, tokens, depth)
        if layout == "heads last":
            return torch.randn(batch, tokens, heads, depth + 3)[..., 2:-1].transpose(1, 2)
        if layout == "every second":
            return torch.randn(batch, heads, tokens, 2 * depth)[..., ::2]
        return torch.randn(1, 1, tokens, depth).expand(batch, heads, tokens, depth)

    q, k, v = tensor(queries), tensor(keys), tensor(keys)
    close(attention(q, k, v, scale), exact(q, k, v, scale))


@pytest.mark.parametrize("tokens", [1, 6, 50, 196, 197, 198, 256, 257, 577])
def test_of_vision_transformers(tokens: int) -> None:
    q, k, v = of_one_linear(2, 3, tokens, 64)
    y = attention(q, k, v)
    close(y, exact(q, k, v))
    assert y.transpose(1, 2).flatten(2)._base is not None  # a view


@pytest.mark.parametrize("size", [30.0, 1e3, 2.0**60])
def test_extreme_scores_do_not_overflow(size: float) -> None:
    torch.manual_seed(0)
    for keys in (40, 600):
        q, k = torch.randn(1, 1, 20, 16).sign() * size, torch.randn(1, 1, keys, 16).sign()
        v = torch.randn(1, 1, keys, 16)
        # Scores that float32 knows exactly.
        y = attention(q, k, v, 0.25)
        assert y.isfinite().all()
        close(y, exact(q, k, v, 0.25))
        # All scores of a query far below zero
        low = attention(-q.abs(), k.abs(), v, 1.0)
        close(low, v.double().mean(dim=2, keepdim=True).expand_as(low))


def test_scores_that_grow_and_fall_along_the_keys() -> None:
    """Sums of earlier keys are rescaled, also by factors that vanish."""
    q = torch.ones(1, 1, 7, 4)
    for slope in (1.0, -1.0, 100.0, -100.0, 0.01):
        k = torch.linspace(-8, 8, 1030)[None, None, :, None].expand(1, 1, 1030, 4) * slope
        v = torch.randn(1, 1, 1030, 4)
        close(attention(q, k, v), exact(q, k, v))


def test_softmax_is_exact_over_its_whole_range() -> None:
    x = torch.linspace(-86, 0, 5001)
    k = torch.stack([x, torch.zeros_like(x)], dim=1).reshape(1, 1, -1, 2)[:, :, :250]
    for start in range(0, 5000, 250):
        k = torch.stack([x[start : start + 250], torch.zeros(250)], dim=1)[None, None]
        shares = attention(
            torch.tensor([[[[1.0, 0.0]]]]), k, torch.eye(250)[None, None, :, :2], 1.0
        )
        expected = x[start : start + 250].double().softmax(dim=0)[:2]
        assert float(((shares.flatten() - expected) / expected).abs().max()) < 1e-5


def test_nan_stays_in_its_row() -> None:
    q, k, v = of_one_linear(1, 2, 70, 24)
    q[0, 1, 33, 5] = float("nan")
    y = attention(q, k, v)
    assert y[0, 1, 33].isnan().all()
    assert int(y.isnan().sum()) == 24
    k[0, 0, 9] = float("nan")
    assert attention(q, k, v)[0, 0].isnan().all()


def test_other_types_shapes_and_gradients_are_pytorchs() -> None:
    q, k, v = of_one_linear(2, 2, 9, 8)
    torch.testing.assert_close(
        attention(q.double(), k.double(), v.double()), exact(q, k, v), rtol=1e-10, atol=1e-10
    )
    for change in (lambda x: x[:, 0], lambda x: x[:, :1].expand(2, 2, 9, 8)):
        parts = [change(x) for x in (q, k, v)]
        torch.testing.assert_close(attention(*parts), exact(*parts).float())
    one = k[:, :1], v[:, :1]  # broadcast
    torch.testing.assert_close(attention(q, *one), exact(q, *one).float())
    a = q.clone().requires_grad_()
    attention(a, k, v).sum().backward()
    b = q.clone().requires_grad_()
    F.scaled_dot_product_attention(b, k, v).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


class Net(torch.nn.Module):
    def forward(self, qkv: Tensor) -> Tensor:
        batch, tokens, width = qkv.shape
        q, k, v = qkv.reshape(batch, tokens, 3, 2, width // 6).permute(2, 0, 3, 1, 4).unbind(0)
        return attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1) + 1


def test_is_traced_compiled_and_counted() -> None:
    x = torch.randn(2, 11, 48)
    expected = Net()(x)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Net(), (x,), dynamic_shapes=({0: batch},))
    assert "tenfold.attention.default" in {str(node.target) for node in program.graph.nodes}
    wider = torch.randn(5, 11, 48)
    torch.testing.assert_close(program.module()(wider), Net()(wider))
    compiled = torch.compile(Net(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    with FlopCounterMode(display=False) as counter:
        Net()(x)
    assert counter.get_total_flops() == 2 * 2 * (2 * 2 * 11 * 11 * 8)


def test_passes_pytorchs_own_checks() -> None:
    torch.library.opcheck(
        torch.ops.tenfold.attention.default,
        (*of_one_linear(2, 3, 10, 8), None),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_threads_share_inputs_and_nothing_else() -> None:
    parts = of_one_linear(1, 2, 100, 32)
    other = of_one_linear(2, 3, 41, 64)
    expected = [attention(*parts), attention(*other)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            given = parts if i % 2 == 0 else other
            if not torch.equal(attention(*given), expected[i % 2]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_any_number_of_threads_gives_the_same_bits() -> None:
    before = torch.get_num_threads()
    try:
        for shape in ((1, 3, 197, 64), (1, 1, 50, 20), (2, 1, 7, 8)):
            parts = of_one_linear(*shape)
            torch.set_num_threads(1)
            expected = attention(*parts)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(attention(*parts), expected)
    finally:
        torch.set_num_threads(before)


COMPARE = """
import torch
from tenfold.kernels import native
from tenfold.kernels.attention import attention
from tenfold.kernels.normalize import layer_norm
from tenfold.kernels.pooling import max_pool2d, mean_pool
torch.manual_seed(0)
torch.set_num_threads(2)
total = 0.0
for tokens, depth in ((1, 4), (37, 20), (197, 64), (300, 33)):
    q, k, v = torch.randn(3, 2, 3, tokens, depth)
    total += float(attention(q, k, v).double().abs().sum())
x = torch.randn(2, 3, 41, 37)
for stride in (1, 2, 3):
    for kernel in (2, 3, 5):
        y = max_pool2d(x, (kernel, kernel), (stride, stride), (1, 1))
        total += float(y.double().abs().sum())
total += float(mean_pool(x).double().abs().sum())
total += float(layer_norm(x, torch.randn(37)).double().abs().sum())
print(native.instruction_set(), total)
"""


def test_all_instruction_sets_and_the_plain_path_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["reference", *(native.extension().instruction_sets() if native.extension() else ())]
    sums = {}
    for name in names:
        monkeypatch.setenv("TENFOLD_KERNELS", name)
        done = subprocess.run(
            [sys.executable, "-c", COMPARE], capture_output=True, text=True, check=True
        )
        used, total = done.stdout.split()
        assert used == ("None" if name == "reference" else name)
        sums[name] = float(total)
    for name, found in sums.items():
        assert found == pytest.approx(sums["reference"], rel=1e-6), name
