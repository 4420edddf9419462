"""L-MCM by the Triton kernels against float64: precisions, images across tiles, splits, NaN."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastood.kernels import patches
from fastood.kernels.configs import Config
from fastood.kernels.operands import Operand, prepare
from fastood.kernels.patches import local_scores, local_similarity_scores
from fastood.kernels.precision import PRECISIONS
from tests import tolerances
from tests.conftest import clip_like
from tests.kernels.test_rows import as_multiplied

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TAUS = (0.01, 0.1, 1.0)


@pytest.fixture(params=[1, 2], ids=["whole", "split"])
def splits(request, monkeypatch) -> int:
    """Classes in the hands of one program or shared by two, in small tiles where interpreted."""
    config = Config(32, 32, 64, 4, 2, splits=request.param)  # two tiles of classes and more
    monkeypatch.setattr(patches, "pick", lambda *_, **__: config)
    return request.param


def features(b, p, k, d, seed=0):
    local, text, _ = clip_like(b * p, k, d, seed=seed)
    return local.view(b, p, d), text


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def exact(taus, similarity):
    s = similarity.double()
    return torch.stack([(s / tau).softmax(dim=-1).amax(dim=(-1, -2)) for tau in taus])


def scores(local, text, precision, device, *, taus=TAUS, normalize=True):
    operand = prepare(text.to(device), precision, normalize=normalize)
    return local_scores(taus, local.to(device), operand, normalize=normalize).cpu()


# (B, P, K, D): images of many tiles, of one and a bit, several in a tile, one class, one patch
SHAPES = [(1, 40, 65, 20), (2, 49, 33, 70), (5, 9, 40, 17), (37, 1, 31, 8), (2, 3, 1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_grade(device, splits, shape):
    local, text = features(*shape)
    want = exact(TAUS, unit(local.double()) @ unit(text.double()).mT)
    for precision in ("fp16x3", "fp32"):
        found = scores(local, text, precision, device)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.double(), want, rtol=tolerances.SCORE_FROM_FEATURES_RTOL, atol=0
        )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions_round_features_and_nothing_else(device, splits, precision):
    local, text = features(3, 11, 40, 48)
    local, text = (as_multiplied(unit(x), precision).float() for x in (local, text))
    want = exact(TAUS, local.double() @ text.double().mT)
    for x in (local, local.to(HALVES.get(precision, torch.float32))):
        found = scores(x, text, precision, device, normalize=False)
        torch.testing.assert_close(
            found.double(), want, rtol=tolerances.SCORE_FROM_FEATURES_RTOL, atol=0
        )


@pytest.mark.parametrize("dtype", HALVES.values())
def test_half_precision_patches_of_any_norm(device, splits, dtype):
    local, text = features(3, 11, 40, 48)
    local = local.to(dtype)
    want = exact(TAUS, unit(local.double()) @ unit(text.double()).mT)
    found = scores(local, text, "fp16x3", device)
    torch.testing.assert_close(
        found.double(), want, rtol=tolerances.SCORE_FROM_FEATURES_RTOL, atol=0
    )


@pytest.mark.parametrize("shape", [(3, 19, 33), (2, 4, 1), (9, 1, 50), (1, 40, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_given_similarities(device, splits, shape, dtype):
    s = (0.2 + 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = local_similarity_scores(TAUS, s.to(device)).cpu()
    torch.testing.assert_close(found.double(), exact(TAUS, s), rtol=tolerances.SCORE_RTOL, atol=0)
    apart = torch.stack([s, -s], dim=-1)[..., 0].to(device)
    assert torch.equal(local_similarity_scores(TAUS, apart).cpu(), found)


def test_committed_tiles(device):
    """As above, with what ``pick`` gives."""
    local, text = features(2, 30, 40, 32)
    want = exact((1.0,), unit(local.double()) @ unit(text.double()).mT)
    for precision in ("fp16x3", "fp32"):
        found = scores(local, text, precision, device, taus=(1.0,))
        torch.testing.assert_close(found.double(), want, rtol=tolerances.SCORE_RTOL, atol=0)


def test_strides(device, splits):
    local, text = features(3, 10, 20, 16)
    want = scores(local, text, "fp32", device)
    beside = torch.cat([local, -local], dim=-1)[..., :16]
    among = torch.cat([local, -local], dim=1)[:, :10]
    turned = local.transpose(0, 1).contiguous().transpose(0, 1)
    apart = torch.stack([local, -local], dim=-1)[..., 0]
    for x in (beside, among, turned, apart):
        assert torch.equal(scores(x, text, "fp32", device), want)
    one = local[:, :1].to(device).expand(-1, 10, -1)
    assert torch.equal(
        scores(one, text, "fp32", device), scores(local[:, :1], text, "fp32", device)
    )


def test_temperatures_do_not_mix(device, splits):
    """More than one launch takes; each as when it comes alone."""
    local, text = features(3, 10, 40, 16)
    taus = (0.01, 0.02, 0.05, 0.1, 0.5, 1.0)
    together = scores(local, text, "fp32", device, taus=taus)
    for tau, found in zip(taus, together, strict=True):
        assert torch.equal(scores(local, text, "fp32", device, taus=(tau,))[0], found)


def test_the_same_bits_again(device, splits):
    local, text = features(5, 9, 40, 16)
    assert torch.equal(scores(local, text, "fp16x3", device), scores(local, text, "fp16x3", device))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0])
@pytest.mark.parametrize("p", [1, 7])
def test_bad_patches_make_their_image_nan(device, splits, bad, p):
    local, text = features(9, p, 40, 16)
    want = scores(local, text, "fp16x3", device)
    local[3, p // 2] = bad
    found = scores(local, text, "fp16x3", device)
    assert found[:, 3].isnan().all()
    others = [i for i in range(9) if i != 3]
    assert torch.equal(found[:, others], want[:, others])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_similarities_make_their_image_nan(device, splits, bad):
    s = torch.rand(4, 5, 40, generator=torch.Generator().manual_seed(0))
    s[2, 3, 37] = bad
    found = local_similarity_scores((0.1, 1.0), s.to(device)).cpu()
    assert found[:, 2].isnan().all() and not found[:, [0, 1, 3]].isnan().any()


def test_bad_classes_make_everything_nan(device, splits):
    local, text = features(3, 4, 40, 16)
    text[35, 2] = float("nan")
    assert scores(local, text, "fp16x3", device).isnan().all()


def test_no_images(device, splits):
    local, text = features(1, 4, 5, 16)
    assert scores(local[:0], text, "fp16x3", device).shape == (3, 0)
    assert local_similarity_scores(TAUS, torch.empty(0, 4, 5, device=device)).shape == (3, 0)


def test_equal_classes_and_sure_patches(device, splits):
    local = torch.eye(8)[None, :5]
    text = torch.eye(8).repeat(5, 1)
    found = scores(local, text, "fp32", device, taus=(0.001,))
    assert found.item() == pytest.approx(0.2, rel=1e-6)
    assert scores(local, torch.eye(8), "fp32", device, taus=(1e-5, 1e-42)).tolist() == [[1.0]] * 2


def test_nothing_of_the_size_of_the_similarities(monkeypatch):
    """256 images of 196 patches and 1,000 classes, four temperatures: below a megabyte."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.size += out.numel() * out.element_size() if "empty" in str(function) else 0
            return out

    text, local = torch.empty(1000, 4), torch.empty(256, 196, 4)
    monkeypatch.setattr(patches, "launch", lambda *_, **__: None)
    config = Config(64, 64, 64, 4, 2, splits=1)
    monkeypatch.setattr(patches, "pick", lambda *_, **__: config)
    with Largest() as seen:
        local_scores((0.1, 0.2, 0.5, 1.0), local, Operand("fp32", text), normalize=True)
    assert 0 < seen.size < 1 << 20
