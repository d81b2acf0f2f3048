"""Optimized networks: same outputs, right layers packed and fused, the argument untouched."""

import copy
import json
import threading
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tenfold
from tenfold.deploy import choose
from tenfold.deploy import optimize as module
from tenfold.deploy.optimized import largest_difference
from tenfold.deploy.plan import OptimizePlan
from tenfold.errors import UserError
from tenfold.kernels import native
from tenfold.measure.onnx_write import write_onnx
from tenfold.nn.cifar_resnet import CifarResNet
from tenfold.nn.packed import NMConv2d, NMLinear
from tests.pruning import pruned, relative, settled

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def fused(fast):
    return Counter(row.fused for row in fast.plan.packed)


def resnet18():
    import torchvision

    return torchvision.models.resnet18(num_classes=10), 32, 48


def resnet50():
    import timm

    return timm.create_model("resnet50", num_classes=10, zero_init_last=False), 32, 48


def mobilenet():
    import torchvision

    return torchvision.models.mobilenet_v2(num_classes=10), 32, 64


def transformer():
    import timm

    options = {"img_size": 32, "depth": 2, "num_classes": 10, "dynamic_img_size": False}
    return timm.create_model("deit_tiny_patch16_224", **options), 32, 32


NETWORKS = {
    # packed, and what they took in
    resnet18: (20, {"relu": 8, "add, relu": 8, None: 4}),
    resnet50: (53, {"relu": 32, "add, relu": 16, None: 5}),
    mobilenet: (35, {"relu6": 17, "add": 10, None: 8}),
    transformer: (9, {"gelu": 2, "add": 4, None: 3}),
    lambda: (CifarResNet(20), 32, 40): (19, {"relu": 9, "add, relu": 9, None: 1}),
}


@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
def test_real_networks(make):
    packed, epilogues = NETWORKS[make]
    network, size, other = make()
    network = pruned(settled(network), (2, 4), (1, 4), (2, 8))
    before = copy.deepcopy(network.state_dict())
    fast = tenfold.optimize(network.train(), torch.randn(2, 3, size, size), choose="packed")
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert fast.plan.reason is None
    assert 0 <= fast.plan.difference < 1e-5
    assert len(fast.plan.packed) == packed
    assert fused(fast) == epilogues
    network.eval()
    with torch.inference_mode():
        for shape in ((1, 3, size, size), (3, 3, other, size)):
            x = torch.randn(shape).to(memory_format=torch.channels_last)
            expected = copy.deepcopy(network).double()(x.double())
            assert relative(fast(x), expected) < 1e-5


def test_mixed_patterns_and_precisions():
    network = pruned(settled(CifarResNet(8)), (2, 4), (1, 8), (3, 4))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(x)
    worst = {}
    for precision in ("float32", "bfloat16", "int8"):
        fast = tenfold.optimize(network, x, precision, choose="packed")
        assert {row.pattern for row in fast.plan.packed} == {"2:4", "1:8", "3:4"}
        types = {layer.values.dtype for layer in fast.modules() if isinstance(layer, NMConv2d)}
        assert types == {getattr(torch, precision)}
        worst[precision] = relative(fast(x), expected)
        assert fast.plan.difference == pytest.approx(worst[precision])
    assert worst["float32"] < 1e-5 < worst["bfloat16"] < 0.05
    assert 1e-4 < worst["int8"] < 0.1


# -- the graph -------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two 2:4 convolutions and a code of one's own between them."""

    def __init__(self, code):
        super().__init__()
        self.a = pruned(nn.Conv2d(8, 8, 3, padding=1), (2, 4))
        self.b = pruned(nn.Conv2d(8, 8, 1), (2, 4))
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.code = code

    def forward(self, x):
        return self.code(self, x)


def twice(net, x):
    y = net.a(x)
    return F.relu(y) + y


def iadd(net, x):
    y = net.a(x)
    y += x
    return F.silu(y)


def writes_between(net, x):
    y = net.a(x)
    x = x + 0.0
    z = x * 1.0
    y2 = net.b(z)
    z.mul_(2.0)
    return y2 + z + y


def writes_into_other(net, x):
    z = x * 1.0
    y = z.add_(net.a(x))
    return net.b(x) + y


def activation_before_sum(net, x):
    return F.relu(net.a(x)) + net.b(x)


def called_twice(net, x):
    return F.relu(net.a(F.relu(net.a(x))))


