"""Grouped negatives by the Triton kernels: against float64, in every precision, however cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastood.kernels import configs, grouped
from fastood.kernels.operands import Operand
from fastood.kernels.precision import PRECISIONS
from tests import tolerances
from tests.conftest import clip_like
from tests.scores import oracle

# (B, K, G, m, full groups, D): around tiles of 32 columns and blocks of 16 rows, and the smallest
SHAPES = [
    (20, 30, 3, 40, 2, 40),
    (5, 1, 1, 1, 1, 3),
    (17, 33, 5, 2, 2, 5),
    (18, 5, 30, 1, 30, 8),
    (16, 64, 2, 32, 2, 32),
    (33, 100, 1, 90, 1, 16),
    (1, 3, 40, 3, 39, 8),
    (0, 4, 2, 3, 2, 8),
]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")  # NumPy on NaN


def unit(x: Tensor) -> Tensor:
    x = x.double()
    return (x / x.norm(dim=-1, keepdim=True)).float()


def features(b, k, g, m, d, seed=0):
    """Images of any norm, unit classes and groups."""
    image, text, _ = clip_like(b, k + g * m, d, seed=seed)
    text = unit(text)
    return image, text[:k].contiguous(), text[k:].reshape(g, m, d)


def groups_of(g, m, full):
    return [list(range(i * m, (i + 1) * m - (i >= full))) for i in range(g)]


def as_multiplied(x: Tensor, precision: str) -> Tensor:
    """float64 rows as a precision rounds them."""
    if precision in ("fp16", "bf16"):
        return x.to(torch.float16 if precision == "fp16" else torch.bfloat16).double()
    if precision == "tf32":
        bits = x.float().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & -8192).view(torch.float32).double()
    return x.double()


def exact(image, text, negatives, full, tau, precision="fp32", *, normalize=True):
    """(B,) scores and (B, 1 + G) log-sum-exps in float64 of features rounded like that."""
    z = image.double()
    norms = z.norm(dim=-1, keepdim=True) if normalize else torch.ones(len(z), 1).double()
    if precision in ("fp16", "bf16") and image.dtype == as_dtype(precision):
        z = z / norms  # as they are, the norm is divided out of the products
    else:
        z = as_multiplied(z / norms, precision)
    g, m, _ = negatives.shape
    s = z @ as_multiplied(text, precision).T
    sn = z @ as_multiplied(negatives.flatten(0, 1), precision).T
    groups = groups_of(g, m, full)
    sums = [oracle.lse(s / tau)] + [oracle.lse(sn[:, group] / tau) for group in groups]
    return oracle.neg_label(s, sn, tau, groups), torch.stack(sums, -1)


def as_dtype(precision):
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)


def by_kernel(device, image, text, negatives, full, tau, precision="fp32", *, normalize=True):
    bank = grouped.columns(text.to(device), negatives.to(device), full, precision)
    found, sums = grouped.sums(image.to(device), bank, tau=tau, normalize=normalize)
    assert found.dtype == torch.float32 and found.shape == (len(image),)
    assert sums.dtype == torch.float64 and sums.shape == (len(image), 1 + len(negatives))
    return found.cpu(), sums.cpu()


def check(got, want, tau):
    """Logits err by float32 cosines over tau, and scores by what is exponential in them."""
    logit = tolerances.TRITON_COSINE_ATOL / tau
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=logit + 1e-6)
    torch.testing.assert_close(got[0].double(), want[0], rtol=2 * logit + 1e-6, atol=1e-37)


@pytest.fixture
def cut(monkeypatch):
    """Sets the splits, and columns of a piece."""

    def to(splits: int, piece: int = 512, rows: int = 16, columns: int = 32) -> None:
        config = configs.Config(rows, columns, 32, 4, 1, splits=splits)
        monkeypatch.setattr("fastood.kernels.source.pick", lambda *_, **__: config)
        monkeypatch.setattr(grouped, "_PIECE", piece)

    return to


@pytest.mark.parametrize("tau", [0.001, 0.01, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape(device, shape, tau):
    b, k, g, m, full, d = shape
    inputs = (*features(b, k, g, m, d), full, tau)
    check(by_kernel(device, *inputs), exact(*inputs), tau)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_precision_rounds_what_it_multiplies_and_nothing_else(device, cut, dtype, precision):
    cut(2, rows=32, columns=64)
    image, text, negatives = features(18, 20, 3, 30, 40)
    inputs = (image.to(dtype), text, negatives, 2, 0.05, precision)
    got, want = by_kernel(device, *inputs), exact(*inputs)
    # a cosine in float32 may round to the other neighbour than the float64 one
    ulp = {"fp16": 2.0**-11, "bf16": 2.0**-8, "tf32": 2.0**-11}.get(precision, 0.0)
    slack = 0.02 * ulp / 0.05
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=2e-5 + slack)
    torch.testing.assert_close(got[0].double(), want[0], rtol=5e-5 + 2 * slack, atol=0)


def similar(b, columns, d, seed=0):
    """Images that are unit vectors, so that columns' entries are the cosines, exactly."""
    s = clip_like(d, columns, seed=seed)
    cosines = unit(s[0]) @ unit(s[1]).T
    return torch.eye(d)[:b], cosines.T.contiguous()


