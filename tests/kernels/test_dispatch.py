"""Which kernel computes a call on a GPU, in which precision, and what happens if it cannot."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastood
from fastood.errors import KernelError
from fastood.ops import dispatch, ebm, gpu, grouped, library, patches, requests, rows
from fastood.ops.explain import explain
from fastood.scores import ClassBank
from fastood.scores.compute import score_rows
from tests import tolerances
from tests.conftest import clip_like
from tests.ops.rows import every_request

B, K, D = 6, 7, 16
IMAGE, TEXT, LABELS = clip_like(B, K, D)
LOCAL = clip_like(B * 3, K, D, seed=4)[0].view(B, 3, D)
NEGATIVES = clip_like(1, 10, D, seed=5)[1]
BANK = ClassBank(TEXT, negatives=NEGATIVES, groups=2, impl="reference")

CALLS = {
    "mcm": lambda z, zl, t, n, y, **o: fastood.mcm(z, t, **o),
    "bank": lambda z, zl, t, n, y, **o: fastood.energy(z, ClassBank(t), **o),
    "score": lambda z, zl, t, n, y, **o: fastood.score(z, t, methods=["energy"], **o),
    "statistics": lambda z, zl, t, n, y, **o: fastood.row_statistics(z, t, **o),
    "l_mcm": lambda z, zl, t, n, y, **o: fastood.l_mcm(zl, t, **o),
    "gl_mcm": lambda z, zl, t, n, y, **o: fastood.gl_mcm(z, zl, t, **o),
    "neg_label": lambda z, zl, t, n, y, **o: fastood.neg_label(z, t, n, groups=2, **o),
    "ebm": lambda z, zl, t, n, y, **o: fastood.ebm_loss(z, t, y, **o),
    "locoop": lambda z, zl, t, n, y, **o: fastood.locoop_loss(z, zl, t, y, top_k=2, **o),
}
EVERY = pytest.mark.parametrize("name", CALLS)


def inputs():
    return IMAGE, LOCAL, TEXT, NEGATIVES, LABELS


def on_cuda(mode, *, gradients):
    """The same without values, and a bank of them, as if there were a GPU."""
    given = [mode.from_tensor(x).to("cuda") for x in inputs()]
    bank = copy.copy(BANK)
    bank.text = mode.from_tensor(bank.text).to("cuda")
    bank.negatives = mode.from_tensor(bank.negatives).to("cuda")
    for x in (*given[:4], bank.text, bank.negatives):
        x.requires_grad_(gradients)
    return given, bank


def called(name, given, bank, **options):
    if name == "neg_label":
        return fastood.neg_label(given[0], bank, **options)
    return CALLS[name](*given, **options)


@pytest.fixture
def usable(monkeypatch):
    """A machine whose GPUs run the kernels, as far as anyone asks."""
    monkeypatch.delenv("FASTOOD_IMPL", raising=False)
    monkeypatch.setattr(dispatch, "triton_refuses", lambda device: None)


@pytest.fixture
def preferred(monkeypatch, device):
    """CPU tensors are taken for CUDA tensors: nobody demands the kernels that are chosen."""
    monkeypatch.delenv("FASTOOD_IMPL", raising=False)
    monkeypatch.setattr(dispatch, "_open", lambda tensors: "triton")
    monkeypatch.setattr(dispatch, "_warned", set())


# ------------------------------------------------------------------------------ the choice


def test_cuda_tensors_take_triton_unless_they_are_float64_or_transformed(usable):
    with FakeTensorMode():
        z, t = (torch.empty(4, D, device="cuda") for _ in range(2))
        types = (torch.float32, torch.bfloat16, torch.float16)
        assert {dispatch.choose(None, z.to(a), t.to(b)) for a in types for b in types} == {"triton"}
        assert dispatch.choose(None, z.double(), t) == "reference"
        assert dispatch.choose("triton", z, t, precision="tf32") == "triton"
        assert dispatch.choose("reference", z, t, precision="fp32") == "reference"
        for refused in ("triton", "cuda", "cpu"):
            with pytest.raises(ValueError, match=r"float64|CPU tensors"):
                dispatch.choose(refused, z.double(), t)
        with pytest.raises(
            ValueError, match=r"^precision: 'fp16' is for .* float64 is computed in"
        ):
            dispatch.choose(None, z.double(), t, precision="fp16")
        with pytest.raises(ValueError, match=r"^impl: 'cpu' takes CPU tensors, got one on cuda"):
            dispatch.choose("cpu", z, t)
        with pytest.raises(ValueError, match="'fp16' is for the kernels of a GPU; the reference"):
            dispatch.choose("reference", z, t, precision="fp16")
    chosen = []
    torch.func.vmap(lambda z: chosen.append(dispatch.choose(None, z)) or z)(IMAGE)
    assert chosen == ["reference"]
    with pytest.raises(ValueError, match=r"^impl: 'triton' knows neither torch\.func nor"):
        torch.func.vmap(lambda z: fastood.mcm(z[None], TEXT, impl="triton")[0])(IMAGE)


def test_what_cannot_be_had_is_the_reference_or_says_why(monkeypatch):
    monkeypatch.delenv("FASTOOD_IMPL", raising=False)
    monkeypatch.setattr(dispatch, "triton_refuses", lambda device: "Old GPU has capability 7.0")
    with FakeTensorMode():
        z = torch.empty(4, D, device="cuda")
        assert dispatch.choose(None, z) == "reference"
        assert dispatch.choose(None, z, precision="fp32") == "reference"
        with pytest.raises(ValueError, match=r"^precision: 'fp16' .* \(Old GPU has capability 7"):
            dispatch.choose(None, z, precision="fp16")
        with pytest.raises(ValueError, match=r"^impl: 'triton' is not to be had here: Old GPU"):
            dispatch.choose("triton", z)


@EVERY
@pytest.mark.parametrize("impl", [None, "triton", "reference"])
def test_of_tensors_on_two_devices_that_is_said_first(usable, monkeypatch, name, impl):
    monkeypatch.setattr("fastood.scores.inputs.must_check", lambda x: False)
    monkeypatch.setattr("fastood.scores.bank.choose", lambda *_: "reference")  # banks are there
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = [mode.from_tensor(x) for x in inputs()]
        given[2] = torch.empty(K, D, device="cuda")
        with pytest.raises(ValueError, match=r"(text|local|negatives): expected on c[a-z0-9:]+ li"):
            CALLS[name](*given, impl=impl)


@pytest.mark.parametrize("name", ["statistics", "neg_label", "ebm", "locoop"])
def test_cuda_has_global_and_local_scores(monkeypatch, name):
    monkeypatch.setattr("fastood.scores.bank.choose", lambda *_: "reference")
    for module in ("scores.statistics", "scores.grouped", "tuning.ebm", "tuning.locoop"):
        monkeypatch.setattr(f"fastood.{module}.choose", lambda *_, **__: "cuda")
    with pytest.raises(ValueError, match=r"^impl: 'cuda' has global and local scores without grad"):
        CALLS[name](*inputs(), impl="cuda")


def test_cuda_has_no_gradients(monkeypatch):
    for module in ("scores.compute", "scores.local"):
        monkeypatch.setattr(f"fastood.{module}.choose", lambda *_, **__: "cuda")
    z = IMAGE.clone().requires_grad_()
    for call in (
        lambda: fastood.mcm(z, TEXT, impl="cuda"),
        lambda: fastood.mcm(similarity=z, impl="cuda"),
        lambda: fastood.l_mcm(LOCAL.clone().requires_grad_(), TEXT, impl="cuda"),
    ):
        with pytest.raises(ValueError, match="not gradients or graphs"):
            call()


@pytest.mark.parametrize("name", ["mcm", "statistics", "l_mcm", "gl_mcm", "locoop"])
def test_a_precision_needs_a_product(device, name):
    """Similarities at hand and classes of every image's own are not multiplied by the kernels."""
    each = TEXT.expand(B, -1, -1).to(device)
    z, zl, _, n, y = (x.to(device) for x in inputs())
    message = r"^precision: .* float32; expected None or 'fp32', got"
    with pytest.raises(ValueError, match=message):
        CALLS[name](z, zl, each, n, y, impl="triton", precision="fp16")


