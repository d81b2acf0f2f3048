"""FID and KID against hand cases, scipy, torchmetrics and torch-fidelity."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn

from tenfold.errors import UserError
from tenfold.measure.generation import (
    Distances,
    extract,
    feature_distances,
    frechet_distance,
    generation_distances,
    inception_extractor,
    kernel_distance,
    module_extractor,
    state_hash,
    to_uint8,
)

pytestmark = pytest.mark.unit


def vectors(count: int, dimensions: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator)
    return torch.randn(count, dimensions, generator=generator) @ mixing + shift


def stored(count: int, seed: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, 12, 12), dtype=torch.uint8, generator=generator)


class Vectors(nn.Module):
    def __init__(self, dimensions: int = 5):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, dimensions, 3)

    def forward(self, images):
        return self.convolution(images).mean(dim=(2, 3))


# -- Fréchet distance ------------------------------------------------------------------------------


def test_frechet_of_gaussians_on_a_line():
    """Means 1 and 5, variances 2 and 8: (5 - 1)^2 + (8^0.5 - 2^0.5)^2 = 18."""
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [7.0]])
    assert frechet_distance(a, b) == pytest.approx(18, abs=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("counts", [(40, 60), (200, 150)])
def test_frechet_is_that_of_the_matrix_root(counts):
    from scipy.linalg import sqrtm

    a = vectors(counts[0], 12, 1).double().numpy()
    b = vectors(counts[1], 12, 2, shift=0.3).double().numpy()
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    difference = a.mean(0) - b.mean(0)
    expected = difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root)
    found = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parity
def test_frechet_is_torch_fidelitys():
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = vectors(50, 8, 1).double(), vectors(70, 8, 2, shift=1).double()
    statistics = [fidelity.fid_features_to_statistics(each) for each in (a, b)]
    theirs = fidelity.fid_statistics_to_metric(*statistics, verbose=False)
    expected = theirs[fidelity.KEY_METRIC_FID]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_fewer_vectors_than_dimensions():
    """Orthogonal spreads have a root of zero: what is left are the traces."""
    a, b = torch.zeros(3, 200), torch.zeros(3, 200)
    a[0, 0], a[1, 0] = 3, -3  # variance 9
    b[0, 1], b[1, 1] = 1, -1  # variance 1
    assert frechet_distance(a, b) == pytest.approx(10, rel=1e-12)
    # a turn of both sets changes nothing
    turn = torch.linalg.qr(vectors(200, 200, 3).double()).Q
    x, y = vectors(20, 200, 1).double(), vectors(30, 200, 2).double()
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(frechet_distance(x, y), rel=1e-10)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9 * x.square().sum().item())
    # x and its double: every singular value doubles, so (2 - 1)^2 Tr S and the mean's
    mean = x.mean(0).square().sum().item()
    assert frechet_distance(x, 2 * x) == pytest.approx(x.var(0).sum().item() + mean, rel=1e-9)


# -- kernel distance -------------------------------------------------------------------------------


def test_kernel_distance_by_hand():
    """k(0,1) = 1, k(2,3) = 343, crosswise 1, 1, 27, 64."""
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    assert kernel_distance(a, b) == (1 + 343 - 2 * 93 / 4, None)


def test_kernel_distance_of_sets_of_other_counts_is_the_plain_double_sum():
    a, b = vectors(6, 3, 1).double(), vectors(9, 3, 2, shift=0.5).double()

    def kernel(x, y):
        return float((x @ y / 3 + 1) ** 3)

    def within(x):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
        return sum(kernel(x[i], x[j]) for i, j in pairs) / len(pairs)

    cross = sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))
    found, deviation = kernel_distance(a, b)
    assert found == pytest.approx(within(a) + within(b) - 2 * cross, rel=1e-12)
    assert deviation is None


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kernel_distance_is_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    extractor = module_extractor(Vectors(), "small")
    generated, reference = stored(30, 1), stored(30, 2) // 2

    def theirs(subsets, size):
        class Bare(nn.Module):
            def forward(self, images):
                return extractor(images).double().clone()

        metric = KernelInceptionDistance(Bare(), subsets=subsets, subset_size=size)
        metric.update(reference, real=True)
        metric.update(generated, real=False)
        return [float(value) for value in metric.compute()]

    a, b = extract(extractor, [generated]), extract(extractor, [reference])
    assert kernel_distance(a, b)[0] == pytest.approx(theirs(1, 30)[0], rel=1e-5)
    torch.manual_seed(0)
    mean, deviation = theirs(300, 12)
    ours = kernel_distance(a, b, subsets=300, size=12)
    assert ours[0] == pytest.approx(mean, abs=4 * deviation / 300**0.5)
    assert ours[1] == pytest.approx(deviation, rel=0.25)


def test_kernel_distance_is_unbiased_and_subsets_follow_the_seed():
    mixing = torch.randn(4, 4, generator=torch.Generator().manual_seed(9))
    estimates = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        both = torch.randn(24, 4, generator=generator) @ mixing / 2
        estimates.append(kernel_distance(both[:12], both[12:])[0])
    found = torch.tensor(estimates)
    assert abs(found.mean()) < 4 * found.std() / 200**0.5
    assert (found < 0).any()  # a biased estimate is never below 0
    a, b = vectors(40, 4, 1), vectors(40, 4, 2)
    first = kernel_distance(a, b, subsets=5, size=10, seed=1)
    assert first == kernel_distance(a, b, subsets=5, size=10, seed=1)
    assert first != kernel_distance(a, b, subsets=5, size=10, seed=2)


def test_sets_that_do_not_fit_are_refused():
    good = torch.randn(4, 3)
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(UserError, match="at least 2 images"):
            distance(good, good[:1])
        with pytest.raises(UserError, match="3 and 2 dimensions"):
            distance(good, good[:, :2])
        with pytest.raises(UserError, match="not finite"):
            distance(good, good / 0)
    with pytest.raises(UserError, match="subsets=0"):
        kernel_distance(good, good, subsets=0)


# -- images and extractors -------------------------------------------------------------------------


def test_images_are_clipped_and_truncated():
    images = torch.tensor([-2.0, -1.0, -0.995, 0.0, 0.5, 0.999, 1.0, 3.0])
    assert to_uint8(images).tolist() == [0, 0, 0, 127, 191, 254, 255, 255]
    with pytest.raises(UserError, match="not finite"):
        to_uint8(torch.tensor([0.0, math.nan]))
    with pytest.raises(UserError, match=r"torch\.uint8: expected floating point"):
        to_uint8(stored(1, 1))


def test_a_module_gets_images_in_minus_one_to_one_and_maps_are_pooled():
    class Maps(nn.Module):
        def forward(self, images):
            self.seen = images
            return [images, images[:, :2, ::2, ::2], images.amax(dim=(2, 3))]

    module = Maps()
    extractor = module_extractor(module, "maps")
    images = stored(2, 1)
    images[0, 0, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    found = extractor(images)
    assert module.seen[0, 0, 0, :2].tolist() == [-1, 1]
    assert torch.allclose(module.seen, images / 127.5 - 1, atol=1e-6)
    assert found.shape == (2, 3 + 2 + 3)
    assert torch.allclose(found[:, :3], module.seen.mean(dim=(2, 3)), atol=1e-6)


def test_an_extractors_own_features_are_taken_and_it_is_frozen():
    class Own(Vectors):
        def features(self, images):
            return super().forward(images) + 1

    module = Own().train()
    extractor = module_extractor(module, "own")
    images = stored(2, 1)
    assert torch.allclose(extractor(images), module(images / 127.5 - 1) + 1, atol=1e-5)
    assert not module.training
    assert not module.convolution.weight.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(images), module_extractor(module, "own")(images))


def test_grey_images_are_repeated_and_others_refused():
    extractor = module_extractor(Vectors(), "small")
    grey = stored(2, 1, channels=1)
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(UserError, match=r"images have 2 channels: the extractor small \w+ takes 3"):
        extractor(stored(2, 1, channels=2))
    with pytest.raises(UserError, match=r"expected torch\.uint8"):
        extractor(stored(2, 1).float())
    with pytest.raises(UserError, match=r"returned a tensor \(2, 3, 144\)"):
        module_extractor(nn.Flatten(2), "odd")(stored(2, 1))


def test_the_hash_is_of_the_weights_alone():
    one, other = Vectors(), Vectors()
    assert state_hash(one) == state_hash(other)
    assert len(state_hash(one)) == 64
    assert state_hash(one.to(memory_format=torch.channels_last)) == state_hash(other)
    with torch.no_grad():
        other.convolution.bias[0] += 1e-6
    assert state_hash(one) != state_hash(other)
    normed, moved = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    moved.running_mean += 1  # a buffer changes the space too
    assert state_hash(normed) != state_hash(moved)


# -- both together ---------------------------------------------------------------------------------


def test_distances_name_the_extractor_and_the_numbers_of_images():
    extractor = module_extractor(Vectors(), "small")
    images = stored(50, 1)
    found = generation_distances(extractor, images[:20].split(6), images[20:].split(7), seed=3)
    assert (found.images, found.reference_images, found.dimensions) == (20, 30, 5)
    assert found.extractor_hash == state_hash(extractor.network)
    a, b = extract(extractor, [images[:20]]), extract(extractor, [images[20:]])
    assert found.fid == pytest.approx(frechet_distance(a, b), rel=1e-4)
    assert found == feature_distances(
        extractor,
        extract(extractor, images[:20].split(6)),
        extract(extractor, images[20:].split(7)),
        seed=3,
    )
    text = str(found)
    assert text.startswith(f"FID[small {found.extractor_hash[:12]}, N=20 against 30] ")
    assert "KID[same] " in text
    assert Distances(**json.loads(json.dumps(found.to_dict()))) == found


def test_distances_in_words():
    shown = Distances(1234.56, -0.0012, 0.00034, 50, 50, 128, "stagenet", "0123456789abcdef" * 4)
    assert str(shown) == "FID[stagenet 0123456789ab, N=50] 1234.6, KID[same] -0.0012 ± 0.00034"


def test_worse_images_are_farther_away():
    extractor = module_extractor(Vectors(16), "small")
    real, near = stored(60, 1), stored(60, 2)
    far = near // 3
    close = generation_distances(extractor, [near], [real])
    distant = generation_distances(extractor, [far], [real])
    assert distant.fid > 10 * close.fid
    assert distant.kid > close.kid


def test_no_images_are_refused():
    extractor = module_extractor(Vectors(), "small")
    with pytest.raises(UserError, match=r"no images for the extractor small \w{12}"):
        generation_distances(extractor, [], [stored(4, 1)])


# -- Inception -------------------------------------------------------------------------------------


def inception_state() -> dict[str, torch.Tensor]:
    """Return random weights by the names of FID's Inception, without its constructor's loading."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Fresh(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            return None

    # a file to be read and thrown away
    import io

    buffer = io.BytesIO()
    torch.save({}, buffer)
    buffer.seek(0)
    torch.manual_seed(0)
    return Fresh("fresh", ["2048"], feature_extractor_weights_path=buffer).state_dict()


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_state(), path)
    return path