@pytest.mark.parametrize("tau", [1e-20, 1e-10, 1e-6, 0.01, 1.0])
def test_scores_of_exact_cosines(device, tau):
    image, rows = similar(64, 200, 64)
    text, negatives = rows[:50], rows[50:].reshape(5, 30, 64)
    inputs = (image, text, negatives, 5, tau)
    got = by_kernel(device, *inputs, normalize=False)[0]
    want = exact(*inputs, normalize=False)[0]
    torch.testing.assert_close(got.double(), want, rtol=tolerances.SCORE_RTOL, atol=0)
    assert len(got.unique()) >= 0.99 * len(want.float().unique())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides_do_not_matter(device, dtype):
    image, text, negatives = features(19, 9, 2, 11, 24)
    image = image.to(dtype).to(device)
    bank = grouped.columns(text.to(device), negatives.to(device), 2, "fp16x3")
    want = grouped.scores(image, bank, tau=0.1, normalize=True)
    assert torch.equal(grouped.sums(image, bank, tau=0.1, normalize=True)[0], want)
    # compiled for other alignments the squares of a norm are added in another order
    near = {"rtol": tolerances.SCORE_FROM_FEATURES_RTOL, "atol": 0}
    apart = torch.stack([image, -image], dim=1)[:, 0]
    torch.testing.assert_close(grouped.scores(apart, bank, tau=0.1, normalize=True), want, **near)
    columns = image.T.contiguous().T
    assert torch.equal(grouped.scores(columns, bank, tau=0.1, normalize=True), want)
    same = image[:1].expand(20, -1)
    repeated = grouped.scores(same, bank, tau=0.1, normalize=True)
    torch.testing.assert_close(repeated, want[:1].expand(20), **near)


# ------------------------------------------------------------------------------ how it is cut


