"""The energy-bound loss by the Triton kernels: value, diagnostics and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastood.kernels import ebm, ebm_backward, ebm_forward
from fastood.ops import ebm as default
from fastood.tuning.ebm import _ebm_loss
from tests import tolerances
from tests.conftest import clip_like

FLAGS = ("by_label", "ce_original", "renorm")
OPTIONS = [
    dict(zip(FLAGS, chosen, strict=True)) for chosen in itertools.product((False, True), repeat=3)
]
SMALL = (19, 40, 35)


def clip(*shape, device="cpu", dtype=torch.float32):
    image, text, labels = clip_like(*shape)
    return image.to(device, dtype), text.to(device, dtype), labels.to(device)


def kernel(image, text, labels, *, upstream=3.0, **options):
    """Loss, diagnostics and gradients of ``upstream`` times the loss."""
    chosen = {"tau": 0.01, "weight": 0.3, **options}
    z, t = image.detach().requires_grad_(), text.detach().requires_grad_()
    found = ebm.loss(z, t, labels, **chosen)
    return (
        found.loss.detach(),
        found.diagnostics,
        *torch.autograd.grad(found.loss * upstream, (z, t)),
    )


def truth(image, text, labels, *, upstream=3.0, precision=None, **options):
    """The same by the specification in float64."""
    chosen = {
        "tau": 0.01, "weight": 0.3, "kept": 0, "by_label": False, "edit_all": False,
        "ce_original": False, "renorm": False, "normalize_image": True, "normalize_text": True,
        **options,
    }  # fmt: skip
    found = default._default(image.double(), text.double(), labels, *chosen.values(), True, True)
    return (*found[:2], upstream * found[2], upstream * found[3])


def eager(image, text, labels, *, upstream=3.0, by_label=False, ce_original=False, renorm=False):
    """Loss and gradients in eager torch, in the features' own dtype."""
    z, t = image.detach().requires_grad_(), text.detach().requires_grad_()
    unit = [x / torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (z, t)]
    names = "label" if by_label else "top1", "top1", "original" if ce_original else "edited"
    value = _ebm_loss(*unit, labels, 0.01, 0.3, 0, *names, renorm).loss
    return (value.detach(), *torch.autograd.grad(value * upstream, (z, t)))


def error(found, want):
    return float((found.double() - want).abs().max() / want.abs().max())


def assert_follows(found, want):
    """As ``tests/ops/test_ebm.py`` asks of the kernel of the CPU."""
    torch.testing.assert_close(found[0].double(), want[0], rtol=5e-6, atol=2e-6)
    torch.testing.assert_close(found[1].double(), want[1], rtol=1e-5, atol=1e-6)
    for mine, true in zip(found[2:], want[2:], strict=True):
        atol = tolerances.GRADIENT_RTOL * float(true.abs().max()) + 1e-7
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=atol)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_option(device, options):
    given = clip(*SMALL, device=device)
    assert_follows(kernel(*given, **options), truth(*given, **options))
    assert_follows(kernel(*given, tau=1.0, **options), truth(*given, tau=1.0, **options))


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 1, 17), (1, 2, 33), (33, 100, 16), (9, 31, 70)])
def test_every_shape(device, shape):
    given = clip(*shape, device=device)
    options = {"weight": 0.7, "renorm": True}
    assert_follows(kernel(*given, **options), truth(*given, **options))


def test_more_images_than_are_added_up_at_a_time(device):
    given = clip(290, 3, 16, device=device)
    assert_follows(kernel(*given), truth(*given))


