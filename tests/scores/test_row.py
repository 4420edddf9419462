"""Global scores against float64 definitions, their invariances, and what they must refuse."""

from __future__ import annotations

import math

import pytest
import torch

import fastood
from fastood.scores import ClassBank
from tests.conftest import clip_like
from tests.scores import oracle
from tests.tolerances import SCORE_FROM_FEATURES_RTOL, SCORE_RTOL

ROW = {
    "max_similarity": (lambda **o: fastood.max_similarity(**o), lambda s: oracle.max_similarity(s)),
    "max_logit": (lambda **o: fastood.max_logit(**o), lambda s: s.max(-1).values / 0.01),
    "mcm": (lambda **o: fastood.mcm(**o), lambda s: oracle.max_softmax(s, 1.0)),
    "msp": (lambda **o: fastood.msp(**o), lambda s: oracle.max_softmax(s, 0.01)),
    "energy": (lambda **o: fastood.energy(**o), lambda s: oracle.energy(s, 0.01)),
    "energy_unit": (
        lambda **o: fastood.energy(tau=1.0, scale="unit", **o),
        lambda s: oracle.energy(s, 1.0),
    ),
    "neg_entropy_1": (lambda **o: fastood.neg_entropy(**o), lambda s: oracle.neg_entropy(s, 1.0)),
    "neg_entropy_.01": (
        lambda **o: fastood.neg_entropy(tau=0.01, **o),
        lambda s: oracle.neg_entropy(s, 0.01),
    ),
    "variance_1": (lambda **o: fastood.variance(**o), lambda s: oracle.variance(s, 1.0)),
    "variance_.01": (
        lambda **o: fastood.variance(tau=0.01, **o),
        lambda s: oracle.variance(s, 0.01),
    ),
    "margin": (lambda **o: fastood.margin(**o), lambda s: oracle.margin(s)),
    "delta_energy": (
        lambda **o: fastood.delta_energy(**o),
        lambda s: oracle.delta_energy(s, 0.01, 1, 0.0, False),
    ),
    "delta_energy_c3": (
        lambda **o: fastood.delta_energy(c=3, tau=1.0, **o),
        lambda s: oracle.delta_energy(s, 1.0, 3, 0.0, False),
    ),
    "delta_energy_joint": (
        lambda **o: fastood.delta_energy(c=3, joint=True, reset=0.05, **o),
        lambda s: oracle.delta_energy(s, 0.01, 3, 0.05, True),
    ),
}
EVERY = pytest.mark.parametrize("name", ROW)


def similarity(b=400, k=1000, seed=0):
    image, text, _ = clip_like(b, k, seed=seed)
    return oracle.cosine(image, text).float()


@EVERY
def test_float32_is_as_good_as_float64_given_the_cosines(name):
    ours, slow = ROW[name]
    s = similarity(b=4000 if "delta" not in name else 400)
    got, want = ours(similarity=s), slow(s.double())
    assert got.dtype == torch.float32
    # the margin is a difference of float32 cosines: its digits are theirs
    atol = 1e-7 if name == "margin" else 0.0
    torch.testing.assert_close(got.double(), want, rtol=SCORE_RTOL, atol=atol)


@EVERY
def test_distinct_images_keep_distinct_scores(name):
    ours, slow = ROW[name]
    s = similarity(b=4000 if "delta" not in name else 400)
    expected = slow(s.double()).float().unique().numel()
    # energy at tau = 1 is log K plus little: float32 cannot hold more, whoever computes it
    assert ours(similarity=s).unique().numel() >= 0.99 * expected


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_features_of_any_float_dtype_and_norm(name, dtype):
    ours, slow = ROW[name]
    image, text, _ = clip_like(64, 37, dtype=dtype)
    got = ours(image=image, text=text)
    want = slow(oracle.cosine(image, text))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-9 if dtype == torch.float64 else SCORE_FROM_FEATURES_RTOL
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * 1e-2)
    scaled = ours(image=image * 8, text=text * 0.25)
    torch.testing.assert_close(scaled, got, rtol=SCORE_FROM_FEATURES_RTOL, atol=1e-6)