CODES = [
    # code, epilogues of a and b
    (lambda net, x: net.b(net.act(net.a(x))), ("relu", None)),
    (lambda net, x: F.gelu(net.drop(net.a(x))), ("gelu", None)),
    (lambda net, x: F.gelu(net.a(x), approximate="tanh"), (None, None)),
    (lambda net, x: F.dropout(net.a(x), 0.3, net.training).relu_(), ("relu", None)),
    (lambda net, x: F.dropout(net.a(x), 0.0, True).relu(), (None, None)),
    (lambda net, x: torch.add(net.a(x), x), ("add", None)),
    (lambda net, x: torch.add(net.a(x), x, alpha=2), (None, None)),
    (lambda net, x: net.a(x).add_(x).relu_(), ("add, relu", None)),
    (lambda net, x: net.a(x).add(x, alpha=0.5), (None, None)),
    (lambda net, x: net.a(x) + net.b(x), (None, "add")),
    (lambda net, x: net.a(x) + net.scale, (None, None)),  # broadcast
    (lambda net, x: F.relu(F.relu(net.a(x)) + x), ("relu", None)),
    (lambda net, x: net.a(x) + 1.0, (None, None)),
    (lambda net, x: F.relu6(x + net.a(x)), ("add, relu6", None)),
    (twice, (None, None)),
    (iadd, ("add, silu", None)),
    (writes_between, (None, None)),
    (writes_into_other, (None, "add")),
    (activation_before_sum, ("relu", "add")),
    (called_twice, (None, None)),
]