def test_heads_of_ones_own_multiply_for_themselves():
    class Own:
        def similarities(self, features, local=None):
            return ClassBank(TEXT).similarities(features, local)

    with pytest.raises(ValueError, match=r"^precision: this head multiplies, not the kernels"):
        fastood.score(IMAGE, Own(), methods=["mcm"], precision="fp16")
    fastood.score(IMAGE, Own(), methods=["mcm"], precision="fp32")


# ------------------------------------------------------------------------------ failures


def broken(*_, **__):
    raise KernelError("triton: _states does not compile here:\nptxas error: no such instruction")


def break_kernels(monkeypatch):
    modules = {
        "launch": SimpleNamespace(usable=lambda *_: None),
        "operands": SimpleNamespace(prepare=broken),
        "rows": SimpleNamespace(
            scores=broken, similarity_scores=broken, similarity_statistics=broken
        ),
        "grouped": SimpleNamespace(scores=broken, columns=broken),
        "patches": SimpleNamespace(local_scores=broken, local_similarity_scores=broken),
        "locoop": SimpleNamespace(patch_entropy=broken),
        "ebm": SimpleNamespace(loss=broken, op=broken),
    }
    for name, module in modules.items():
        monkeypatch.setitem(gpu.kernels.__dict__, name, module)