@EVERY
def test_a_bank_and_per_image_classes_agree_with_plain_text(name):
    ours, _ = ROW[name]
    image, text, _ = clip_like(33, 21)
    plain = ours(image=image, text=text)
    assert torch.equal(ours(image=image, text=ClassBank(text)), plain)
    each = text.expand(33, 21, -1)
    torch.testing.assert_close(ours(image=image, text=each), plain, rtol=1e-4, atol=1e-6)


@EVERY
def test_class_order_row_splits_and_zero_rows(name):
    ours, _ = ROW[name]
    s = similarity(b=50, k=101)
    whole = ours(similarity=s)
    order = torch.randperm(101, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(similarity=s[:, order]), whole, rtol=1e-6, atol=1e-9)
    halves = torch.cat([ours(similarity=s[:20]), ours(similarity=s[20:])])
    torch.testing.assert_close(halves, whole, rtol=1e-6, atol=1e-9)
    assert ours(similarity=s[:0]).shape == (0,)


@EVERY
def test_gradients(name):
    ours, _ = ROW[name]
    image, text, _ = clip_like(3, 5, 7, dtype=torch.float64)
    image.requires_grad_()
    text.requires_grad_()
    tau_scale = 1e-6 if name in ("energy_unit", "neg_entropy_1", "variance_1") else 1e-5
    assert torch.autograd.gradcheck(
        lambda z, t: ours(image=z, text=t), (image, text), eps=1e-6, atol=tau_scale
    )


@EVERY
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_stay_finite_and_so_do_gradients(name, scale):
    ours, _ = ROW[name]
    s = (similarity(b=8, k=30) * scale).requires_grad_()
    out = ours(similarity=s)
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("tau", [0.01, 1.0])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_delta_energy_for_every_c_up_to_k(k, tau, joint):
    s = similarity(b=40, k=k, seed=k)
    for c in range(1, k + 1):
        got = fastood.delta_energy(similarity=s, tau=tau, c=c, joint=joint)
        want = oracle.delta_energy(s.double(), tau, c, 0.0, joint)
        torch.testing.assert_close(got.double(), want, rtol=SCORE_RTOL, atol=1e-9)
    if k == 1:
        torch.testing.assert_close(got, s[:, 0] / tau)


def test_delta_energy_of_many_resets_needs_little_memory_and_stays_exact():
    s = similarity(b=20, k=300)
    got = fastood.delta_energy(similarity=s, c=300)
    torch.testing.assert_close(
        got.double(),
        oracle.delta_energy(s.double(), 0.01, 300, 0.0, False),
        rtol=SCORE_RTOL,
        atol=0,
    )


def test_delta_energy_is_zero_where_a_class_sits_at_its_reset_and_signed_around_it():
    s = torch.tensor([[0.2, 0.1, 0.0], [0.3, 0.1, 0.0], [0.1, 0.05, 0.0]])
    out = fastood.delta_energy(similarity=s, tau=0.1, reset=0.2)
    assert out[0] == 0 and out[1] > 0 and out[2] < 0


def test_delta_energy_takes_the_lowest_index_among_equals():
    s = torch.tensor([[0.3, 0.3, 0.3, 0.1]], requires_grad=True)
    fastood.delta_energy(similarity=s, tau=0.1, c=2, joint=True).sum().backward()
    chosen = s.grad[0] > 0
    assert chosen.tolist() == [True, True, False, False]


def test_one_reset_ranks_like_the_softmax_maximum_at_the_same_tau():
    s = similarity(b=2000, k=1000)
    a = fastood.delta_energy(similarity=s).argsort()
    b = fastood.msp(similarity=s).argsort()
    ranks = torch.empty(2, 2000, dtype=torch.float64)
    for row, order in zip(ranks, (a, b), strict=True):
        row[order] = torch.arange(2000, dtype=torch.float64)
    assert torch.corrcoef(ranks)[0, 1] > 0.9999