@pytest.mark.parametrize("precision", ["fp32", "fp16x3", "tf32", "fp16", "bf16"])
def test_precisions_of_float32_features(device, precision):
    """Float32 grade, or no worse than eager torch in the dtype whose mantissa is used."""
    image, text, labels = clip(*SMALL, device=device)
    options = {"by_label": True, "ce_original": False}
    want = truth(image, text, labels, **options)
    found = kernel(image, text, labels, precision=precision, **options)
    if precision in ("fp32", "fp16x3"):
        assert_follows(found, want)
        return
    half = torch.bfloat16 if precision == "bf16" else torch.float16
    plain = eager(image.to(half), text.to(half), labels, **options)
    for mine, theirs, true in zip((found[0], *found[2:]), plain, (want[0], *want[2:]), strict=True):
        assert error(mine, true) <= error(theirs, true) + tolerances.GRADIENT_RTOL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[7]], ids=["plain", "all"])
def test_half_precision_errs_less_than_eager(device, dtype, options):
    given = clip(*SMALL, device=device, dtype=dtype)
    want, found, plain = (
        truth(*given, **options),
        kernel(*given, **options),
        eager(*given, **options),
    )
    assert found[0].dtype == torch.float32 and found[2].dtype == found[3].dtype == dtype
    for mine, theirs, true in zip((found[0], *found[2:]), plain, (want[0], *want[2:]), strict=True):
        assert error(mine, true) <= error(theirs, true) + tolerances.GRADIENT_RTOL


def test_half_precision_at_float32_grade(device):
    """Two different kinds are both split, and only the gradients' own dtype rounds."""
    image, text, labels = clip(*SMALL, device=device)
    image = image.half()
    want, found = truth(image, text, labels), kernel(image, text, labels)
    assert found[2].dtype == torch.float16 and found[3].dtype == torch.float32
    assert_follows((*found[:2], found[3]), (*want[:2], want[3]))
    torch.testing.assert_close(found[2].double(), want[2], rtol=1e-3, atol=1e-3)


def test_features_as_they_come(device):
    image, text, labels = clip(20, 9, 16, device=device)
    z = 0.2 * image / image.norm(dim=-1, keepdim=True)
    for renorm in (False, True):
        options = {"normalize_image": False, "renorm": renorm, "tau": 0.05}
        assert_follows(kernel(z, text, labels, **options), truth(z, text, labels, **options))
    t = text / text.norm(dim=-1, keepdim=True)
    for flags in ((True, False), (False, False)):
        options = dict(zip(("normalize_image", "normalize_text"), flags, strict=True), tau=0.05)
        assert_follows(kernel(z, t, labels, **options), truth(z, t, labels, **options))


@pytest.mark.parametrize("ce_original", [False, True])
def test_sure_and_undecided_images(device, ce_original):
    """Others 1e4 logits away; probabilities that differ from 1 by 1e-9; all classes alike."""
    eye, labels = torch.eye(8, device=device), torch.arange(8, device=device)
    labels[7] = 0
    options = {"ce_original": ce_original}
    given = eye, eye, labels
    assert_follows(kernel(*given, tau=1e-4, **options), truth(*given, tau=1e-4, **options))
    sure = eye + 0.3, eye + 0.3, torch.arange(8, device=device)
    want, found = (f(*sure, tau=0.02, weight=0.0, upstream=1e9, **options) for f in (truth, kernel))
    assert 0 < float(want[0]) < 1e-8
    for mine, true in zip((found[0], *found[2:]), (want[0], *want[2:]), strict=True):
        assert error(mine, true) < 1e-4
    flat = clip(6, 12, 20, device=device)
    options["tau"] = 1e4
    assert_follows(kernel(*flat, **options), truth(*flat, **options))


def test_large_weights_and_norms_and_masks_that_keep_nothing(device):
    image, text, labels = clip(12, 5, 16, device=device)
    want, found = (f(image, text, labels, weight=3e6) for f in (truth, kernel))
    for mine, true in zip(found, want, strict=True):
        assert error(mine, true) < tolerances.GRADIENT_RTOL
    plain = kernel(image, text, labels)
    scaled = kernel(image * 1e25, text * 1e-22, labels)
    torch.testing.assert_close(scaled[0], plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled[3] * 1e-22, plain[3], rtol=1e-4, atol=1e-4)
    # one class, every element of the other sign: no product is positive
    away = -text[:1] * torch.linspace(0.5, 1.5, 16, device=device)
    given = text[:1], away, torch.zeros(1, dtype=torch.int64, device=device)
    for renorm in (False, True):
        options = {"weight": 1.0, "renorm": renorm}
        assert_follows(kernel(*given, **options), truth(*given, **options))


