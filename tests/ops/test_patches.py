"""The patch term of LoCoOp by the kernels: value, ranks, gradients, and the loss around it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import fastood
from fastood.ops import patches
from fastood.ops.patches import patch_entropy
from tests import tolerances
from tests.conftest import clip_like

# (B, P, K, D, top_k): around panels and blocks of rows, K beyond a span, the smallest
SHAPES = [
    (8, 49, 100, 64, 1),
    (8, 49, 100, 64, 33),
    (1, 1, 2, 3, 1),
    (5, 7, 33, 48, 10),
    (2, 70, 31, 17, 10),
    (1, 196, 1030, 32, 300),
    (1, 30, 5000, 16, 900),
    (3, 126, 40, 8, 39),
]


def unit(x):
    x = x.double()
    return (x / x.norm(dim=-1, keepdim=True)).float()


def features(b, p, k, d, seed=0):
    """Image, patches of any norm, unit classes, labels that fit the first patch of each image."""
    local, text, labels = clip_like(b * (p + 1), k, d, seed=seed)
    local = local.view(b, p + 1, d)
    return local[:, 0].contiguous(), local[:, 1:].contiguous(), unit(text), labels[:: p + 1]


def leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


def term(local, text, labels, top_k, tau):
    """From the definition, in the precision of what it is given."""
    s = local @ text.mT
    own = s.gather(-1, labels[:, None, None].expand(-1, s.shape[1], 1))
    rank = (s > own).sum(dim=-1)
    p = (s / tau).softmax(dim=-1)
    h = (p * (p + 1e-5).log()).sum(dim=-1)[rank >= top_k]
    return (h.mean() if len(h) else s.sum() * 0), rank


def assert_gradient(mine, true, rtol=tolerances.GRADIENT_RTOL):
    atol = rtol * float(true.abs().max()) + 1e-7  # one sure patch: 1 - p is what rounding leaves
    torch.testing.assert_close(mine.double(), true, rtol=0, atol=atol)


@pytest.mark.parametrize("tau", [0.01, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_rank_and_gradients(kernels, instruction_set, threads, shape, tau):
    b, p, k, d, top_k = shape
    _, local, text, labels = features(b, p, k, d)
    local = unit(local)

    def run():
        z, t = leaves(local, text)
        value, rank = patch_entropy(z, t, labels, top_k=top_k, tau=tau)
        (3 * value).backward()
        return value.detach(), rank, t.grad, z.grad

    value, rank, d_text, d_local = run()
    exact = leaves(local.double(), text.double())
    want, want_rank = term(*exact, labels, top_k, tau)
    (3 * want).backward()
    assert torch.equal(rank.long(), want_rank)
    torch.testing.assert_close(value.double(), want.detach(), rtol=2e-6, atol=1e-6)
    assert_gradient(d_text, exact[1].grad)
    # sum_k g_k is 0 and the classes share a direction: float32 leaves that much of it
    assert_gradient(d_local, exact[0].grad, tolerances.PATCH_GRADIENT_RTOL)
    threads(1)
    for one, two in zip(run(), (value, rank, d_text, d_local), strict=True):
        assert torch.equal(one, two)


def test_some_patches_count_and_some_do_not():
    """The shapes above would show nothing if every patch counted, or none."""
    _, local, text, labels = features(8, 49, 100, 64)
    _, rank = term(unit(local), text, labels, 33, 0.01)
    assert 0.2 < float((rank >= 33).float().mean()) < 0.9


def test_no_patch_counts(kernels):
    _, local, text, labels = features(2, 5, 7, 8)
    z, t = leaves(local, text)
    value, rank = patch_entropy(z, t, labels, top_k=7, tau=0.1)
    value.backward()
    assert value == 0 and int(rank.max()) < 7
    assert not z.grad.any() and not t.grad.any()


def test_equal_similarities_are_not_larger(kernels):
    text = torch.eye(4)[[0, 0, 1, 2]]
    local = torch.tensor([[[1.0, 0.5, 0.2, 0]]])
    for label, rank in ((0, 0), (1, 0), (2, 2), (3, 3)):
        found = patch_entropy(local, text, torch.tensor([label]), top_k=1, tau=1.0).rank
        assert found.tolist() == [[rank]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_strides(kernels, dtype):
    _, local, text, labels = features(6, 20, 30, 24)
    local = local.to(dtype)

    def run(z):
        (t,) = leaves(text)
        value = patch_entropy(z, t, labels, top_k=9, tau=0.01, normalize=True).value
        value.backward()
        return value.detach(), t.grad

    want = run(local.float())
    sliced = torch.cat([local, -local], dim=1)[:, :20]
    apart = torch.stack([local, -local], dim=-1)[..., 0]
    for z in (local, sliced, apart):
        for mine, other in zip(run(z), want, strict=True):
            assert torch.equal(mine, other)
    same = local[:, :1].expand(-1, 20, -1)
    for mine, other in zip(run(same), run(same.contiguous()), strict=True):
        assert torch.equal(mine, other)


def test_bad_rows_and_labels_are_named(kernels):
    image, local, text, labels = features(4, 5, 7, 8)
    for value, message in ((float("nan"), "NaN or Inf in row 2"), (0.0, "zero vector.* row 2")):
        bad = local.clone()
        bad[2, 3] = value
        for impl in ("cpu", "reference"):
            with pytest.raises(ValueError, match=f"local: .*{message}"):
                fastood.locoop_loss(image, bad, text, labels, top_k=3, impl=impl)
    with pytest.raises(ValueError, match=r"labels: expected values in 0..6 \(K = 7\), got 7"):
        patch_entropy(local, text, torch.tensor([0, 1, 7, 2]), top_k=3, tau=1.0)
    with pytest.raises(ValueError, match="float64"):
        fastood.locoop_loss(image.double(), local, text, labels, top_k=3, impl="cpu")


# ------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("tau", [0.01, 1.0])
@pytest.mark.parametrize("local_gradient", [False, True])
def test_loss_and_gradients(kernels, tau, local_gradient):
    image, local, text, labels = features(8, 49, 100, 64)
    options = {"tau": tau, "weight": 2.0, "top_k": 33}
    found = []
    for impl, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        z, zl, t = leaves(image.to(dtype), local.to(dtype), 3 * text.to(dtype))
        zl.requires_grad_(local_gradient)
        loss = fastood.locoop_loss(z, zl, t, labels, impl=impl, **options)
        loss.backward()
        found.append((loss.detach(), z.grad, t.grad, zl.grad))
    (got, *mine), (want, *true) = found
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)
    assert_gradient(mine[0], true[0])
    assert_gradient(mine[1], true[1])
    if local_gradient:
        assert_gradient(mine[2], true[2], tolerances.PATCH_GRADIENT_RTOL)
    else:
        assert mine[2] is None and true[2] is None


def test_what_the_kernel_does_not_take_goes_to_the_reference(kernels):
    image, local, text, labels = features(4, 5, 7, 8)
    want = fastood.locoop_loss(image, local, text, labels, top_k=3, impl="reference")
    each = text.expand(4, -1, -1)
    torch.testing.assert_close(fastood.locoop_loss(image, local, each, labels, top_k=3), want)
    inputs = leaves(image.double(), local.double(), text.double())
    assert torch.autograd.gradgradcheck(
        lambda t: fastood.locoop_loss(inputs[0], inputs[1], t, labels, top_k=3, tau=0.3), inputs[2]
    )


def test_a_bank_that_takes_features_as_they_come(kernels):
    image, local, text, labels = features(4, 5, 7, 8)
    bank = fastood.ClassBank(text, normalize=False)
    ready = fastood.locoop_loss(unit(image), unit(local), text, labels, top_k=3)
    for impl in ("cpu", "reference"):
        got = fastood.locoop_loss(unit(image), unit(local), bank, labels, top_k=3, impl=impl)
        torch.testing.assert_close(got, ready)
        scaled = fastood.locoop_loss(unit(image), 2 * unit(local), bank, labels, top_k=3, impl=impl)
        assert abs(float(scaled - got)) > 1e-4


def test_second_derivatives_are_refused(kernels):
    image, local, text, labels = features(4, 5, 7, 8)
    (t,) = leaves(text)
    loss = fastood.locoop_loss(image, local, t, labels, top_k=3, impl="cpu")
    with pytest.raises(RuntimeError, match="impl='reference'"):
        torch.autograd.grad(loss, t, create_graph=True)


@pytest.mark.parametrize(("text_gradient", "local_gradient"), [(True, False), (True, True)])
def test_the_operator_itself(text_gradient, local_gradient):
    _, local, text, labels = features(3, 5, 7, 8)
    z, t = leaves(local, text)
    z.requires_grad_(local_gradient)
    torch.library.opcheck(
        torch.ops.fastood.patch_entropy.default,
        (z, t, labels, 3, 0.1, False, text_gradient, local_gradient),
    )


def test_the_default_in_plain_torch():
    _, local, text, labels = features(40, 30, 7, 8)
    z, t = leaves(unit(local).double(), text.double())
    value, rank, d_text, d_local = patches._patch_entropy(
        z.detach(), t.detach(), labels, 3, 0.1, False, True, True
    )
    want, want_rank = term(z, t, labels, 3, 0.1)
    want.backward()
    assert torch.equal(rank.long(), want_rank)
    torch.testing.assert_close(value, want.detach())
    torch.testing.assert_close(d_text, t.grad)
    torch.testing.assert_close(d_local, z.grad)


def test_compiled_as_one_graph(kernels):
    image, local, text, labels = features(3, 5, 7, 8)

    def loss(z, zl, t):
        return fastood.locoop_loss(z, zl, t, labels, top_k=3, tau=0.1)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    one, other = leaves(image, local, text), leaves(image, local, text)
    got, want = compiled(*one), loss(*other)
    torch.testing.assert_close(got, want)
    got.backward()
    want.backward()
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_memory_stays_below_the_similarities(kernels):
    code = """
        import torch, fastood
        torch.set_num_threads(2)
        b, p, k, d = 16, 196, 8000, 16

        def step(b):
            image, local = torch.randn(b, d), torch.randn(b, p, d)
            text = torch.randn(k, d, requires_grad=True)
            labels = torch.randint(k, (b,))
            fastood.locoop_loss(image, local, text, labels, top_k=200, impl="cpu").backward()

        step(1)
        peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
        before = peak()
        step(16)  # 100 MB of similarities
        print(peak() - before)
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert int(out) < 16 * 1024  # KiB