@pytest.mark.parametrize(("code", "expected"), CODES, ids=range(len(CODES)))
def test_only_what_may_be_fused_is_fused(code, expected):
    network = Net(code).eval()
    x = torch.randn(2, 8, 6, 6)
    fast = tenfold.optimize(network, x, choose="packed")
    rows = {row.layer: row.fused for row in fast.plan.layers}
    assert (rows["a"], rows["b"]) == expected
    assert fast.plan.reason is None
    for shape in ((1, 8, 4, 5), (3, 8, 6, 6)):
        x = torch.randn(shape)
        kept = x.clone()
        with torch.no_grad():
            wanted = network(x.clone())
        assert torch.allclose(fast(x), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(x, kept)


def test_a_graph_that_forgets_an_alias_is_found_out():
    """`torch.fx` records `z += …` as a sum of its own, which `w` doesn't see."""

    def aliased(net, x):
        w = z = net.a(x)
        z += x
        return w * net.b(w)

    network = Net(aliased).eval()
    x = torch.randn(2, 8, 6, 6)
    fast = tenfold.optimize(network, x, choose="packed")
    assert "given up, packed" in fast.plan.reason
    assert len(fast.plan.packed) == 2
    with torch.no_grad():
        assert torch.allclose(fast(x), network(x), atol=1e-5)


def test_operands_that_are_equal_in_shape_on_the_example_alone():
    """With one image the sum has equal shapes; with more it's a broadcast, and must stay right."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = pruned(nn.Linear(8, 8), (1, 4))
            self.positions = nn.Parameter(torch.randn(1, 5, 8))

        def forward(self, x):
            return self.embed(x) + self.positions

    network = Positions()
    fast = tenfold.optimize(network, torch.randn(1, 5, 8), choose="packed")
    x = torch.randn(4, 5, 8)
    with torch.no_grad():
        assert torch.allclose(fast(x), network(x), atol=1e-6)


def test_a_module_that_cannot_be_traced_is_kept_whole():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pruned(nn.Linear(8, 8), (2, 4))

        def forward(self, x):
            return self.inner(x).relu() if float(x.sum()) > 0 else self.inner(-x)

    network = nn.Sequential(pruned(nn.Linear(8, 8), (2, 4)), nn.ReLU(), Branches())
    fast = tenfold.optimize(network, torch.randn(2, 8), choose="packed")
    assert [(row.layer, row.fused) for row in fast.plan.packed] == [
        ("0", "relu"),
        ("2.inner", None),
    ]
    for sign in (1.0, -1.0):
        x = sign * torch.rand(3, 8)
        assert torch.allclose(fast(x), network(x), atol=1e-6)


def test_a_network_that_cannot_be_traced_is_packed_without_fusion():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = pruned(nn.Linear(8, 8), (2, 4))

        def forward(self, x, mask=None):
            y = self.a(x).relu()
            return y if float(x.sum()) > 0 else -y

    network = Branches()
    fast = tenfold.optimize(network, torch.rand(2, 8), choose="packed")
    assert isinstance(fast.network.a, NMLinear)
    assert fused(fast) == {None: 1}
    assert "nothing is fused" in fast.plan.reason
    x = -torch.rand(3, 8)
    assert torch.allclose(fast(x), network(x), atol=1e-6)


def test_optional_arguments_and_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = pruned(nn.Linear(8, 8), (2, 4))

        def forward(self, x, y, mask=None, scale=2.0):
            out = torch.relu(self.a(x) + y) * scale
            return {"out": out, "first": out[0]} if mask is None else out * mask

    network = Two()
    fast = tenfold.optimize(network, (torch.rand(2, 8), torch.rand(2, 8)), choose="packed")
    assert fused(fast) == {"add, relu": 1}
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    assert torch.allclose(fast(x, y)["out"], network(x, y)["out"], atol=1e-6)
    with pytest.raises(TypeError):
        fast(x, y, torch.ones(8))


# -- what stays dense ------------------------------------------------------------------------------


def test_layers_that_stay_dense_say_why():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            make = lambda **options: pruned(nn.Conv2d(8, 8, 3, **options), (2, 4))  # noqa: E731
            self.reflect = make(padding=1, padding_mode="reflect")
            self.dense = nn.Conv2d(8, 8, 1)
            self.twin = make(padding=1)
            self.brother = self.twin
            self.tied, self.other = make(padding=1), make(padding=1)
            self.other.weight = self.tied.weight
            self.unused = make()
            self.kept = make(padding="same")

        def forward(self, x):
            x = self.brother(self.twin(self.dense(self.reflect(x))))
            return self.kept(self.other(self.tied(x)))

    network = Odd().eval()
    x = torch.randn(1, 8, 6, 6)
    fast = tenfold.optimize(network, x, choose="packed")
    reasons = {row.layer: row.reason for row in fast.plan.layers}
    assert "padding_mode" in reasons["reflect"]
    assert reasons["dense"] == "no N:M pattern"
    assert "several names: twin, brother" in reasons["twin"]
    assert "shared with another layer" in reasons["tied"]
    assert "not called" in reasons["unused"]
    assert [row.layer for row in fast.plan.packed] == ["kept"]
    assert torch.allclose(fast(x), network(x), atol=1e-6)
    assert "padding_mode='reflect'" in str(fast.plan)
    double = tenfold.optimize(network.double(), x.double(), choose="packed")
    assert "torch.float64" in {row.layer: row for row in double.plan.layers}["kept"].reason
    assert torch.allclose(double(x.double()), network(x.double()))


def test_wrong_outputs_are_not_returned(monkeypatch):
    network = pruned(settled(CifarResNet(8)), (2, 4))
    x = torch.randn(2, 3, 32, 32)
    original = module.fuse

    def broken(network, inputs):
        graph, epilogues = original(network, inputs)
        graph.get_submodule("layer1.0.conv1").activation = "silu"
        return graph, epilogues

    monkeypatch.setattr(module, "fuse", broken)
    fast = tenfold.optimize(network, x, choose="packed")
    assert "given up, packed and fused: the outputs differ by" in fast.plan.reason
    assert fused(fast) == {None: 7}
    assert relative(fast(x), network(x)) < 1e-5

    def damaged(layer, precision):
        packed = original_pack(layer, precision)
        packed.values.view(-1)[0] += 1.0
        return packed

    original_pack = choose.pack
    monkeypatch.setattr(choose, "pack", damaged)
    fast = tenfold.optimize(network, x, choose="packed")
    assert fast.plan.packed == ()
    assert fast.plan.reason.count("given up") == 2
    assert relative(fast(x), network(x)) < 1e-5


def test_without_kernels_nothing_is_packed_by_time(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: "the compiled extension is missing")
    network = pruned(settled(CifarResNet(8)), (2, 4))
    fast = tenfold.optimize(network, torch.randn(1, 3, 32, 32))
    assert fast.plan.packed == ()
    assert "nothing is packed: the compiled extension is missing: install" in fast.plan.reason
    assert len(fast.plan.folded) == 7


def test_the_faster_form_is_chosen(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: None)
    timed = []

    def layer_times(layer, packed):
        timed.append(layer.name)
        return (1.0, 0.5) if layer.module.kernel_size == (3, 3) else (1.0, 1.5)

    monkeypatch.setattr(choose, "time_layer", layer_times)
    monkeypatch.setattr(
        module, "time_networks", lambda networks, _: {n: 1.0 + ("dense" in n) for n in networks}
    )
    network = pruned(settled(CifarResNet(14, shortcut="B")), (2, 4))
    network.fc = nn.Linear(64, 10)
    x = torch.randn(2, 3, 32, 32)
    fast = tenfold.optimize(network, x)
    assert len(fast.plan.packed) == 12
    assert all(".conv" in row.layer for row in fast.plan.packed)
    assert {row.dense_ms for row in fast.plan.packed} == {1.0}
    assert timed.count("layer1.0.conv1") == 1
    assert "layer1.1.conv2" not in timed  # equal sizes
    assert fast.plan.network_ms["packed"] == 1.0
    assert relative(fast(x), network(x)) < 1e-5
    # a network that is faster dense as a whole stays so
    monkeypatch.setattr(
        module, "time_networks", lambda networks, _: {n: 1.0 - ("dense" in n) / 2 for n in networks}
    )
    fast = tenfold.optimize(network, x)
    assert fast.plan.packed == ()
    assert "faster dense" in fast.plan.reason
    assert relative(fast(x), network(x)) < 1e-5


def test_times_are_measured():
    layer = choose.Layer("a", pruned(nn.Conv2d(8, 8, 3), (1, 4)), (1, 4), (1, 8, 12, 12), None)
    dense, packed = choose.time_layer(layer, NMConv2d.from_dense(layer.module, 1, 4))
    assert 0 < dense < 1000
    assert 0 < packed < 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "float16"}, "unknown precision 'float16'"),
        ({"choose": "fast"}, "unknown choose 'fast'"),
        ({"example_inputs": torch.zeros(1, 4)}, "the model fails on the example inputs"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {"model": nn.Linear(8, 2), "example_inputs": torch.zeros(1, 8), **change}
    with pytest.raises(UserError, match=message):
        tenfold.optimize(**arguments)


def test_twice_is_refused():
    fast = tenfold.optimize(pruned(nn.Linear(8, 2), (2, 4)), torch.zeros(1, 8), choose="packed")
    with pytest.raises(UserError, match="optimized already"):
        tenfold.optimize(fast, torch.zeros(1, 8))


# -- what the result can do ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    network = pruned(settled(CifarResNet(8)), (2, 4))
    return network, tenfold.optimize(network, torch.randn(2, 3, 32, 32), choose="packed")


def test_the_plan_is_json(pair):
    plan = pair[1].plan
    again = OptimizePlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    text = str(plan)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert (
        "layer1.0.conv2  Conv2d  2:4      2x16x32x32  -         -          packed  add, relu"
        in text
    )
    assert "7 of 8 layers packed" in text
    with pytest.raises(UserError, match="not the plan"):
        OptimizePlan.from_dict({"layers": [{}]})


def test_copies_and_modes(pair):
    network, fast = pair
    x = torch.randn(3, 3, 24, 24)
    copied = copy.deepcopy(fast).train()
    assert not any(part.training for part in copied.modules())
    assert copied.plan == fast.plan
    with torch.inference_mode():
        assert torch.equal(copied(x), fast(x))
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert "7 of 8 layers packed" in repr(fast)
    assert largest_difference((fast(x),), (network(x),)) < 1e-5
    assert largest_difference((x,), (x[:1],)) == float("inf")


def test_calls_from_several_threads(pair):
    fast = pair[1]
    inputs = [torch.randn(1 + i % 3, 3, 32, 32) for i in range(8)]
    expected = [fast(x) for x in inputs]
    found = [None] * len(inputs)

    def work(i):
        for _ in range(3):
            found[i] = fast(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_export_and_compile(pair, tmp_path):
    fast = pair[1]
    x = torch.randn(2, 3, 32, 32)
    batch = torch.export.Dim("batch")
    program = torch.export.export(fast, (x,), dynamic_shapes={"args": ({0: batch},)})
    assert "tenfold.nm_conv2d" in str(program.graph)
    torch.export.save(program, tmp_path / "fast.pt2")
    y = torch.randn(5, 3, 32, 32)
    loaded = torch.export.load(tmp_path / "fast.pt2").module()
    assert torch.allclose(loaded(y), fast(y), atol=1e-5)
    with torch.no_grad():
        compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), fast(x), atol=1e-5)
    torch.compiler.reset()


def test_the_bench_takes_it(pair, tmp_path):
    network, fast = pair
    x = torch.randn(1, 3, 32, 32)
    result = tenfold.bench(
        {"dense": network, "fast": fast}, x, batch_sizes=[1], runtimes=["pytorch"], seconds=0.01
    )
    assert {row.model for row in result.latency} == {"dense", "fast"}
    dense, packed = result.size["dense"], result.size["fast"]
    assert packed.macs == dense.macs
    assert packed.effective_macs == pytest.approx(dense.effective_macs, rel=1e-3)
    assert packed.dense_bytes < dense.dense_bytes
    result = tenfold.bench({"fast": fast}, x, batch_sizes=[1], runtimes=["openvino"], seconds=0.01)
    assert "packed for this CPU" in result.skipped[0].reason
    with pytest.raises(UserError, match="packed for this CPU"):
        write_onnx(fast, tmp_path / "fast.onnx", x)
