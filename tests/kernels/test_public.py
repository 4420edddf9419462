"""Every public score and loss by the Triton kernels: against float64, shapes, bad rows, graphs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import fastood
from fastood.kernels.precision import PRECISIONS, resolve
from fastood.ops import gpu, rows
from fastood.scores import ClassBank
from tests import tolerances
from tests.conftest import clip_like
from tests.scores import oracle

B, K, D, P, GROUPS = 12, 9, 40, 3, 3

SCORES = {
    "max_similarity": (
        "max_similarity",
        {},
        lambda s, sl, sn: oracle.max_similarity(s),
    ),
    "max_logit": ("max_logit", {"tau": 0.1}, lambda s, sl, sn: s.max(-1).values / 0.1),
    "mcm": ("mcm", {}, lambda s, sl, sn: oracle.max_softmax(s, 1.0)),
    "msp": ("msp", {"tau": 0.05}, lambda s, sl, sn: oracle.max_softmax(s, 0.05)),
    "energy": ("energy", {"tau": 0.05}, lambda s, sl, sn: oracle.energy(s, 0.05)),
    "neg_entropy": ("neg_entropy", {}, lambda s, sl, sn: oracle.neg_entropy(s, 1.0)),
    "variance": ("variance", {"tau": 0.1}, lambda s, sl, sn: oracle.variance(s, 0.1)),
    "margin": ("margin", {"tau": None}, lambda s, sl, sn: oracle.margin(s)),
    "delta_energy": (
        "delta_energy",
        {"tau": 0.05, "c": 2, "reset": 0.0, "joint": False},
        lambda s, sl, sn: oracle.delta_energy(s, 0.05, 2, 0.0, False),
    ),
    "l_mcm": ("l_mcm", {"tau": 0.1}, lambda s, sl, sn: oracle.l_mcm(sl, 0.1)),
    "gl_mcm": (
        "gl_mcm",
        {"tau": 1.0, "weight": 0.5},
        lambda s, sl, sn: oracle.max_softmax(s, 1.0) + 0.5 * oracle.l_mcm(sl, 1.0),
    ),
    "neg_label": (
        "neg_label",
        {"tau": 0.05},
        lambda s, sl, sn: oracle.neg_label(
            s, sn, 0.05, torch.arange(sn.shape[1]).view(GROUPS, -1).tolist()
        ),
    ),
}
METHODS = {label: (name, options) for label, (name, options, _) in SCORES.items()}
WORKING = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float16}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def given(dtype=torch.float32, device="cpu"):
    image, text, _ = clip_like(B, K, D, dtype=dtype)
    local = clip_like(B * P, K, D, seed=3, dtype=dtype)[0].view(B, P, D)
    negatives = clip_like(1, 4 * GROUPS, D, seed=5, dtype=dtype)[1]
    return [x.to(device) for x in (image, local, text, negatives)]


def cosines(image, local, text, negatives):
    image, local, text, negatives = (x.cpu() for x in (image, local, text, negatives))
    sl = oracle.cosine(local.flatten(0, 1), text).unflatten(0, local.shape[:2])
    return oracle.cosine(image, text), sl, oracle.cosine(image, negatives)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def eager(dtype, image, local, text, negatives):
    """Errors of the similarities that a product of ``dtype`` rows leaves, the rest exact."""
    z, zl, t, n = (unit(x.cpu().to(dtype)) for x in (image, local, text, negatives))
    return [x.double() for x in (z @ t.T, zl @ t.T, z @ n.T)]


def bank_of(text, negatives, **options):
    return ClassBank(text, negatives=negatives, groups=GROUPS, seed=None, **options)


# ------------------------------------------------------------------------------ against float64


@pytest.mark.parametrize("precision", [None, *PRECISIONS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_score_errs_no_more_than_eager(device, dtype, precision):
    image, local, text, negatives = features = given(dtype, device)
    bank = bank_of(text, negatives, impl="triton")
    found = fastood.score(
        image, bank, methods=METHODS, local=local, impl="triton", precision=precision
    )
    exact = cosines(*features)
    rough = eager(WORKING.get(resolve(precision, image), torch.float32), *features)
    for label, (_, _, of) in SCORES.items():
        got, want = found[label].cpu(), of(*exact)
        assert got.dtype == torch.float32
        error = (got.double() - want).abs().max()
        scale = want.abs().max()
        allowed = tolerances.ROUNDING_LUCK * (of(*rough) - want).abs().max()
        allowed = allowed + tolerances.SCORE_FROM_FEATURES_RTOL * scale
        assert error <= allowed, (label, float(error), float(allowed))


@pytest.mark.parametrize("label", SCORES)
def test_one_by_one_with_plain_text_they_are_the_same_numbers(device, label):
    image, local, text, negatives = given(torch.float16, device)
    name, options, _ = SCORES[label]
    first = {"l_mcm": (local,), "gl_mcm": (image, local)}.get(name, (image,))
    score = getattr(fastood, name)
    bank = bank_of(text, negatives, impl="triton")
    alone = score(*first, bank, impl="triton", **options)
    both = fastood.score(image, bank, methods={label: (name, options)}, local=local, impl="triton")
    assert torch.equal(both[label], alone)
    if name == "neg_label":
        plain = score(image, text, negatives, groups=GROUPS, seed=None, impl="triton", **options)
    else:
        plain = score(*first, text, impl="triton", **options)
    assert torch.equal(plain, alone)
    again = score(*first, bank, impl="triton", **options)
    assert torch.equal(again, alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_similarities_at_hand(device, dtype):
    s = oracle.cosine(*clip_like(B, 30, D)[:2]).to(dtype).to(device)
    sl = oracle.cosine(*clip_like(B * P, 30, D, seed=2)[:2]).to(dtype).view(B, P, 30).to(device)
    exact = s.cpu().double(), sl.cpu().double()
    for label, (name, options, of) in SCORES.items():
        if name == "neg_label":
            continue
        inputs = {"similarity": sl if name == "l_mcm" else s}
        if name == "gl_mcm":
            inputs["local_similarity"] = sl
        got = getattr(fastood, name)(**inputs, **options, impl="triton").cpu()
        torch.testing.assert_close(
            got.double(),
            of(*exact, None),
            rtol=tolerances.SCORE_RTOL,
            atol=1e-7,
            msg=lambda m, label=label: f"{label}: {m}",
        )


@pytest.mark.parametrize("precision", ["fp16", "fp16x3"])
def test_statistics(device, precision):
    image, _, text, _ = given(device=device)
    options = {"taus": (0.1, 1.0), "moments": True}
    exact = oracle.cosine(image.cpu(), text.cpu())
    for c in (1, 3, K):
        found = fastood.row_statistics(
            image, text, c=c, impl="triton", precision=precision, **options
        )
        bank = ClassBank(text, impl="triton")
        # beyond, in float16 of rows whose norms were taken in another order: roundings differ
        near = partial(torch.allclose, rtol=1e-3, atol=5e-3, equal_nan=True)
        equal = torch.equal if c <= gpu.MOST_TOPS else near
        for one, other in zip(
            fastood.row_statistics(image, bank, c=c, impl="triton", precision=precision, **options),
            found,
            strict=True,
        ):
            assert equal(one, other)
        want = rows.statistics_of(exact, [0.1, 1.0], c, True)
        rough = rows.statistics_of(
            eager(WORKING.get(precision, torch.float32), image, image[:, None], text, text)[0],
            [0.1, 1.0],
            c,
            True,
        )
        assert torch.equal(found.classes.cpu(), want[1])
        for got, true, other in zip(found, want, rough, strict=True):
            finite = torch.isfinite(true)
            assert torch.equal(torch.isfinite(got.cpu()), finite)
            if not finite.any() or not true.is_floating_point():
                continue
            error, scale = (
                (got.cpu().double() - true)[finite].abs().max(),
                true[finite].abs().max(),
            )
            own = (other - true)[finite].abs().max()
            assert (
                error
                <= tolerances.ROUNDING_LUCK * own + tolerances.SCORE_FROM_FEATURES_RTOL * scale
            )


# ------------------------------------------------------------------------------ shapes


def test_more_top_classes_than_a_row_holds_and_more_temperatures_than_a_pass(device):
    image, text, _ = (x.to(device) for x in clip_like(7, 20, D))
    exact = oracle.cosine(image.cpu(), text.cpu())
    taus = [0.05 + 0.01 * i for i in range(20)]
    methods = {f"energy {tau:.2f}": ("energy", {"tau": tau}) for tau in taus}
    for c in (1, 8, 9, 20):
        methods[f"delta {c}"] = ("delta_energy", {"c": c, "tau": 0.1})
    found = fastood.score(image, text, methods=methods, impl="triton")
    assert list(found) == list(methods)
    for label, (name, options) in methods.items():
        if name == "energy":
            want = oracle.energy(exact, options["tau"])
        else:
            want = oracle.delta_energy(exact, 0.1, options["c"], 0.0, False)
        torch.testing.assert_close(
            found[label].cpu().double(), want, rtol=tolerances.SCORE_FROM_FEATURES_RTOL, atol=1e-6
        )
    similarity = exact.float().to(device)
    for c in (8, 9):
        torch.testing.assert_close(
            fastood.delta_energy(similarity=similarity, c=c, tau=0.1, impl="triton"),
            fastood.delta_energy(similarity=similarity, c=c, tau=0.1, impl="reference"),
        )


def test_strides_and_expanded_rows(device):
    image, local, text, negatives = given(device=device)
    call = {"methods": ["energy", "l_mcm", "neg_label"], "impl": "triton"}
    bank = bank_of(text, negatives, impl="triton")
    want = fastood.score(image, bank, local=local, **call)
    wide = torch.zeros(B, 2 * D + 3, device=device)
    wide[:, 2 : 2 + 2 * D : 2] = image
    patches = torch.zeros(P, B, D + 5, device=device)
    patches[..., 1 : D + 1] = local.transpose(0, 1)
    for z, zl in (
        (image.mT.contiguous().mT, local.transpose(1, 2).contiguous().transpose(1, 2)),
        (wide[:, 2 : 2 + 2 * D : 2], patches[..., 1 : D + 1].transpose(0, 1)),
    ):
        assert not z.is_contiguous() and not zl.is_contiguous()
        found = fastood.score(z, bank, local=zl, **call)
        for label, value in want.items():
            # not to the bit: compiled for other alignments norms are summed in another order
            torch.testing.assert_close(
                found[label], value, rtol=tolerances.SCORE_FROM_FEATURES_RTOL, atol=0
            )
    text_too = fastood.energy(image, text.mT.contiguous().mT, impl="triton")
    assert torch.equal(text_too, want["energy"])
    same = fastood.energy(image[:1].expand(5, D), bank, impl="triton")
    torch.testing.assert_close(same, want["energy"][:1].expand(5))
    similarity = oracle.cosine(image.cpu(), text.cpu()).float().to(device)
    torch.testing.assert_close(
        fastood.energy(similarity=similarity.mT.contiguous().mT, impl="triton"), want["energy"]
    )


def test_no_images_one_class_and_every_class(device):
    image, local, text, negatives = given(device=device)
    bank = bank_of(text, negatives, impl="triton")
    nothing = fastood.score(image[:0], bank, methods=METHODS, local=local[:0], impl="triton")
    assert all(x.shape == (0,) and x.dtype == torch.float32 for x in nothing.values())
    assert fastood.mcm(similarity=image[:0], impl="triton").shape == (0,)
    assert fastood.row_statistics(image[:0], text, c=2, impl="triton").values.shape == (0, 2)
    single = text[:1]
    assert (fastood.mcm(image, single, impl="triton") == 1).all()
    torch.testing.assert_close(
        fastood.delta_energy(image, single, impl="triton"),
        fastood.delta_energy(image, single, impl="reference"),
        rtol=tolerances.SCORE_FROM_FEATURES_RTOL,
        atol=1e-6,
    )
    torch.testing.assert_close(
        fastood.delta_energy(image, text[:8], c=8, tau=0.1, impl="triton"),
        fastood.delta_energy(image, text[:8], c=8, tau=0.1, impl="reference"),
        rtol=tolerances.SCORE_FROM_FEATURES_RTOL,
        atol=1e-6,
    )


def test_among_equals_the_first(device):
    image, text, _ = clip_like(6, 4, D)
    text = text[[0, 0, 1, 1, 1, 2]].to(device)
    found = fastood.row_statistics(image.to(device), text, c=6, impl="triton").classes.tolist()
    for order in found:
        assert order.index(0) < order.index(1)
        assert order.index(2) < order.index(3) < order.index(4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_bad_rows_are_nan_and_alone(device, bad):
    if device == "cpu":
        pytest.skip("on the CPU rows are checked")
    image, local, text, negatives = given(device=device)
    bank = bank_of(text, negatives)
    want = fastood.score(image, bank, methods=METHODS, local=local)
    image[2], local[2, 1] = bad, bad
    found = fastood.score(image, bank, methods=METHODS, local=local)
    others = [i for i in range(B) if i != 2]
    for label, value in found.items():
        assert value[2].isnan(), label
        assert torch.equal(value[others], want[label][others]), label
    s = torch.rand(B, K, device=device)
    s[1, 3] = bad or float("nan")
    assert fastood.mcm(similarity=s).isnan().nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_unchecked_rows_are_nan_and_alone_in_the_interpreter_too(device, monkeypatch, bad):
    for module in ("inputs", "compute", "local", "grouped"):
        monkeypatch.setattr(f"fastood.scores.{module}.must_check", lambda x: False)
    image, local, text, negatives = given(device=device)
    bank = bank_of(text, negatives, impl="triton")
    asked = {"local": local, "methods": METHODS, "impl": "triton"}
    want = fastood.score(image, bank, **asked)
    image[2], local[2, 1] = bad, bad
    found = fastood.score(image, bank, **asked)
    others = [i for i in range(B) if i != 2]
    for label, value in found.items():
        assert value[2].isnan(), label
        assert torch.equal(value[others], want[label][others]), label


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_rows_that_are_checked_are_named(device, monkeypatch, value):
    monkeypatch.setenv("FASTOOD_CHECK", "1")
    image, local, text, negatives = given(device=device)
    bank = bank_of(text, negatives, impl="triton")
    labels = torch.zeros(B, dtype=torch.int64, device=device)
    image[2], local[2, 1], text[5] = value, value, value
    whole = given(device=device)[0]
    for call, message in (
        (lambda: fastood.mcm(image, bank, impl="triton"), "image: .* row 2"),
        (lambda: fastood.mcm(whole, text, impl="triton"), "text: .* row 5"),
        (lambda: fastood.l_mcm(local, bank, impl="triton"), "local: .* row"),
        (lambda: fastood.neg_label(image, bank, impl="triton"), "image: .* row 2"),
        (lambda: fastood.row_statistics(image, bank, impl="triton"), "image: .* row 2"),
        (lambda: ClassBank(text, impl="triton"), "text: .* row 5"),
        (lambda: fastood.ebm_loss(image, bank, labels, impl="triton"), "image: .* row 2"),
        (lambda: fastood.ebm_loss(whole, text, labels, impl="triton"), "text: .* row 5"),
        (lambda: fastood.ebm_loss(whole, bank, labels + K, impl="triton"), "labels: expected val"),
        (
            lambda: fastood.locoop_loss(whole, local, bank, labels, top_k=2, impl="triton"),
            "local: .* row",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ------------------------------------------------------------------------------ losses


def rounded(x: Tensor, precision: str) -> Tensor:
    """Unit rows as a precision multiplies them, in float64."""
    dtype = WORKING.get(precision, torch.float32)
    return unit(x.double()).to(dtype).double()


LOSSES = {
    "ebm": lambda z, zl, t, y, **o: fastood.ebm_loss(z, t, y, tau=0.1, weight=0.5, **o),
    "ebm renorm": lambda z, zl, t, y, **o: fastood.ebm_loss(
        z, t, y, tau=0.1, weight=0.5, mask_by="label", ce_on="original", renorm=True, **o
    ),
    "ebm topp": lambda z, zl, t, y, **o: fastood.ebm_loss(
        z, t, y, tau=0.1, weight=0.5, mask="topp", edit="all", **o
    ),
    "locoop": lambda z, zl, t, y, **o: fastood.locoop_loss(z, zl, t, y, tau=0.1, top_k=3, **o),
}


@pytest.mark.parametrize("precision", [None, *PRECISIONS])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_err_as_rounding_the_features_does(device, operators, name, precision):
    image, local, text, _ = given(device=device)
    labels = clip_like(B, K, D)[2].to(device)
    leaves = [x.clone().requires_grad_() for x in (image, local, text)]
    loss = LOSSES[name](*leaves, labels, impl="triton", precision=precision)
    assert loss.dtype == torch.float32 and loss.shape == ()
    (2 * loss).backward()
    meant = resolve(precision, image)

    def exact(*features):
        own = [x.cpu().double().requires_grad_() for x in features]
        value = LOSSES[name](*own, labels.cpu())
        (2 * value).backward()
        return [value.detach(), *(x.grad for x in own)]

    want = exact(image, local, text)
    rough = exact(*(rounded(x.cpu(), meant) * x.cpu().double().norm(dim=-1, keepdim=True)
                    for x in (image, local, text)))  # fmt: skip
    got = [loss.detach(), *(x.grad for x in leaves)]
    for one, true, other in zip(got, want, rough, strict=True):
        if true is None:
            assert one is None
            continue
        one = one.cpu().double()
        scale = true.abs().max().clamp_min(1e-6)
        allowed = tolerances.ROUNDING_LUCK * (other - true).abs().max()
        assert (one - true).abs().max() <= allowed + tolerances.PATCH_GRADIENT_RTOL * scale


@pytest.mark.parametrize("name", LOSSES)
def test_losses_without_gradients_are_the_same(device, operators, name):
    image, local, text, _ = given(device=device)
    labels = clip_like(B, K, D)[2].to(device)
    plain = LOSSES[name](image, local, text, labels, impl="triton")
    with_graph = LOSSES[name](image, local, text.clone().requires_grad_(), labels, impl="triton")
    torch.testing.assert_close(plain, with_graph.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("label", [-1, K, -100])
@pytest.mark.gpu
def test_wrong_labels_on_a_gpu_make_the_loss_nan(name, label):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    image, local, text, _ = given(device="cuda")
    labels = clip_like(B, K, D)[2].cuda()
    labels[1] = label
    for impl in ("triton", "reference"):
        t = text.clone().requires_grad_()
        loss = LOSSES[name](image, local, t, labels, impl=impl)
        assert loss.isnan()
        loss.backward()
        assert t.grad.isnan().any()
    torch.cuda.synchronize()  # an assertion on the device would be reported here


# ------------------------------------------------------------------------------ gradients, graphs


@pytest.mark.parametrize("label", SCORES)
def test_gradients(device, operators, label):
    image, local, text, negatives = given(device=device)
    name, options, _ = SCORES[label]
    features = [x.requires_grad_() for x in (image, local, text, negatives)]

    def total(score, z, zl, t, n, impl):
        first = {"l_mcm": (zl,), "gl_mcm": (z, zl)}.get(name, (z,))
        more = (n,) if name == "neg_label" else ()
        grouping = {"groups": GROUPS, "seed": None} if more else {}
        out = score(*first, t, *more, impl=impl, **options, **grouping)
        return (out * torch.linspace(0.5, 1.5, B, dtype=out.dtype, device=out.device)).sum()

    score = getattr(fastood, name)
    total(score, *features, "triton").backward()
    exact = [x.detach().cpu().double().requires_grad_() for x in features]
    total(score, *exact, "reference").backward()
    for got, want in zip(features, exact, strict=True):
        assert (got.grad is None) == (want.grad is None)
        if want.grad is not None:
            atol = tolerances.GRADIENT_RTOL * float(want.grad.abs().max())
            torch.testing.assert_close(got.grad.cpu().double(), want.grad, rtol=0, atol=atol)


@pytest.mark.parametrize("precision", ["", "fp16"])
def test_operators_keep_their_promises(device, operators, precision):
    image, local, text, negatives = (unit(x) for x in given(device=device))
    groups = negatives.view(GROUPS, -1, D)
    labels = clip_like(B, K, D)[2].to(device)
    z, t, n = (x.clone().requires_grad_() for x in (image, text, groups))
    op = torch.ops.fastood
    torch.library.opcheck(op.row_statistics.default, (z, t, None, [0.1, 1.0], 2, True, precision))
    torch.library.opcheck(op.grouped.default, (z, t, n, None, None, GROUPS, 0.1, precision))
    torch.library.opcheck(
        op.patch_entropy.default, (local, t, labels, 3, 0.1, True, True, False, precision)
    )
    torch.library.opcheck(
        op.ebm_loss.default,
        (image, t, labels, 0.1, 0.5, 0, *(False,) * 4, True, True, False, True, precision),
    )
    if not precision:
        s = (image @ text.mT).requires_grad_()
        torch.library.opcheck(op.similarity_statistics.default, (s, [0.1], 2, True))


def everything(impl):
    def total(z, zl, t, bank, y):
        options = {"impl": impl}
        return (
            fastood.delta_energy(z, t, c=2, tau=0.1, **options).sum()
            + fastood.gl_mcm(z, zl, t, **options).sum()
            + fastood.neg_label(z, bank, tau=0.1, **options).sum()
            + fastood.row_statistics(z, t, c=2, **options).rest.sum()
            + fastood.ebm_loss(z, t, y, tau=0.1, **options)
            + fastood.locoop_loss(z, zl, t, y, tau=0.1, top_k=2, **options)
        )

    return total


def test_whole_graphs(device, operators):
    image, local, text, negatives = given(device=device)
    bank = bank_of(text, negatives, impl="triton")
    labels = clip_like(B, K, D)[2].to(device)
    total = everything("triton")
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    a, b = (text.clone().requires_grad_() for _ in range(2))
    total(image, local, a, bank, labels).backward()
    compiled(image, local, b, bank, labels).backward()
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    """What an interpreter cannot show."""

    def test_whole_graphs_by_inductor(self):
        image, local, text, negatives = given(device="cuda")
        bank = bank_of(text, negatives)
        labels = clip_like(B, K, D)[2].cuda()
        total = everything(None)
        a, b = (text.clone().requires_grad_() for _ in range(2))
        total(image, local, a, bank, labels).backward()
        torch.compile(total, fullgraph=True)(image, local, b, bank, labels).backward()
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)

    def test_nothing_waits_for_the_device(self):
        image, local, text, negatives = given(torch.float16, "cuda")
        bank = bank_of(text, negatives)
        labels = clip_like(B, K, D)[2].cuda()
        learned = text.float().requires_grad_()

        def work():
            fastood.score(image, bank, methods=METHODS, local=local)
            fastood.row_statistics(image, bank, c=2, moments=True)
            fastood.mcm(similarity=image)
            for call in LOSSES.values():
                call(image, local, learned, labels).backward()
            fastood.energy(image, learned).sum().backward()

        work()  # compiles, prepares
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_captured_graph_gives_the_same_numbers(self):
        image, local, text, negatives = given(torch.float16, "cuda")
        bank = bank_of(text, negatives)
        call = {"methods": METHODS, "local": local}
        want = fastood.score(image, bank, **call)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = fastood.score(image, bank, **call)
        for x in found.values():
            x.zero_()
        graph.replay()
        for label, value in want.items():
            assert torch.equal(found[label], value), label

    @pytest.mark.parametrize("score", [fastood.energy, fastood.neg_label])
    def test_a_bank_prepared_in_a_graph_is_prepared_again_outside(self, score):
        image, _, text, negatives = given(torch.float16, "cuda")
        want = score(image, bank_of(text, negatives))  # compiles
        bank = bank_of(text, negatives)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = score(image, bank)
        assert not bank._kept
        graph.replay()
        assert torch.equal(found, want)
        assert torch.equal(score(image, bank), want)

    def test_a_bank_prepared_on_one_stream_serves_another(self):
        image, _, text, _ = given(torch.float16, "cuda")
        bank = ClassBank(text)
        torch.cuda.synchronize()
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(first):
            torch.cuda._sleep(50_000_000)
            a = fastood.energy(image, bank)
        with torch.cuda.stream(second):
            b = fastood.energy(image, bank)
        torch.cuda.synchronize()
        assert torch.equal(a, b)

    def test_the_last_device(self):
        last = torch.device("cuda", torch.cuda.device_count() - 1)
        image, local, text, negatives = given(torch.float16, last)
        bank = bank_of(text, negatives)
        found = fastood.score(image, bank, methods=METHODS, local=local)
        on_first = [x.to("cuda:0") for x in (image, local, text, negatives)]
        want = fastood.score(
            on_first[0], bank_of(*on_first[2:]), methods=METHODS, local=on_first[1]
        )
        for label, value in want.items():
            assert found[label].device == last
            assert torch.equal(found[label].cpu(), value.cpu()), label

    def test_memory_of_a_call_is_small(self):
        image = torch.randn(8192, 512, device="cuda", dtype=torch.float16)
        bank = ClassBank(torch.randn(2000, 512, device="cuda", dtype=torch.float16))
        fastood.delta_energy(image, bank, c=2)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fastood.delta_energy(image, bank, c=2)
        extra = torch.cuda.max_memory_allocated() - before
        assert extra < 8192 * 2000  # a quarter of the float32 similarities

    @pytest.mark.parametrize("name", ["energy", "l_mcm"])
    def test_the_library_and_a_cuda_kernel(self, name):
        image, local, text, _ = given(device="cuda")
        first = local if name == "l_mcm" else image
        score = getattr(fastood, name)
        for precision in PRECISIONS:
            how = {"tau": 0.1, "precision": precision}
            torch.testing.assert_close(
                score(first, text, impl="cuda", **how),
                score(first, text, impl="triton", **how),
                rtol=tolerances.SCORE_FROM_FEATURES_RTOL,
                atol=1e-6,
            )