def test_mcm_bounds_and_temperature_identity():
    s = similarity(b=100, k=50)
    out = fastood.mcm(similarity=s)
    assert (out >= 1 / 50).all() and (out <= math.e**2 / (math.e**2 + 49)).all()
    torch.testing.assert_close(fastood.mcm(similarity=s * 100, tau=100.0), out)
    shifted = s + 0.25
    for function in (fastood.mcm, fastood.neg_entropy, fastood.variance, fastood.margin):
        torch.testing.assert_close(
            function(similarity=shifted), function(similarity=s), rtol=1e-4, atol=1e-6
        )


def test_norms_that_overflow_when_squared():
    image, text, _ = clip_like(4, 5)
    want = fastood.max_similarity(image, text)
    for factor in (1e30, 1e-30):
        torch.testing.assert_close(fastood.max_similarity(image * factor, text), want)


def test_half_precision_features_do_not_collapse_into_few_scores():
    image, text, _ = clip_like(2000, 100, dtype=torch.bfloat16)
    z = image / image.norm(dim=-1, keepdim=True)
    t = text / text.norm(dim=-1, keepdim=True)
    eager = (z @ t.T).softmax(-1).max(-1).values
    assert eager.unique().numel() < 100
    assert fastood.mcm(image, text).unique().numel() > 1900


