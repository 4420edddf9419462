"""The energy-bound loss by the kernel: value, gradients, and that nothing else matters."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import textwrap

import pytest
import torch

import fastood
from fastood.ops import ebm
from fastood.ops.ebm import energy_bound
from tests import tolerances
from tests.conftest import clip_like

OPTIONS = [
    dict(zip(("mask", "mask_by", "edit", "ce_on", "renorm"), chosen, strict=True))
    for chosen in itertools.product(
        ("sign", "topp"), ("top1", "label"), ("top1", "all"), ("edited", "original"), (False, True)
    )
]

# (B, K, D): one block of rows and more, K beyond a span, around panels, the smallest
SHAPES = [
    (37, 100, 63),
    (300, 1100, 40),
    (1, 1, 3),
    (3, 1, 17),
    (1, 2, 33),
    (15, 33, 31),
    (9, 31, 64),
]


def loss_and_gradients(image, text, labels, **options):
    z, t = image.clone().requires_grad_(), text.clone().requires_grad_()
    loss = fastood.ebm_loss(z, t, labels, **options)
    (3 * loss).backward()
    return loss.detach(), z.grad, t.grad


def assert_follows(found, image, text, labels, **options):
    """The kernel's loss and gradients against float64 autograd of the reference."""
    want = loss_and_gradients(image.double(), text.double(), labels, impl="reference", **options)
    torch.testing.assert_close(found[0].double(), want[0], rtol=5e-6, atol=2e-6)
    for mine, true in zip(found[1:], want[1:], strict=True):
        atol = tolerances.GRADIENT_RTOL * float(true.abs().max()) + 1e-7
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=atol)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_option(kernels, instruction_set, options):
    image, text, labels = clip_like(37, 50, 63)
    for tau in (0.01, 1.0):
        chosen = {"tau": tau, "weight": 0.3, "keep": 0.3, **options}
        found = loss_and_gradients(image, text, labels, impl="cpu", **chosen)
        assert_follows(found, image, text, labels, **chosen)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("edit", ["top1", "all"])
def test_every_shape_and_number_of_threads(kernels, instruction_set, threads, shape, edit):
    image, text, labels = clip_like(*shape)
    options = {"weight": 0.5, "mask": "topp", "keep": 0.4, "edit": edit}
    found = loss_and_gradients(image, text, labels, impl="cpu", **options)
    assert_follows(found, image, text, labels, **options)
    threads(1)
    again = loss_and_gradients(image, text, labels, impl="cpu", **options)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_blocks_of_fewer_rows_for_many_classes(kernels):
    image, text, labels = clip_like(40, 70000, 4)
    found = loss_and_gradients(image, text, labels, impl="cpu")
    assert_follows(found, image, text, labels)


@pytest.mark.parametrize("edit", ["top1", "all"])
def test_features_as_they_come(kernels, edit):
    image, text, labels = clip_like(20, 9, 16)
    z, t = 0.2 * image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
    for renorm in (False, True):
        options = {"normalize": False, "edit": edit, "renorm": renorm, "tau": 0.05}
        found = loss_and_gradients(z, t, labels, impl="cpu", **options)
        assert_follows(found, z, t, labels, **options)


def test_confident_and_extreme_rows(kernels):
    """Others 1e4 logits away, norms no square can hold, masks that keep nothing."""
    image, text, labels = torch.eye(8), torch.eye(8), torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])
    found = loss_and_gradients(image, text, labels, tau=1e-4, impl="cpu")
    assert_follows(found, image, text, labels, tau=1e-4)
    image, text, labels = clip_like(12, 5, 16)
    plain = fastood.ebm_loss(image, text, labels, impl="cpu")
    scaled = fastood.ebm_loss(image * 1e25, text * 1e-22, labels, impl="cpu")
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-5)
    # one class, every element of the other sign: no product is positive
    one, away, label = text[:1], -text[:1] * torch.linspace(0.5, 1.5, 16), torch.tensor([0])
    for renorm in (False, True):
        options = {"weight": 1.0, "renorm": renorm}
        found = loss_and_gradients(one, away, label, impl="cpu", **options)
        assert_follows(found, one, away, label, **options)


