"""The grid over alpha and beta against the published loop, cell by cell, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench import peers_tuning
from fastood.tuning import tip_blocks
from fastood.tuning.tip_grid import count_right, grid_maxima, published_grid, search

BETAS, ALPHAS = published_grid()


def toy(n, k, shots, d=24, *, seed=0, spread=0.7, dtype=torch.float32):
    """Images, labels, texts, keys and their classes: neither source is right on its own."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64) / d**0.5

    counts = torch.as_tensor(shots).expand(k)
    common, prototypes = normal(d), normal(k, d)
    text = F.normalize(0.2 * prototypes + 3 * normal(d) + 0.4 * normal(k, d), dim=-1)
    owners = torch.arange(k).repeat_interleave(counts)
    keys = F.normalize(common + prototypes[owners] + spread * normal(len(owners), d), dim=-1)
    labels = torch.randint(k, (n,), generator=g)
    image = F.normalize(common + prototypes[labels] + spread * normal(n, d), dim=-1)
    return image.to(dtype), labels, text.to(dtype), keys.to(dtype), owners


def plain(image, labels, text, keys, owners, betas, alphas, gamma=100.0):
    """Counts of the published loop in float64."""
    one_hot = F.one_hot(owners, len(text)).double()
    z, t = (F.normalize(x.double(), dim=-1) for x in (image, text))
    cells = [(b, a) for b in betas for a in alphas]
    found = peers_tuning.tip_grid(z, labels, t, keys.double(), one_hot, cells, gamma)
    return torch.tensor(found).view(len(betas), len(alphas))


def test_published_grid_is_the_published_one():
    assert (len(BETAS), len(ALPHAS)) == (200, 20)
    assert BETAS[0] == ALPHAS[0] == 0.1
    assert BETAS[1] - BETAS[0] == pytest.approx(6.9 / 200)
    assert BETAS[-1] < 7 and ALPHAS[-1] < 3  # maxima are never reached
    assert grid_maxima("Stanford-Cars") == (20, 10) == grid_maxima("stanford_cars")
    assert grid_maxima("Food-101") == (10, 10) and grid_maxima("caltech-101") == (12, 5)
    assert grid_maxima() == (7, 3) == grid_maxima("something else")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_counts_are_those_of_the_loop(seed):
    data = toy(60, 13, 4, seed=seed)
    got = count_right(*data, BETAS, ALPHAS)
    assert got.unique().numel() > 5  # the cells differ
    assert torch.equal(got, plain(*data, BETAS, ALPHAS))


def test_trained_keys_need_not_have_unit_norm():
    image, labels, text, keys, owners = toy(60, 13, 4, seed=9)
    data = (image, labels, text, 1.7 * keys, owners)
    assert torch.equal(count_right(*data, BETAS[::9], ALPHAS), plain(*data, BETAS[::9], ALPHAS))


@pytest.mark.parametrize("chunk", [64, 1 << 15])
def test_counts_with_unequal_numbers_of_keys(monkeypatch, chunk):
    monkeypatch.setattr(tip_blocks, "_CHUNK", chunk)
    monkeypatch.setattr(tip_blocks, "_IMAGES", (16, 16))  # several blocks of images
    shots = torch.tensor([1, 5, 0, 3, 3, 16, 2, 1, 0, 4])
    image, labels, text, keys, owners = toy(75, 10, shots, seed=3)
    mixed = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
    data = (image, labels, text, keys[mixed], owners[mixed])
    for betas in (BETAS[::20], BETAS[::2]):  # one exp each; the series
        assert (tip_blocks._series(tuple(betas), 0.0, 1.0) is None) == (len(betas) == 10)
        alphas = ALPHAS[::3]
        assert torch.equal(count_right(*data, betas, alphas), plain(*data, betas, alphas))


def test_counts_with_few_shared_features_and_large_betas():
    """A large beta needs a longer series, a very large one none at all; both are the formula."""
    data = toy(40, 6, 3, seed=4, spread=3.0)
    for top in (20.0, 60.0, 4000.0):
        betas, alphas = published_grid(top, 10.0, steps=(40, 7))
        assert torch.equal(count_right(*data, betas, alphas), plain(*data, betas, alphas)), top


def test_a_series_stands_for_the_exponential():
    for betas, low, high in ((BETAS, 0.2, 0.6), (BETAS, 0.0, 2.0), (published_grid(20)[0], 0, 1.5)):
        series = tip_blocks._series(tuple(betas), low, high)
        assert series is not None and series.shape[1] < 60
        d = torch.linspace(low, high, 301, dtype=torch.float64)
        angles = torch.acos(((2 * d - low - high) / (high - low)).clamp(-1, 1))
        order = torch.arange(series.shape[1])[:, None]
        terms = torch.cos(angles * order) * (1 - 2 * (order % 4 >= 2).double())  # + + - -
        beta = torch.tensor(betas, dtype=torch.float64)[:, None]
        error = (series @ terms - torch.exp(-beta * d)).abs() / torch.exp(-beta * low)
        assert float(error.max()) < tip_blocks._ERROR