@pytest.mark.parametrize("tau", [0.01, 1.0])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]])
def test_splits_and_pieces(device, cut, shape, tau):
    b, k, g, m, full, d = shape
    inputs = (*features(b, k, g, m, d), full, tau)
    want = exact(*inputs)
    found = []
    for splits, piece in ((1, 512), (2, 512), (3, 512), (4, 512), (5, 512), (3, 16), (4, 7)):
        cut(splits, piece, rows=32)
        one = by_kernel(device, *inputs)
        image, text, negatives = (x.to(device) for x in inputs[:3])
        bank = grouped.columns(text, negatives, full, "fp32")
        again = grouped.scores(image, bank, tau=tau, normalize=True)
        assert torch.equal(again.cpu(), one[0])
        check(one, want, tau)
        found.append(one[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=tolerances.GROUPED_CUT_RTOL, atol=1e-37)


def test_pieces_cover_every_column_once(monkeypatch):
    monkeypatch.setattr(grouped, "prepare", lambda x, precision, **_: Operand(precision, x))
    for k, g, m, full in ((1, 1, 1, 1), (1300, 3, 1025, 1), (512, 2, 513, 2), (7, 100, 10, 40)):
        bank = grouped.columns(torch.ones(k, 2), torch.ones(g, m, 2), full, "fp16")
        sizes = bank.pieces.diff().tolist()
        assert len(sizes) == bank.total and min(sizes) >= 1 and max(sizes) <= 512
        assert sum(sizes[: bank.of_classes]) == k == bank.k
        each = bank.of_group
        of_groups = [sum(sizes[i : i + each]) for i in range(bank.of_classes, bank.total, each)]
        assert of_groups == [m - (i >= full) for i in range(g)]
        assert len(bank.operand.high) == sum(sizes)


def test_an_empty_group_is_refused():
    with pytest.raises(ValueError, match="negatives: expected no empty group"):
        grouped.columns(torch.ones(2, 4), torch.ones(3, 1, 4), 2, "fp16")


def test_more_rows_than_fit_are_done_in_turn(device, cut, monkeypatch):
    cut(2, rows=64)
    inputs = (*features(300, 6, 2, 5, 8), 2, 0.1)
    whole = by_kernel(device, *inputs)
    monkeypatch.setattr(grouped, "_SCRATCH", 0)
    for one, other in zip(by_kernel(device, *inputs), whole, strict=True):
        assert torch.equal(one, other)


class _Allocations(TorchDispatchMode):
    """The sizes of all tensors that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.sizes.append(out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("groups", [4, 100])
def test_memory_stays_below_the_similarities(device, cut, monkeypatch, groups):
    cut(1, rows=256, columns=512)
    monkeypatch.setattr(grouped, "_SCRATCH", 1 << 18)
    b, d = 600, 4
    image, text, negatives = features(b, 30, groups, 200 // groups, d)
    bank = grouped.columns(text.to(device), negatives.to(device), groups, "fp16")
    image = image.to(device).half()
    with _Allocations() as seen:
        grouped.scores(image, bank, tau=0.01, normalize=True)
    made = [size for size in seen.sizes if size != image.untyped_storage().nbytes()]
    assert made and max(made) < b * 230 * 4
    if groups == 4:
        assert max(made) <= 2 * b * bank.total * 4


# ------------------------------------------------------------------------------ extreme rows


def test_groups_far_below_the_others_keep_their_sums(device):
    """In one tile with a group at logit 1e4, and below the range of a float32 exponential."""
    image = torch.eye(8)[:3]
    negatives = torch.zeros(4, 5, 8)
    text = torch.zeros(6, 8)
    text[:, 0], text[:, 1], text[:, 2] = 0.0, -1.0, 1.0
    for group, height in enumerate((1.0, -1.0, 0.5, -0.001)):
        negatives[group] = height + 1e-4 * torch.arange(5)[:, None]
    inputs = (image, text, negatives, 4, 1e-4)
    got, want = by_kernel(device, *inputs, normalize=False), exact(*inputs, normalize=False)
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("common", [100.0, -100.0])
def test_logits_of_1e4_lose_no_digits(device, common):
    """Rows whose classes and groups share an offset: what counts is the little between them."""
    image, rows = similar(16, 60, 16)
    rows = (rows * 0.125 * 2**20).round() / 2**20 + common
    text, negatives = rows[:20], rows[20:].reshape(4, 10, 16)
    inputs = (image, text, negatives, 4, 0.01)
    got, want = by_kernel(device, *inputs, normalize=False), exact(*inputs, normalize=False)
    torch.testing.assert_close(got[1], want[1], rtol=1e-9, atol=1e-5)
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-5, atol=0)


@pytest.mark.parametrize("gap", [2.0, -2.0])
def test_far_from_the_negatives_on_either_side(device, gap):
    image = torch.eye(3)[:1]
    text, negatives = torch.zeros(4, 3), torch.zeros(2, 3, 3)
    text[:, 0] = gap / 2
    negatives[..., 0] = -gap / 2
    got, _ = by_kernel(device, image, text, negatives, 2, 1e-4, normalize=False)
    assert got.tolist() == [1.0 if gap > 0 else 0.0]


def test_equal_similarities(device):
    image = torch.ones(3, 4)
    text, negatives = torch.full((7, 4), 0.5), torch.full((3, 11, 4), 0.5)
    got, sums = by_kernel(device, image, text, negatives, 3, 0.01)
    torch.testing.assert_close(got, torch.full((3,), 7 / 18), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums[:, 0], 100 + torch.full((3,), 7.0).double().log())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tau", [0.001, 0.1])
def test_rows_that_are_not_finite_are_nan_and_the_others_unharmed(device, tau, normalize):
    image, text, negatives = features(20, 9, 4, 11, 8)
    image = image if normalize else unit(image)
    want, sums = by_kernel(device, image, text, negatives, 4, tau, normalize=normalize)
    bad = image.clone()
    bad[2, 3], bad[17] = torch.nan, torch.inf
    gone = torch.zeros(20, dtype=torch.bool)
    gone[[2, 17]] = True
    if normalize:
        bad[5], gone[5] = 0.0, True
    got, found = by_kernel(device, bad, text, negatives, 4, tau, normalize=normalize)
    assert torch.equal(got.isnan(), gone)
    assert torch.equal(found[:, 0].isnan(), gone)
    assert torch.equal(got[~gone], want[~gone]) and torch.equal(found[~gone], sums[~gone])


@pytest.mark.parametrize("where", ["class", "negative"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_column_that_is_not_finite_makes_scores_nan(device, value, where):
    image, text, negatives = features(6, 9, 4, 11, 8)
    image = unit(image).abs()
    (text[4] if where == "class" else negatives[2, 7])[:] = value
    got, _ = by_kernel(device, image, text, negatives, 4, 0.1, normalize=False)
    assert got.isnan().all()


def test_products_that_overflow_make_scores_nan(device):
    image, text, negatives = features(6, 9, 4, 11, 8)
    image = unit(image)
    image[3] *= 1e25
    for sign in (1e20, -1e20):
        far = negatives.abs() * sign
        got, _ = by_kernel(device, image.abs(), text, far, 4, 0.1, normalize=False)
        assert got[3].isnan()