def test_equal_products_and_best_classes_take_the_first(kernels):
    image = torch.ones(1, 6)
    text = torch.stack([torch.ones(6), torch.ones(6), -torch.ones(6)])
    options = {"mask": "topp", "keep": 0.5, "tau": 0.5, "weight": 1.0}
    labels = torch.tensor([1])
    found = loss_and_gradients(image, text, labels, impl="cpu", **options)
    assert_follows(found, image, text, labels, **options)
    assert not torch.equal(found[2][0], found[2][1])
    assert found[2][0, :3].ne(found[2][0, 3:]).all()  # the first three elements were kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_strides(kernels, dtype):
    image, text, labels = clip_like(30, 40, 24)
    image, text = image.to(dtype), text.to(dtype)
    want = loss_and_gradients(image.float(), text.float(), labels, impl="cpu")
    got = loss_and_gradients(image, text, labels, impl="cpu")
    assert torch.equal(got[0], want[0])
    for mine, other in zip(got[1:], want[1:], strict=True):
        assert mine.dtype == dtype and torch.equal(mine, other.to(dtype))
    wide = torch.cat([text, -text], dim=1)[:, :24]
    apart = torch.stack([image, -image], dim=-1)[..., 0]
    far = torch.stack([labels, labels], dim=1)[:, 0]
    assert torch.equal(fastood.ebm_loss(apart, wide, far, impl="cpu"), want[0])
    one = image[:1].expand(30, -1)
    same = fastood.ebm_loss(one.contiguous(), text, labels, impl="cpu")
    assert torch.equal(fastood.ebm_loss(one, text, labels.to(torch.int32), impl="cpu"), same)


def test_only_what_is_wanted_and_the_same_without_gradients(kernels):
    image, text, labels = clip_like(20, 30, 24)
    loss, d_image, d_text = loss_and_gradients(image, text, labels, impl="cpu")
    for which, want in ((0, d_image), (1, d_text)):
        given = [image.clone(), text.clone()]
        given[which].requires_grad_()
        (3 * fastood.ebm_loss(*given, labels, impl="cpu")).backward()
        assert torch.equal(given[which].grad, want) and given[1 - which].grad is None
    assert torch.equal(fastood.ebm_loss(image, text, labels, impl="cpu"), loss)
    with torch.no_grad():
        text.requires_grad_()
        assert not fastood.ebm_loss(image, text, labels, impl="cpu").requires_grad


def test_the_bound(kernels):
    """Derived: E2 - E0 <= ΔE_1, for the sign mask and, if s_y1 >= 0, for kept shares."""
    image, text, labels = clip_like(60, 20, 32)
    s = fastood.ClassBank(text).similarities(image).image
    delta = fastood.delta_energy(similarity=s, tau=0.05)
    for keep in (None, 0.1, 0.5, 0.9):
        mask = {"mask": "sign"} if keep is None else {"mask": "topp", "keep": keep}
        for i in range(60):
            one = (image[i : i + 1], text, labels[i : i + 1])
            with_term, without = (
                fastood.ebm_loss(*one, tau=0.05, weight=w, ce_on="original", impl="cpu", **mask)
                for w in (1.0, 0.0)
            )
            if keep is None:
                assert without - with_term <= 1e-5
            if keep is None or s[i].max() >= 0:
                assert without - with_term <= delta[i] + 1e-5


def test_diagnostics(kernels):
    image, text, labels = clip_like(40, 30, 24, dtype=torch.float64)
    s = fastood.ClassBank(text).similarities(image).image
    best = s.argmax(dim=-1)
    z = image / image.norm(dim=-1, keepdim=True)
    t = (text / text.norm(dim=-1, keepdim=True))[best]
    st = (z * t).clamp(min=0).sum(dim=-1)
    want = torch.stack([(s / 0.05).softmax(-1).amax(-1).mean(), (st - s.amax(-1)).mean()])
    for edit_all in (False, True):
        found = energy_bound(
            image.float(), text.float(), labels, tau=0.05, weight=0.1, kept=0, edit_all=edit_all
        )
        torch.testing.assert_close(found.diagnostics.double(), want, rtol=1e-5, atol=1e-7)


def test_bad_rows_and_labels_are_named(kernels):
    image, text, labels = clip_like(6, 5, 8)
    for value, message in ((math.nan, "NaN or Inf in row 2"), (0.0, "zero vector.* row 2")):
        for name in ("image", "text"):
            given = {"image": image.clone(), "text": text.clone()}
            given[name][2] = value
            for impl in ("cpu", "reference"):
                with pytest.raises(ValueError, match=f"{name}: .*{message}"):
                    fastood.ebm_loss(**given, labels=labels, impl=impl)
    for label in (-1, 5):
        wrong = labels.clone()
        wrong[3] = label
        with pytest.raises(ValueError, match=r"labels: expected values in 0..4 \(K = 5\), got"):
            energy_bound(image, text, wrong, tau=0.1, weight=0.1, kept=0)
    with pytest.raises(ValueError, match="float64"):
        fastood.ebm_loss(image.double(), text, labels, impl="cpu")
    with pytest.raises(ValueError, match=r"text: impl='cpu' takes classes \(K, D\)"):
        fastood.ebm_loss(image, text.expand(6, -1, -1), labels, impl="cpu")