def test_ties_go_to_the_lower_class():
    """Classes that are copies of each other tie in every cell; argmax takes the first."""
    image, labels, text, keys, owners = toy(80, 8, 3, seed=5)
    text, keys = text.clone(), keys.clone()
    for first, second in ((1, 5), (2, 3), (0, 7)):
        text[second] = text[first]
        keys[owners == second] = keys[owners == first]
    data = (image, labels, text, keys, owners)
    got = count_right(*data, BETAS[::10], ALPHAS)
    assert torch.equal(got, plain(*data, BETAS[::10], ALPHAS))
    # those labelled with the second of a pair are never right
    copies = torch.isin(labels, torch.tensor([5, 3, 7]))
    assert int(copies.sum()) > 0
    assert int(count_right(image[copies], labels[copies], *data[2:], BETAS[:3], ALPHAS).max()) == 0


def test_numbers_from_a_coarse_lattice():
    """Coordinates of a few bits make logits equal by chance, not by copying."""
    g = torch.Generator().manual_seed(6)

    def lattice(*size):
        return torch.randint(-1, 2, size, generator=g).double()

    keys = lattice(24, 4)
    keys[:, 0] = 2.0
    image, text = lattice(90, 4), lattice(8, 4)
    image[:, 0] = text[:, 0] = 2.0
    data = (image, torch.randint(8, (90,), generator=g), text, keys / 4, torch.arange(24) % 8)
    betas, alphas = (0.0, 1.0, 2.5), (0.0, 0.5, 1.0, 2.0)
    assert torch.equal(count_right(*data, betas, alphas), plain(*data, betas, alphas))


def test_alpha_zero_is_zero_shot():
    image, labels, text, keys, owners = toy(50, 9, 2, seed=7)
    got = count_right(image, labels, text, keys, owners, (0.5, 3.0), (0.0,))
    right = int(((image @ text.T).argmax(dim=-1) == labels).sum())
    assert got.tolist() == [[right], [right]]


def test_axes_come_in_any_order_and_logit_scale_counts():
    data = toy(50, 9, 4, seed=8)
    betas, alphas = (5.0, 0.3, 1.0), (2.0, 0.1, 0.7, 0.1)
    for gamma in (20.0, 100.0):
        got = count_right(*data, betas, alphas, logit_scale=gamma)
        assert torch.equal(got, plain(*data, betas, alphas, gamma))


def test_first_strict_improvement_wins():
    data = toy(60, 13, 4, seed=1)
    found = search(*data)
    best, cell = 0, None
    for i, beta in enumerate(BETAS):
        for j, alpha in enumerate(ALPHAS):
            if int(found.right[i, j]) > best:
                best, cell = int(found.right[i, j]), (beta, alpha)
    assert (found.beta, found.alpha) == cell
    assert found.accuracy == best / 60
    assert int((found.right == best).sum()) > 1  # there was a choice


def test_real_features(data_root):
    """One shot of ImageNet as the cache, the other two as validation images; 1000 classes."""
    file = np.load(data_root / "features/vitb32/imagenet_1shot_2shot.npz", allow_pickle=False)
    features = torch.from_numpy(file["features"]).float()
    labels = torch.from_numpy(file["labels"]).long()
    text = torch.from_numpy(np.load(data_root / "features/vitb32/text.npz")["imagenet1k_features"])
    keys, owners = F.normalize(features[:1000], dim=-1), labels[:1000]
    image, wanted = features[1000::5], labels[1000::5]
    found = search(image, wanted, text.float(), keys, owners)
    rows, columns = (0, 40, 110, 199), (0, 3, 9, 19)
    want = plain(image, wanted, text, keys, owners,
                 [BETAS[i] for i in rows], [ALPHAS[j] for j in columns])  # fmt: skip
    assert torch.equal(found.right[list(rows)][:, list(columns)], want)
    assert found.accuracy > 0.5


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_matrix_of_images_and_keys_is_made():
    data = toy(4000, 10, 16)
    with Largest() as seen:
        count_right(*data, BETAS, ALPHAS)
    assert 4000 * 24 <= seen.numel < 4000 * 160 // 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(0, 24)}, "at least one validation image"),
        ({"features": torch.full((5, 24), float("nan"))}, "features: features must be finite"),
        ({"keys": torch.ones(26, 23)}, r"keys: expected \(K, 24\)"),
        ({"text": torch.ones(13, 25)}, r"text: expected \(K, 24\)"),
        ({"labels": torch.full((5,), 13)}, r"labels: expected values in 0..12 .* got 13..13"),
        ({"key_labels": torch.full((26,), -1)}, "key_labels: expected values in 0..12"),
        ({"key_labels": torch.zeros(5, dtype=torch.long)}, r"key_labels: expected \(26,\)"),
        ({"alphas": (-0.1, 1.0)}, "alphas: expected at least one number, all >= 0"),
        ({"betas": ()}, "betas: expected at least one"),
        ({"betas": (float("inf"),)}, "betas: expected a finite number"),
        ({"logit_scale": "100"}, "logit_scale: expected a finite number"),
    ],
)
def test_bad_input(change, message):
    image, labels, text, keys, owners = toy(5, 13, 2)
    given = {"features": image, "labels": labels, "text": text, "keys": keys,
             "key_labels": owners, "betas": BETAS, "alphas": ALPHAS} | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        count_right(**given)


def test_labels_that_are_never_right_are_refused():
    image, labels, text, keys, owners = toy(30, 2, 2, spread=0.01)
    with pytest.raises(ValueError, match="none; do the labels belong to this class list"):
        search(image, 1 - labels, text, keys, owners, betas=(5.0,), alphas=(100.0,))


def test_bad_grids():
    with pytest.raises(ValueError, match="max_beta: expected a number > 0"):
        published_grid(0.0)
    with pytest.raises(ValueError, match="steps"):
        published_grid(steps=(0, 20))