@pytest.mark.parametrize("twin", [9, 33, 75])
def test_of_equal_classes_the_first_is_best(device, twin):
    """In one tile, in the next, in another program's part."""
    image, text, _ = clip(3, 80, 16, device=device)
    text[4] = text[twin] = image[0]
    labels = torch.full((3,), 20, device=device)
    options = {"tau": 0.1, "weight": 0.7}
    found, want = kernel(image, text, labels, **options), truth(image, text, labels, **options)
    assert_follows(found, want)
    assert not torch.allclose(found[3][4], found[3][twin])


def test_strides(device):
    # all rows lie multiples of 16 apart: others get another program, whose last bits differ
    image, text, labels = clip(17, 20, 32, device=device)
    want = kernel(image, text, labels)
    apart = torch.stack([image, -image], dim=-1)[..., 0]
    wide = torch.cat([text, -text], dim=1)[:, :32]
    far = torch.stack([labels, -labels], dim=1)[:, 0]
    for given in ((apart, text, labels), (image, wide, far), (image, text, labels.int())):
        for mine, other in zip(kernel(*given), want, strict=True):
            assert torch.equal(mine, other)
    for mine, other in zip(
        kernel(image[:1].expand(17, -1), text, labels),
        kernel(image[:1].repeat(17, 1), text, labels),
        strict=True,
    ):
        assert torch.equal(mine, other)


def test_same_bits_again_and_upstream_from_the_device(device):
    given = clip(*SMALL, device=device)
    first = kernel(*given)
    for mine, other in zip(kernel(*given), first, strict=True):
        assert torch.equal(mine, other)
    image, text, labels = given
    text.requires_grad_()
    value = ebm.loss(image, text, labels, tau=0.01, weight=0.3).loss
    value.backward(torch.tensor([7.0, 3.0], device=device)[1])
    assert torch.equal(text.grad, first[3])


def test_only_what_is_wanted(device):
    image, text, labels = clip(*SMALL, device=device)
    options = {"tau": 0.01, "weight": 0.3}
    value, diagnostics, *want = kernel(image, text, labels)
    for which in (0, 1):
        given = [image.clone(), text.clone()]
        given[which].requires_grad_()
        (3 * ebm.loss(*given, labels, **options).loss).backward()
        assert torch.equal(given[which].grad, want[which]) and given[1 - which].grad is None
    plain = ebm.loss(image, text, labels, **options)
    assert torch.equal(plain.loss, value) and torch.equal(plain.diagnostics, diagnostics)
    assert not plain.loss.requires_grad
    found = ebm.loss(image, text.requires_grad_(), labels, **options)
    assert found.loss.requires_grad and not found.diagnostics.requires_grad
    with torch.no_grad():
        assert not ebm.loss(image, text, labels, **options).loss.requires_grad


def test_the_loss_may_be_changed_in_place_and_the_classes_not(device):
    image, text, labels = clip(5, 4, 16, device=device)
    want = kernel(image, text, labels, upstream=0.25)
    text.requires_grad_()
    value = ebm.loss(image, text, labels, tau=0.01, weight=0.3).loss
    value /= 4
    value.backward()
    torch.testing.assert_close(text.grad, want[3])
    value = ebm.loss(image, text, labels, tau=0.01, weight=0.3).loss
    with torch.no_grad():
        text.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        value.backward()