IMAGE, TEXT, _ = clip_like(4, 6, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fastood.mcm(IMAGE, TEXT[:, :5]),
            r"text: expected \(K, 8\) to match image \(4, 8\), got",
        ),
        (lambda: fastood.mcm(IMAGE, TEXT[None]), r"per-image classes.*expected \(4, K, 8\)"),
        (lambda: fastood.mcm(IMAGE, TEXT[:0]), "at least one class, got K = 0"),
        (lambda: fastood.mcm(similarity=torch.zeros(3, 0)), "at least one class"),
        (lambda: fastood.mcm(IMAGE, TEXT, tau=0), "tau: expected a temperature > 0, got 0"),
        (lambda: fastood.mcm(IMAGE, TEXT, tau=1e-320), "tau: expected a temperature from 1e-30"),
        (lambda: fastood.mcm(IMAGE[:, :0], TEXT[:, :0]), "image: expected features of D >= 1"),
        (
            lambda: fastood.mcm(IMAGE, TEXT, tau=float("nan")),
            "tau: expected a finite number, got nan",
        ),
        (lambda: fastood.mcm(IMAGE, TEXT, tau="warm"), "tau: expected a finite number, got 'warm'"),
        (lambda: fastood.mcm(IMAGE, TEXT, tau="0.1"), "tau: expected a finite number, got '0.1'"),
        (lambda: fastood.mcm(IMAGE, TEXT, tau=True), "tau: expected a finite number, got True"),
        (lambda: fastood.mcm(IMAGE, TEXT.to("meta")), "text: expected on cpu like image, got meta"),
        (
            lambda: fastood.mcm(IMAGE.int(), TEXT),
            "image: expected a floating-point tensor, got torch.int32",
        ),
        (lambda: fastood.mcm(IMAGE[0], TEXT), r"image: expected shape \(B, D\), got \(8,\)"),
        (lambda: fastood.mcm(IMAGE), "one of them is missing"),
        (lambda: fastood.mcm(IMAGE, TEXT, similarity=IMAGE @ TEXT.T), "not both"),
        (lambda: fastood.mcm(similarity=torch.full((3, 2), float("inf"))), "NaN or Inf in 3 rows"),
        (lambda: fastood.energy(IMAGE, TEXT, scale="log"), 'scale: expected "tau" or "unit"'),
        (lambda: fastood.margin(IMAGE, TEXT[:1]), "at least two classes, got K = 1"),
        (lambda: fastood.delta_energy(IMAGE, TEXT, c=0), "c: expected 1 <= c <= K = 6, got 0"),
        (lambda: fastood.delta_energy(IMAGE, TEXT, c=7), "c: expected 1 <= c <= K = 6, got 7"),
        (lambda: fastood.delta_energy(IMAGE, TEXT, c=1.5), "c: expected an integer"),
        (lambda: fastood.delta_energy(IMAGE, TEXT, reset=float("inf")), "reset: expected a finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_bad_rows_are_named(value):
    image = IMAGE.clone()
    image[2] = value
    with pytest.raises(ValueError, match=r"image: .* row 2"):
        fastood.energy(image, TEXT)
    text = TEXT.clone()
    text[5] = value
    with pytest.raises(ValueError, match=r"text: .* row 5"):
        fastood.energy(IMAGE, text)


def test_not_a_tensor():
    with pytest.raises(TypeError, match=r"image: expected a torch.Tensor \(B, D\), got list"):
        fastood.mcm([[1.0]], TEXT)


@EVERY
def test_without_checks_nan_stays_nan_and_in_its_row(name, monkeypatch):
    """What a GPU does unless FASTOOD_CHECK=1: no synchronisation, no check, no invented number."""
    monkeypatch.setattr("fastood.scores.inputs.must_check", lambda x: False)
    monkeypatch.setenv("FASTOOD_IMPL", "reference")
    ours, _ = ROW[name]
    s = similarity(b=5, k=30)
    want = ours(similarity=s)
    s[2, 7] = float("nan")
    got = ours(similarity=s)
    assert got[2].isnan()
    keep = [0, 1, 3, 4]
    assert torch.equal(got[keep], want[keep])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_checks_are_asked_for(monkeypatch):
    image = IMAGE.cuda()
    image[1] = float("nan")
    assert fastood.mcm(image, TEXT.cuda())[1].isnan()
    monkeypatch.setenv("FASTOOD_CHECK", "1")
    with pytest.raises(ValueError, match=r"image: .* row 1"):
        fastood.mcm(image, TEXT.cuda())


def test_full_graph_compilation_gives_the_same_numbers_and_gradients():
    image, text, _ = clip_like(8, 6, 16)

    def total(z):
        return (fastood.delta_energy(z, text, c=2) + fastood.mcm(z, text)).sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    a, b = image.clone().requires_grad_(), image.clone().requires_grad_()
    total(a).backward()
    compiled(b).backward()
    torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.parametrize("c", [1, 2, 5, 8, 9, 20])
def test_top_classes_come_in_order_of_value_then_index(c):
    from fastood.reference import top

    tied = torch.randint(0, 4, (50, 20), generator=torch.Generator().manual_seed(0)).float()
    values, index = top(tied, c)
    for row, found in zip(tied.tolist(), index.tolist(), strict=True):
        assert found == sorted(range(20), key=lambda k: (-row[k], k))[:c]
    assert torch.equal(values, tied.gather(1, index))


def test_shapes_without_values():
    image, text = IMAGE.to("meta"), TEXT.to("meta")
    for out in (fastood.mcm(image, text), fastood.delta_energy(image, text, c=2)):
        assert out.is_meta
        assert out.shape == IMAGE.shape[:1]


def test_unnormalised_features_are_taken_as_they_are_with_a_bank_too():
    image, text, _ = clip_like(5, 7, 16)
    unit = torch.nn.functional.normalize(text, dim=-1)
    bank = ClassBank(text)
    want = fastood.mcm(image, unit, normalize=False)
    torch.testing.assert_close(fastood.mcm(image, bank, normalize=False), want)
    many = fastood.score(image, bank, methods=["mcm"], normalize=False)["mcm"]
    torch.testing.assert_close(many, want)
    local = fastood.l_mcm(image[:, None], bank, normalize=False)
    torch.testing.assert_close(local, fastood.l_mcm(image[:, None], unit, normalize=False))
    labels = torch.arange(5)
    torch.testing.assert_close(
        fastood.ebm_loss(image, bank, labels, normalize=False),
        fastood.ebm_loss(image, unit, labels, normalize=False),
    )
    assert not torch.equal(want, fastood.mcm(image, bank))