def values(found):
    if isinstance(found, dict):
        return list(found.values())
    return [found] if isinstance(found, torch.Tensor) else list(found)


FALLING = {
    **CALLS,
    "similarity": lambda z, zl, t, n, y, **o: fastood.mcm(similarity=z, **o),
    "local similarity": lambda z, zl, t, n, y, **o: fastood.l_mcm(similarity=zl, **o),
    "statistics of similarities": lambda z, zl, t, n, y, **o: fastood.row_statistics(
        similarity=z, **o
    ),
}


@pytest.mark.parametrize("name", FALLING)
def test_a_kernel_that_does_not_compile_is_reported_once_and_replaced(monkeypatch, preferred, name):
    break_kernels(monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [FALLING[name](*inputs()) for _ in range(3)]
    ours = [w for w in caught if issubclass(w.category, RuntimeWarning)]
    assert len(ours) == 1
    assert "ptxas error: no such instruction\nthe reference computes instead" in str(
        ours[0].message
    )
    want = FALLING[name](*inputs(), impl="reference")
    for got in found:
        for one, other in zip(values(got), values(want), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", FALLING)
def test_a_kernel_that_was_demanded_is_not_replaced(monkeypatch, preferred, name):
    break_kernels(monkeypatch)
    demands = [{"impl": "triton"}]
    if "similarit" not in name:
        demands.append({"precision": "tf32"})
    for demand in demands:
        with pytest.raises(KernelError, match="no such instruction"):
            FALLING[name](*inputs(), **demand)


def test_operators_fall_back_unless_their_precision_has_a_name(monkeypatch, operators, preferred):
    break_kernels(monkeypatch)
    z, t = IMAGE.clone().requires_grad_(), TEXT
    with pytest.warns(RuntimeWarning, match="no such instruction"):
        fastood.energy(z, t).sum().backward()
    want = IMAGE.clone().requires_grad_()
    fastood.energy(want, t, impl="reference").sum().backward()
    torch.testing.assert_close(z.grad, want.grad)
    with pytest.raises(KernelError):
        fastood.energy(z, t, impl="triton")
    with pytest.raises(KernelError):
        torch.ops.fastood.row_statistics(IMAGE, t, None, [1.0], 1, False, "fp16")


def test_operators_of_what_the_kernels_do_not_take_are_plain_torch(operators, device):
    z, t = (x.to(device) for x in clip_like(5, 20, D)[:2])
    unit = torch.nn.functional.normalize
    for image, text, c in ((unit(z.double()), unit(t.double()), 2), (unit(z), unit(t), 9)):
        found = torch.ops.fastood.row_statistics(image, text, None, [0.1], c, True)
        want = rows._row_statistics(image, text, None, [0.1], c, True)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


# ------------------------------------------------------------------------------ crossover, library


def test_where_the_library_is_faster_it_is_taken(monkeypatch, tmp_path):
    assert gpu._library_is_faster() == ()  # nobody measured anything yet
    assert gpu.fused_pays("rows", "fp16", 1, 1, 1)
    table = tmp_path / "crossover.json"
    entry = {"family": "rows", "precision": "fp16", "B": [4096, None], "K": [None, 512]}
    table.write_text(json.dumps({"measured": "GPU", "library": [entry]}))
    monkeypatch.setattr(gpu, "_TABLE", table)
    gpu._library_is_faster.cache_clear()
    try:
        assert not gpu.fused_pays("rows", "fp16", 4096, 512, 768)
        assert gpu.fused_pays("rows", "fp16", 4095, 512, 768)
        assert gpu.fused_pays("rows", "fp16", 4096, 513, 768)
        assert gpu.fused_pays("rows", "bf16", 4096, 512, 768)
        assert gpu.fused_pays("patches", "fp16", 4096, 512, 768)
    finally:
        gpu._library_is_faster.cache_clear()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp16x3", "fp32"])
def test_the_library_computes_the_same(monkeypatch, device, precision):
    image, text, _ = clip_like(20, 9, 24)
    local = clip_like(12, 9, 24, seed=7)[0].view(4, 3, 24)
    asked = every_request(9, 0.1)[2:6]
    image, text, local = (x.to(device) for x in (image, text, local))
    options = {"impl": "triton", "precision": precision}
    fused = score_rows(asked, image, text, None, classes=True, **options)
    patch = fastood.l_mcm(local, text, tau=0.1, **options)
    monkeypatch.setattr(gpu, "fused_pays", lambda *_: False)
    monkeypatch.setattr("fastood.scores.inputs.BLOCK", 50)  # several blocks
    other = score_rows(asked, image, text, None, classes=True, **options)
    assert torch.equal(other.classes, fused.classes)
    tolerance = {"rtol": tolerances.SCORE_FROM_FEATURES_RTOL, "atol": 1e-6}
    torch.testing.assert_close(other.values, fused.values, **tolerance)
    bank = ClassBank(text, impl="triton")
    again = score_rows(asked, image, bank, None, **options)
    torch.testing.assert_close(again.values, other.values, **tolerance)
    torch.testing.assert_close(fastood.l_mcm(local, text, tau=0.1, **options), patch, **tolerance)


def test_limits_are_those_of_the_kernels():
    from fastood.kernels import rows as kernel

    assert (gpu.MOST_TOPS, requests.MAX_TAUS) == (kernel.MAX_C, kernel.MAX_TAUS)


# ------------------------------------------------------------------------------ what a bank keeps


def test_a_bank_prepares_once_for_each_precision_and_nobody_else_gets_it(device):
    bank = ClassBank(TEXT.to(device), negatives=NEGATIVES.to(device), groups=2, impl="triton")
    for prepared in (bank.operand, bank.columns):
        assert prepared("fp16") is prepared("fp16")
        assert prepared("fp16") is not prepared("fp32")
        with pytest.raises(ValueError, match=r"^precision: expected None or one of 'fp16'"):
            prepared("half")
    assert bank.as_is().operand("fp16") is bank.operand("fp16")
    assert bank.operand("fp16").high.dtype == torch.float16
    for other in (pickle.loads(pickle.dumps(bank)), copy.copy(bank), bank.to(torch.float32)):
        assert not other._kept
        assert torch.equal(other.operand("fp16").high, bank.operand("fp16").high)
    with torch.inference_mode():
        made = ClassBank(TEXT.to(device), impl="triton")
        made.operand("fp32")
    assert not made.operand("fp32").high.is_inference()
    with pytest.raises(ValueError, match="negatives: this ClassBank holds none"):
        made.columns("fp16")


# ------------------------------------------------------------------------------ no GPU, its graphs


@pytest.mark.parametrize("name", [name for name in CALLS if name != "ebm"])
def test_graphs_of_cuda_tensors_stay_on_the_device_and_wait_for_nothing(usable, monkeypatch, name):
    """Shapes and devices alone: a value that is read, or a tensor elsewhere, is an error."""
    with FakeTensorMode() as mode:
        for found in values(called(name, *on_cuda(mode, gradients=True))):
            assert found.is_cuda
            assert found.requires_grad == found.is_floating_point()


def test_the_reference_on_cuda_tensors_waits_for_nothing(monkeypatch):
    monkeypatch.setenv("FASTOOD_IMPL", "reference")
    with FakeTensorMode() as mode:
        given, bank = on_cuda(mode, gradients=False)
        for name in CALLS:
            assert all(x.is_cuda for x in values(called(name, given, bank)))
        for options in ({"mask": "topp"}, {"edit": "all", "renorm": True, "mask_by": "label"}):
            assert fastood.ebm_loss(given[0], given[2], given[4], **options).is_cuda


def test_defaults_on_cuda_tensors_stay_there_and_wait_for_nothing():
    with FakeTensorMode() as mode:
        z, zl, t, n, y = (mode.from_tensor(x).to("cuda") for x in inputs())
        n = n.view(2, 5, D)
        found = rows._row_statistics(z, t, None, [0.1, 1.0], 2, True)
        g = rows._gradient_of(
            rows.RowStatistics(*found), [torch.ones_like(x) for x in found], [0.1, 1.0], K
        )
        rest = (g.best, g.shift, g.coefficients, found[1], g.tops)
        outputs = [*found, *rest]
        outputs += rows._row_statistics_backward(z, t, None, [0.1, 1.0], *rest, True, True)
        outputs.append(
            rows._similarity_statistics_backward(torch.rand(B, K, device="cuda"), [0.1, 1.0], *rest)
        )
        scores, lse = grouped._grouped(z, t, n, None, None, 1, 0.1)
        outputs += [scores, lse]
        outputs += grouped._grouped_backward(
            scores, z, t, n, None, None, lse, 1, 0.1, True, True, True
        )
        outputs += patches._patch_entropy(zl, t, y, 2, 0.1, True, True, True)
        for kept, flags in ((0, (False,) * 4), (3, (True,) * 4), (D, (False, True, False, True))):
            outputs += ebm._default(z, t, y, 0.1, 0.1, kept, *flags, True, True, True, True)
        assert all(x.is_cuda for x in outputs)


def test_defaults_are_taken_without_autocast():
    run = library._as_given(lambda a, b: a @ b.mT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(IMAGE, TEXT).dtype == torch.float32
    assert (IMAGE @ TEXT.mT).equal(run(IMAGE, TEXT))


def test_labels_outside_make_a_loss_nan_and_index_nothing():
    inside, factor = gpu.within(torch.tensor([0, 6, 3]), K)
    assert inside.tolist() == [0, 6, 3] and factor == 1
    inside, factor = gpu.within(torch.tensor([-100, 7, 3]), K)
    assert inside.tolist() == [0, 6, 3] and factor.isnan()


# ------------------------------------------------------------------------------ said in words


def test_the_choice_in_words(usable, monkeypatch, device):
    with FakeTensorMode():
        z, t = torch.empty(1024, 512, device="cuda"), torch.empty(1000, 512, device="cuda")
        assert explain(z, t).startswith("triton, precision fp16x3 (features are float32): fused, ")
        assert "tiles of" in explain(z, t) and explain(z, t).endswith("(CUDA tensors)")
        halves = explain(z.half(), t, prepared=True)
        assert halves.startswith("triton, precision fp16 (features are float16)")
        assert "(asked for)" in explain(z, t, precision="tf32")
        assert "library's product" in explain(z, t, impl="cuda")
        assert explain(z.double(), t) == "reference (float64 features)"
        assert explain(z.double(), t, impl="triton").startswith("refused: impl: 'triton' computes")
        monkeypatch.setattr(gpu, "fused_pays", lambda *_: False)
        assert "measured faster here" in explain(z, t)
        monkeypatch.setattr(dispatch, "triton_refuses", lambda device: "Triton is not installed")
        assert explain(z, t) == "reference, float32 products (Triton is not installed)"
    assert explain(IMAGE, TEXT, impl="reference").endswith("(impl asks for it)")