def test_what_the_kernel_does_not_take_goes_to_the_reference(kernels):
    image, text, labels = clip_like(6, 5, 8)
    want = fastood.ebm_loss(image, text, labels, impl="reference")
    torch.testing.assert_close(fastood.ebm_loss(image, text.expand(6, -1, -1), labels), want)
    z, t = image.double(), text.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: fastood.ebm_loss(z, t, labels, tau=0.3), t)


def test_banks(kernels):
    image, text, labels = clip_like(6, 5, 8)
    (t,) = (text.clone().requires_grad_(),)
    unit = image / image.norm(dim=-1, keepdim=True)
    for impl in ("cpu", "reference"):
        want = fastood.ebm_loss(image, text, labels, impl=impl)
        got = fastood.ebm_loss(image, fastood.ClassBank(text), labels, impl=impl)
        torch.testing.assert_close(got, want)
        ready = fastood.ClassBank(fastood.ClassBank(text).text, normalize=False)
        torch.testing.assert_close(fastood.ebm_loss(unit, ready, labels, impl=impl), want)
    grads = [
        torch.autograd.grad(fastood.ebm_loss(image, given, labels, impl="cpu"), t)[0]
        for given in (fastood.ClassBank(t), t)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_refused(kernels):
    image, text, labels = clip_like(6, 5, 8)
    text.requires_grad_()
    loss = fastood.ebm_loss(image, text, labels, impl="cpu")
    with pytest.raises(RuntimeError, match="impl='reference'"):
        torch.autograd.grad(loss, text, create_graph=True)


# ------------------------------------------------------------------------------ the operator


def arguments(image, text, labels, **options):
    chosen = {
        "tau": 0.1, "weight": 0.3, "kept": 0, "by_label": False, "edit_all": False,
        "ce_original": False, "renorm": False, "normalize_image": True, "normalize_text": True,
        "wants_image": True, "wants_text": True, **options,
    }  # fmt: skip
    return (image, text, labels, *chosen.values())


@pytest.mark.parametrize(("wants_image", "wants_text"), [(False, True), (True, True)])
def test_the_operator_itself(wants_image, wants_text):
    image, text, labels = clip_like(5, 7, 8)
    image.requires_grad_(wants_image)
    text.requires_grad_(wants_text)
    torch.library.opcheck(
        torch.ops.fastood.ebm_loss.default,
        arguments(image, text, labels, wants_image=wants_image, wants_text=wants_text),
    )


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_default_in_plain_torch(options, monkeypatch):
    monkeypatch.setattr(ebm, "_ROWS", 5)
    image, text, labels = clip_like(12, 7, 20, dtype=torch.float64)
    loss, _, d_image, d_text = ebm._default(
        *arguments(
            image,
            text,
            labels,
            kept=6 if options["mask"] == "topp" else 0,
            by_label=options["mask_by"] == "label",
            edit_all=options["edit"] == "all",
            ce_original=options["ce_on"] == "original",
            renorm=options["renorm"],
        )
    )
    want = loss_and_gradients(image, text, labels, tau=0.1, weight=0.3, keep=0.3, **options)
    for mine, true in zip((loss, 3 * d_image, 3 * d_text), want, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-11)


def test_compiled_as_one_graph(kernels):
    image, text, labels = clip_like(5, 7, 8)

    def loss(z, t):
        return 2 * fastood.ebm_loss(z, t.sin(), labels, tau=0.1)

    found = []
    for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
        z, t = image.clone().requires_grad_(), text.clone().requires_grad_()
        value = f(z, t)
        value.backward()
        found.append((value.detach(), z.grad, t.grad))
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


def test_memory_stays_below_the_similarities(kernels):
    code = """
        import torch, fastood
        torch.set_num_threads(2)

        def step(b, k=4000, d=16):
            text = torch.randn(k, d, requires_grad=True)
            image, labels = torch.randn(b, d), torch.randint(k, (b,))
            fastood.ebm_loss(image, text, labels, impl="cpu").backward()

        step(300)
        peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
        before = peak()
        step(8000)  # 128 MB of similarities
        print(peak() - before)
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert int(out) < 16 * 1024  # KiB
