"""Grouped negatives by the kernels: values, gradients, and that nothing else matters."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import fastood
from fastood import reference
from fastood.ops import fused, grouped
from tests import tolerances
from tests.conftest import clip_like
from tests.scores import oracle

# (B, K, G, m, full groups, D): sizes around panels, spans and groups, and the smallest
SHAPES = [
    (130, 100, 10, 104, 10, 64),
    (1, 1, 1, 1, 1, 3),
    (57, 1000, 7, 33, 3, 48),
    (40, 1100, 3, 1500, 2, 32),
    (60, 31, 2, 1025, 1, 16),
    (120, 5, 100, 1, 100, 8),
    (33, 33, 5, 2, 2, 5),
    (0, 4, 2, 3, 2, 8),
]


def unit(x):
    x = x.double()
    return (x / x.norm(dim=-1, keepdim=True)).float()


def features(b, k, g, m, d, seed=0):
    image, text, _ = clip_like(b, k + g * m, d, seed=seed)
    image, text = unit(image), unit(text)
    return image, text[:k].contiguous(), text[k:].reshape(g, m, d)


def by_kernel(kernels, image, text, negatives, full, tau, *, normalize=False):
    g, m, _ = negatives.shape
    return grouped.grouped_scores(
        image,
        fused.score_panels(text, normalize=False),
        fused.score_panels(negatives.flatten(0, 1), normalize=False, name="negatives"),
        k=len(text),
        shape=(g, m),
        full=full,
        tau=tau,
        normalize=normalize,
    )


def groups_of(g, m, full):
    return [list(range(i * m, (i + 1) * m - (i >= full))) for i in range(g)]


@pytest.mark.parametrize("tau", [0.01, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_from_features(kernels, instruction_set, shape, tau):
    b, k, g, m, full, d = shape
    image, text, negatives = features(b, k, g, m, d)
    got = by_kernel(kernels, image, text, negatives, full, tau)
    assert got.shape == (b,) and got.dtype == torch.float32
    s, sn = image.double() @ text.double().T, image.double() @ negatives.flatten(0, 1).double().T
    want = oracle.neg_label(s, sn, tau, groups_of(g, m, full))
    rtol = tolerances.SCORE_FROM_FEATURES_RTOL
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("tau", [0.01, 1.0])
def test_scores_of_exact_cosines(kernels, instruction_set, tau):
    d, k, g, m = 96, 1000, 10, 104
    s, sn = clip_like(d, k + g * m)[:2]
    cosine = unit(s) @ unit(sn).T  # row i: what the i-th unit vector has with everything below
    rows = cosine.T.contiguous()
    text, negatives = rows[:k].contiguous(), rows[k:].reshape(g, m, d)
    got = by_kernel(kernels, torch.eye(d), text, negatives, g, tau)
    s = cosine.double()
    want = oracle.neg_label(s[:, :k], s[:, k:], tau, groups_of(g, m, g))
    torch.testing.assert_close(got.double(), want, rtol=tolerances.SCORE_RTOL, atol=0)
    assert len(got.unique()) >= 0.99 * len(want.float().unique())


@pytest.mark.parametrize("gap", [2.0, -2.0])
def test_far_from_the_negatives_on_either_side(kernels, gap):
    image = torch.eye(3)[:1]
    text, negatives = torch.zeros(4, 3), torch.zeros(2, 3, 3)
    text[:, 0] = gap / 2
    negatives[..., 0] = -gap / 2
    got = by_kernel(kernels, image, text, negatives, 2, 1e-4)  # logits differ by 20,000
    assert got.tolist() == [1.0 if gap > 0 else 0.0]


@pytest.mark.parametrize("shape", SHAPES)
def test_neither_threads_nor_batch_matter(kernels, instruction_set, threads, shape):
    b, k, g, m, full, d = shape
    image, text, negatives = features(b, k, g, m, d)
    threads(1)
    alone = by_kernel(kernels, image, text, negatives, full, 0.01)
    threads(2)
    assert torch.equal(by_kernel(kernels, image, text, negatives, full, 0.01), alone)
    for part in (slice(0, 1), slice(b // 2, b // 2 + 5)):
        got = by_kernel(kernels, image[part], text, negatives, full, 0.01)
        assert torch.equal(got, alone[part])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_strides(kernels, dtype):
    image, text, negatives = features(40, 50, 4, 10, 24)
    image = (image * 7).to(dtype)
    want = by_kernel(kernels, image.float(), text, negatives, 4, 0.01, normalize=True)
    got = by_kernel(kernels, image, text, negatives, 4, 0.01, normalize=True)
    # to the bit but on a matrix unit, which divides the norm out of products of bfloat16
    rtol = tolerances.SCORE_FROM_FEATURES_RTOL if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(got, want, rtol=rtol, atol=0)
    wide = torch.stack([image, -image], dim=1).flatten(0, 1)[::2]  # rows apart
    assert torch.equal(by_kernel(kernels, wide, text, negatives, 4, 0.01, normalize=True), got)
    columns = image.T.contiguous().T
    assert torch.equal(by_kernel(kernels, columns, text, negatives, 4, 0.01, normalize=True), got)
    same = image[:1].expand(5, -1)
    alone = by_kernel(kernels, same, text, negatives, 4, 0.01, normalize=True)
    assert torch.equal(alone, got[:1].expand(5))


def test_bad_rows_are_named(kernels):
    image, text, negatives = features(5, 4, 2, 3, 8)
    for value, message in ((float("nan"), "NaN or Inf in row 3"), (0.0, "zero vector.* row 3")):
        bad = image.clone()
        bad[3] = value
        with pytest.raises(ValueError, match=f"image: .*{message}"):
            by_kernel(kernels, bad, text, negatives, 2, 0.01)
        with pytest.raises(ValueError, match=f"image: .*{message}"):
            fastood.neg_label(bad, text, negatives.flatten(0, 1), groups=2, impl="cpu")


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("side", ["classes", "negatives"])
@pytest.mark.parametrize("rows", [5, 200])
def test_products_that_overflow_are_reported(instruction_set, impl, side, rows):
    image, text, negatives = features(rows, 300, 4, 50, 8)
    image[3] *= 1e25
    if side == "classes":
        text = text * 1e20
    else:
        negatives = negatives * 1e20
    flat = negatives.flatten(0, 1)
    for z in (image, image.clone().requires_grad_()):
        with pytest.raises(ValueError, match=r"similarity: .*finite.* in row 3$"):
            fastood.neg_label(z, text, flat, groups=4, normalize=False, impl=impl)


@pytest.mark.parametrize("remainder", ["drop", "spread"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neg_label_takes_either_path(kernels, remainder, dtype):
    image, text, _ = clip_like(30, 60, 40)
    image, negatives = image.to(dtype), clip_like(1, 107, 40, seed=2)[1]
    options = {"groups": 10, "remainder": remainder, "tau": 0.05}
    want = fastood.neg_label(image, text, negatives, impl="reference", **options)
    got = fastood.neg_label(image, text, negatives, impl="cpu", **options)
    torch.testing.assert_close(got, want, rtol=tolerances.SCORE_FROM_FEATURES_RTOL, atol=0)
    bank = fastood.ClassBank(text, negatives=negatives, groups=10, remainder=remainder)
    assert torch.equal(fastood.neg_label(image, bank, tau=0.05, impl="cpu"), got)
    assert torch.equal(fastood.neg_label(image, bank, tau=0.05), got)
    ready = unit(image)
    as_is = fastood.neg_label(ready, bank, tau=0.05, normalize=False, impl="cpu")
    torch.testing.assert_close(as_is, got, rtol=tolerances.SCORE_FROM_FEATURES_RTOL, atol=0)
    with pytest.raises(ValueError, match="float64"):
        fastood.neg_label(image.double(), bank, impl="cpu")


def test_a_bank_packs_its_negatives_once(kernels):
    image, text, negatives = features(3, 4, 2, 3, 8)
    bank = fastood.ClassBank(text, negatives=negatives.flatten(0, 1), groups=2)
    fastood.neg_label(image, bank, impl="cpu")
    assert bank.negative_panels is bank.negative_panels
    moved = bank.to(torch.float32)
    assert moved.packed_negatives is None
    with pytest.raises(ValueError, match="holds none"):
        _ = fastood.ClassBank(text).negative_panels


# ------------------------------------------------------------------------------ gradients


def leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("tau", [0.01, 1.0])
@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_gradients(kernels, instruction_set, threads, shape, tau):
    b, k, g, m, full, d = shape
    inputs = features(b, k, g, m, d)
    weights = torch.linspace(-1, 2, b)

    def gradients(*tensors):
        (grouped.grouped_graph(*tensors, full=full, tau=tau) * weights).sum().backward()
        return [x.grad for x in tensors]

    got = gradients(*leaves(*inputs))
    exact = leaves(*(x.double() for x in inputs))
    s, sn = exact[0] @ exact[1].T, exact[0] @ exact[2].flatten(0, 1).T
    sn = sn.unflatten(1, (g, m))
    for i in range(full, g):
        sn = torch.cat([sn[:, :i], sn[:, i : i + 1].clone(), sn[:, i + 1 :]], 1)
        sn[:, i, m - 1] = -torch.inf
    (reference.neg_label(s, sn, tau) * weights.double()).sum().backward()
    for mine, true in zip(got, (x.grad for x in exact), strict=True):
        bound = tolerances.GRADIENT_RTOL * float(true.abs().max())
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=bound)
    threads(1)
    for mine, single in zip(got, gradients(*leaves(*inputs)), strict=True):
        assert torch.equal(mine, single)


def test_only_gradients_that_are_wanted(kernels):
    image, text, negatives = features(20, 9, 2, 4, 8)
    full = leaves(image, text, negatives)
    grouped.grouped_graph(*full, full=2, tau=0.1).sum().backward()
    for i in range(3):
        some = [image, text, negatives]
        some[i] = some[i].clone().requires_grad_()
        grouped.grouped_graph(*some, full=2, tau=0.1).sum().backward()
        assert torch.equal(some[i].grad, full[i].grad)


def test_gradients_reach_features_of_any_norm(kernels):
    image, text, _ = clip_like(12, 9, 16)
    negatives = clip_like(1, 11, 16, seed=3)[1]
    found = []
    for impl, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        inputs = leaves(image.to(dtype), text.to(dtype), negatives.to(dtype))
        fastood.neg_label(*inputs, groups=3, tau=0.1, impl=impl).sum().backward()
        found.append([x.grad for x in inputs])
    for mine, true in zip(*found, strict=True):
        bound = tolerances.GRADIENT_RTOL * float(true.abs().max())
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=bound)


def test_second_derivatives_are_refused(kernels):
    inputs = leaves(*features(4, 5, 2, 3, 8))
    out = grouped.grouped_graph(*inputs, full=2, tau=0.1).sum()
    with pytest.raises(RuntimeError, match="impl='reference'"):
        torch.autograd.grad(out, inputs, create_graph=True)


@pytest.mark.parametrize("full", [3, 1])
def test_the_operator_itself(full):
    inputs = leaves(*features(6, 5, 3, 4, 8))
    torch.library.opcheck(torch.ops.fastood.grouped.default, (*inputs, None, None, full, 0.1))
    with torch.no_grad():
        _, lse = torch.ops.fastood.grouped(*inputs, None, None, full, 0.1)
        arguments = (torch.ones(6), *inputs, None, None, lse, full, 0.1, True, True, False)
        torch.library.opcheck(
            torch.ops.fastood.grouped_backward.default,
            tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments),
        )


def test_the_default_in_plain_torch():
    image, text, negatives = (x.double() for x in features(300, 5, 3, 4, 8))
    inputs = leaves(image, text, negatives)
    scores, lse = grouped._grouped(image, text, negatives, None, None, 2, 0.1)
    s, sn = grouped._logits(*inputs, 2)
    want = reference.neg_label(s, sn, 0.1)
    torch.testing.assert_close(scores, want.detach())
    want.sum().backward()
    ones = torch.ones(300, dtype=torch.float64)
    found = grouped._grouped_backward(
        ones, image, text, negatives, None, None, lse, 2, 0.1, True, True, True
    )
    for mine, x in zip(found, inputs, strict=True):
        torch.testing.assert_close(mine, x.grad)


def test_compiled_as_one_graph(kernels):
    image, text, _ = clip_like(9, 7, 16)
    negatives = clip_like(1, 12, 16, seed=3)[1]
    bank = fastood.ClassBank(text, negatives=negatives, groups=3)
    compiled = torch.compile(
        lambda x: fastood.neg_label(x, bank, tau=0.1), fullgraph=True, backend="aot_eager"
    )
    (one,), (other,) = leaves(image), leaves(image)
    got, want = compiled(one), fastood.neg_label(other, bank, tau=0.1)
    assert torch.equal(got, want)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_memory_stays_below_the_similarities(kernels):
    code = """
        import torch, fastood
        torch.set_num_threads(2)
        d, k, m = 16, 1000, 10000
        text, negatives = torch.randn(k, d), torch.randn(m, d)
        bank = fastood.ClassBank(text, negatives=negatives, groups=100)
        fastood.neg_label(torch.randn(1000, d), bank, impl="cpu")
        x = torch.randn(1000, d, requires_grad=True)
        fastood.neg_label(x, bank, impl="cpu").sum().backward()
        peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
        before = peak()
        x = torch.randn(4000, d, requires_grad=True)  # 176 MB of similarities
        fastood.neg_label(x.detach(), bank, impl="cpu")
        fastood.neg_label(x, bank, impl="cpu").sum().backward()
        print(peak() - before)
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert int(out) < 32 * 1024  # KiB; what is needed is 3 MB of log-sum-exps
