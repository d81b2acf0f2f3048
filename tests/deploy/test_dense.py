"""Attention and pooling beside packed layers: replaced where that is right, and found again."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tenfold
from tenfold.deploy import dense
from tenfold.deploy.edits import replaced_nodes, replay
from tenfold.deploy.fuse import fuse
from tenfold.errors import UserError
from tenfold.kernels.attention import attention
from tenfold.kernels.pooling import max_pool2d
from tests.pruning import pruned, relative

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def called(fast):
    return [node.target for node in fast.network.graph.nodes if node.op == "call_function"]


class Attend(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.qkv = pruned(nn.Linear(16, 48), (2, 4))
        self.options = options

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        ({}, True),
        ({"scale": 0.7}, True),
        ({"attn_mask": None, "dropout_p": 0.0, "is_causal": False}, True),
        ({"is_causal": True}, False),
        ({"dropout_p": 0.1}, False),
        ({"attn_mask": torch.ones(9, 9, dtype=torch.bool).tril()}, False),
    ],
)
def test_plain_attention_alone_is_replaced(options, replaced):
    network = Attend(**options).eval()
    x = torch.randn(2, 9, 16)
    graph, _ = fuse(network, (x,))
    found = dense.replace_dense(graph, (x,), "packed")
    assert found == ({"scaled_dot_product_attention": "attention"} if replaced else {})
    assert (attention in [node.target for node in graph.graph.nodes]) == replaced
    if not options.get("dropout_p"):
        assert relative(graph(x).detach(), network(x).detach()) < 1e-5


class Pool(nn.Module):
    def __init__(self, code):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.relu, self.writing = nn.ReLU(), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.wide = nn.MaxPool2d(2, 1, 1, dilation=2)
        self.last = pruned(nn.Conv2d(8, 8, 1), (2, 4))
        self.code = code

    def forward(self, x):
        return self.last(self.code(self, x))


def twice_read(net, x):
    y = net.first(x)
    return net.pool(net.relu(y)) + y[..., ::2, ::2]


def written_and_read(net, x):
    y = net.first(x)
    return net.pool(net.writing(y)) + y[..., ::2, ::2]


def relu_read_twice(net, x):
    y = net.relu(net.first(x))
    return net.pool(y) + y[..., ::2, ::2]


@pytest.mark.parametrize(
    ("code", "replaced"),
    [
        (lambda net, x: net.pool(net.relu(net.first(x))), "relu and max_pool2d"),
        (lambda net, x: net.pool(net.writing(net.first(x))), "relu and max_pool2d"),
        (lambda net, x: net.wide(net.relu(net.first(x))), "max_pool2d"),
        (lambda net, x: F.max_pool2d(net.first(x), 3, padding=1), "max_pool2d"),
        (lambda net, x: torch.max_pool2d(net.first(x), (3, 2), [2, 1]), "max_pool2d"),
        (lambda net, x: net.pool(net.first(x)), "max_pool2d"),
        (twice_read, "max_pool2d"),
        (written_and_read, "max_pool2d"),
        (relu_read_twice, "max_pool2d"),
        (lambda net, x: F.max_pool2d(net.first(x), 2, return_indices=True)[0], None),
        (lambda net, x: F.max_pool2d(net.first(x).transpose(2, 3), 2), None),
        (lambda net, x: F.max_pool2d(net.first(x), x.shape[2] // 2), None),
    ],
)
def test_pools_are_replaced(code, replaced):
    network = Pool(code).eval()
    x = torch.randn(2, 3, 12, 12)
    fast = tenfold.optimize(network, x, choose="packed")
    assert fast.plan.replaced == ({replaced: 1} if replaced else {})
    assert (max_pool2d in called(fast)) == bool(replaced)
    for shape in ((2, 3, 12, 12), (1, 3, 17, 20)):
        y = torch.randn(shape)
        assert relative(fast(y), network(y)) < 1e-5
        last = y.to(memory_format=torch.channels_last)
        assert relative(fast(last), network(y)) < 1e-5


class Mean(nn.Module):
    def __init__(self, code):
        super().__init__()
        self.first = pruned(nn.Conv2d(4, 8, 3), (2, 4))
        self.mean, self.four = nn.AdaptiveAvgPool2d((1, 1)), nn.AdaptiveAvgPool2d(2)
        self.code = code

    def forward(self, x):
        return self.code(self, self.first(x)).flatten(1)


@pytest.mark.parametrize(
    ("code", "replaced"),
    [
        (lambda net, x: net.mean(x), 1),
        (lambda net, x: F.adaptive_avg_pool2d(x, 1), 1),
        (lambda net, x: F.adaptive_avg_pool2d(x, output_size=(1, 1)), 1),
        (lambda net, x: net.four(x), 0),
        (lambda net, x: F.adaptive_avg_pool2d(x, (1, None)), 0),
    ],
)
def test_means_are_replaced(code, replaced):
    network, x = Mean(code).eval(), torch.randn(2, 4, 9, 8)
    fast = tenfold.optimize(network, x, choose="packed")
    assert fast.plan.replaced == ({"mean_pool": 1} if replaced else {})
    y = torch.randn(1, 4, 12, 20)
    assert relative(fast(y), network(y)) < 1e-5


class Norm(nn.Module):
    def __init__(self, code, **options):
        super().__init__()
        self.first = pruned(nn.Linear(8, 12), (2, 4))
        self.norm = nn.LayerNorm(12, **options)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)
        self.code = code

    def forward(self, x):
        return self.code(self, self.first(x))


@pytest.mark.parametrize(
    ("code", "options", "replaced"),
    [
        (lambda net, x: net.norm(x), {}, 1),
        (lambda net, x: net.norm(x), {"bias": False, "eps": 1e-3}, 1),
        (lambda net, x: net.norm(x), {"elementwise_affine": False}, 1),
        (lambda net, x: F.layer_norm(x, (12,)), {}, 1),
        (lambda net, x: F.layer_norm(x, [12], net.norm.weight, net.norm.bias, 0.1), {}, 1),
        (lambda net, x: F.layer_norm(x, [12], bias=net.norm.bias), {}, 1),
        (lambda net, x: net.norm(net.norm(x)), {}, 2),
        (lambda net, x: F.layer_norm(x, (5, 12)), {}, 0),
        (lambda net, x: F.layer_norm(x, (12,), net.norm.weight * 2), {}, 0),
    ],
)
def test_norms_are_replaced(code, options, replaced, tmp_path):
    network, x = Norm(code, **options).eval(), torch.randn(2, 5, 8)
    fast = tenfold.optimize(network, x, choose="packed")
    assert fast.plan.replaced == ({"layer_norm": replaced} if replaced else {})
    y = torch.randn(3, 5, 8)
    assert relative(fast(y), network(y)) < 1e-5
    assert set(fast.network.state_dict()) >= {f"norm.{k}" for k in network.norm.state_dict()}
    again = tenfold.load(tenfold.save(fast, tmp_path / "fast"), Norm(code, **options))
    assert again.plan == fast.plan
    assert torch.equal(again(y), fast(y))


def transformer():
    import timm

    options = {"img_size": 32, "depth": 2, "num_classes": 10}
    return timm.create_model("deit_tiny_patch16_224", **options)


def residual():
    import timm

    return timm.create_model("resnet18", num_classes=10)


@pytest.mark.parametrize(
    ("make", "replaced"),
    [
        (transformer, {"layer_norm": 5, "attention": 2}),
        (residual, {"relu and max_pool2d": 1, "mean_pool": 1}),
    ],
)
def test_saved_and_loaded(make, replaced, tmp_path):
    network = pruned(make().eval(), (2, 4))
    x = torch.randn(2, 3, 32, 32)
    fast = tenfold.optimize(network, x, choose="packed")
    assert fast.plan.replaced == replaced
    assert fast.plan.reason is None
    kinds = ", ".join(f"{kind} ({count})" for kind, count in replaced.items())
    assert f"own kernels also for: {kinds}" in str(fast.plan)
    path = tenfold.save(fast, tmp_path / "fast")
    again = tenfold.load(path, make())
    assert again.plan == fast.plan
    assert called(again) == called(fast)
    assert torch.equal(again(x), fast(x))


def test_other_nodes_are_not_made_up(tmp_path, monkeypatch):
    network = Attend().eval()
    x = torch.randn(2, 9, 16)
    fast = tenfold.optimize(network, x, choose="packed")
    path = tenfold.save(fast, tmp_path / "fast")
    with monkeypatch.context() as patch:
        patch.setattr(dense, "_matches", lambda _: [])
        again = tenfold.load(path, Attend())
    assert "loaded without attention: the network's code leads to" in again.plan.reason
    assert again.plan.replaced == {}
    assert torch.allclose(again(x), fast(x), atol=1e-5)
    # and a network that has none
    edits = json.loads((path / "model.json").read_text())["edits"]
    assert {"module": "", "type": "Replaced", "arguments": {"nodes": {
        "scaled_dot_product_attention": "attention"
    }}} in edits  # fmt: skip
    for nodes in (None, ["a"], {"a": 1}):
        edit = {"module": "", "type": "Replaced", "arguments": {"nodes": nodes}}
        with pytest.raises(UserError, match="expected names and their kinds"):
            replaced_nodes([edit])
    with pytest.raises(UserError, match="doesn't fit"):
        replay(Attend(), [{"module": "qkv", "type": "Replaced", "arguments": {"nodes": {}}}])


@pytest.fixture
def with_kernels(monkeypatch):
    """Without any, timing is left out."""
    monkeypatch.setattr(dense.native, "missing", lambda: None)


def test_the_faster_one_is_taken(monkeypatch, with_kernels):
    network, x = Attend().eval(), torch.randn(2, 9, 16)
    times = {"theirs": 2.0}
    monkeypatch.setattr(dense, "interleave", lambda calls, _: {n: [times[n]] for n in calls})
    for ours, expected in ((1.0, {"scaled_dot_product_attention": "attention"}), (3.0, {})):
        times["ours"] = ours
        graph, _ = fuse(network, (x,))
        assert dense.replace_dense(graph, (x,), "time") == expected
        assert dense.replace_dense(graph, (x,), "time") == {}
        assert torch.allclose(graph(x), network(x), atol=1e-5)


def test_timing_runs_both(with_kernels):
    network = Pool(lambda net, x: net.pool(net.writing(net.first(x)))).eval()
    x = torch.randn(1, 3, 8, 8)
    graph, _ = fuse(network, (x,))
    assert dense.replace_dense(graph, (x.to("meta"),), "packed") == {}
    assert dense.replace_dense(graph, (x,), "time") in ({}, {"pool": "relu and max_pool2d"})
    assert torch.allclose(graph(x), network(x), atol=1e-6)


def test_without_kernels_nothing_is_replaced_by_time(monkeypatch):
    monkeypatch.setattr(dense.native, "missing", lambda: "no compiler")
    network, x = Attend().eval(), torch.randn(2, 9, 16)
    graph, _ = fuse(network, (x,))
    assert dense.replace_dense(graph, (x,), "time") == {}