def test_second_derivatives_are_refused(device):
    image, text, labels = clip(5, 4, 16, device=device)
    text.requires_grad_()
    for kept in (0, 3):
        value = ebm.loss(image, text, labels, tau=0.1, weight=0.3, kept=kept).loss
        with pytest.raises(RuntimeError, match="impl='reference'"):
            torch.autograd.grad(value, text, create_graph=True)


@pytest.mark.parametrize("where", ["image", "text"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's
def test_bad_rows_give_nan(device, where, value):
    image, text, labels = clip(5, 40, 16, device=device)
    row = (image if where == "image" else text)[2]
    if value == 0.0:
        row.zero_()
    else:
        row[1] = value
    found = kernel(image, text, labels)
    assert found[0].isnan()
    assert found[3].isnan().all()
    assert found[2].isnan().any(dim=1)[2]


@pytest.mark.parametrize("label", [-1, 40, 2**40, -(2**31)])
@pytest.mark.parametrize("by_label", [False, True])
def test_labels_of_no_class_give_nan(device, label, by_label):
    image, text, labels = clip(5, 40, 16, device=device)
    labels[3] = label
    found = kernel(image, text, labels, by_label=by_label)
    assert found[0].isnan() and found[3].isnan().all() and found[2][3].isnan().all()
    assert found[1].isfinite().all()


class _Allocations(TorchDispatchMode):
    """Elements of every tensor made; operators that do more than make or look at one."""

    def __init__(self):
        super().__init__()
        self.elements, self.others = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == "empty":
            self.elements += out.numel()
        elif name not in ("detach", "alias", "view", "ones_like"):
            self.others.append(name)
        return out


def test_launches_and_memory(device, monkeypatch):
    """Two launches forward, one back for each gradient, and nothing else that computes."""
    launched = []

    def record(kernel, grid, *arguments, **options):
        launched.append(kernel.fn.__name__ if hasattr(kernel, "fn") else str(kernel))

    for module in (ebm_forward, ebm_backward):
        monkeypatch.setattr(module, "launch", record)
    b, k, d = 4096, 1000, 32
    image, text = torch.randn(b, d, device=device), torch.randn(k, d, device=device)
    labels = torch.zeros(b, dtype=torch.int64, device=device)
    for wanted, backward in (((text,), 1), ((image, text), 2)):
        for x in (image, text):
            x.grad = None
            x.requires_grad_(any(x is w for w in wanted))
        launched.clear()
        with _Allocations() as made:
            ebm.loss(image, text, labels, tau=0.01, weight=0.1).loss.backward()
        assert len(launched) == 2 + backward, launched
        assert not made.others
        assert made.elements < b * k / 10


@pytest.mark.parametrize("options", [{"kept": 5}, {"edit_all": True}])
def test_what_the_kernels_do_not_know_is_done_in_blocks(device, options):
    given = clip(9, 7, 16, device=device)
    assert ebm.supported(*given[:2], **options) is not None
    assert ebm.supported(*given[:2]) is None
    assert_follows(kernel(*given, **options), truth(*given, **options))
    no_grad = ebm.loss(*given, tau=0.01, weight=0.3, **options)
    assert torch.equal(no_grad.loss, kernel(*given, **options)[0])


@pytest.mark.parametrize("kept", [0, 5])
def test_the_operators_implementation(device, kept):
    image, text, labels = clip(*SMALL, device=device)
    arguments = 0.01, 0.3, kept, True, False, False, True, True, True
    value, diagnostics, d_image, d_text = ebm.op(image, text, labels, *arguments, True, True)
    want = kernel(image, text, labels, kept=kept, by_label=True, renorm=True, upstream=1.0)
    for mine, other in zip((value, diagnostics, d_image, d_text), want, strict=True):
        assert torch.equal(mine, other)
    half = ebm.op(image.half(), text.half(), labels, *arguments, False, True, "fp16x3")
    assert half[2].numel() == 0 and half[3].dtype == torch.float32
    with pytest.raises(ValueError, match="precision"):
        ebm.op(image, text, labels, *arguments, False, True, "fp8")