@pytest.mark.parity
def test_inception_is_torch_fidelitys_up_to_the_resizing(inception_file):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    extractor = inception_extractor(inception_file)
    assert extractor.name == "inception"
    theirs = FeatureExtractorInceptionV3(
        "theirs", ["2048"], feature_extractor_weights_path=str(inception_file)
    )
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8, generator=generator)
    found, expected = extractor(images), theirs(images)[0]
    assert found.shape == (1, 2048)
    # they divide (x - 128) by 128, pytorch-fid x by 127.5 less 1
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    small = images[:, :, :64, :64]
    scaled = nn.functional.interpolate(
        small / 255, (299, 299), mode="bilinear", align_corners=False
    )
    network = extractor.network.layers
    assert torch.allclose(extractor(small), network(2 * scaled - 1).flatten(1), atol=1e-5)


def test_missing_inception_weights_fail_at_once_in_one_line(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")

    def no_network(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(UserError) as caught:
        inception_extractor()
    message = str(caught.value)
    assert "\n" not in message
    expected = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    for part in (str(expected), "{name: inception, path: FILE}", "stagenet-extractor"):
        assert part in message


def test_other_inception_files_are_refused(tmp_path):
    pytest.importorskip("torch_fidelity")
    with pytest.raises(UserError, match=r"gone\.pth does not exist"):
        inception_extractor(tmp_path / "gone.pth")
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth has not the weights of FID's Inception v3"):
        inception_extractor(tmp_path / "other.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")  # a pickled module could run code
    with pytest.raises(UserError, match=r"module\.pth can't be read"):
        inception_extractor(tmp_path / "module.pth")


def test_without_torch_fidelity_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match=r"pip install 'tenfold\[fid\]'"):
        inception_extractor()


def test_importing_is_light():
    code = (
        "import sys, tenfold.measure.generation, tenfold.methods.perceptual\n"
        "found = {'torch_fidelity', 'torchmetrics', 'torchvision', 'scipy'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
