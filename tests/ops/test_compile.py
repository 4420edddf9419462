"""The row operators as torch sees them: fakes, gradients, graphs, and what they do not support."""

from __future__ import annotations

import pytest
import torch

import fastood
from fastood.ops import rows
from fastood.ops.requests import Kind, Request
from fastood.scores import ClassBank
from tests import tolerances
from tests.conftest import clip_like
from tests.ops.rows import cosines, every_request, scores

SCORES = {
    "max_similarity": fastood.max_similarity,
    "mcm": fastood.mcm,
    "msp": fastood.msp,
    "max_logit": fastood.max_logit,
    "energy": fastood.energy,
    "energy_unit": lambda *a, **o: fastood.energy(*a, tau=1.0, scale="unit", **o),
    "neg_entropy": fastood.neg_entropy,
    "variance": fastood.variance,
    "margin": fastood.margin,
    "margin_of_probabilities": lambda *a, **o: fastood.margin(*a, tau=0.1, **o),
    "delta_energy": lambda *a, **o: fastood.delta_energy(*a, tau=0.1, c=3, **o),
    "delta_energy_joint": lambda *a, **o: fastood.delta_energy(*a, c=2, joint=True, reset=0.1, **o),
}


def leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def assert_gradient(mine, true, rtol=tolerances.GRADIENT_RTOL):
    atol = rtol * float(true.abs().max()) + 1e-12
    torch.testing.assert_close(mine.double(), true.double(), rtol=0, atol=atol)


# ------------------------------------------------------------------------------ operators

INPUTS = [(5, 7, 16, 1, False), (3, 40, 8, 4, True), (4, 3, 8, 3, True), (6, 1, 5, 1, True)]


@pytest.mark.parametrize(("b", "k", "d", "c", "moments"), INPUTS)
def test_operators_keep_their_promises(kernels, b, k, d, c, moments):
    image, text = (unit(x) for x in clip_like(b, k, d)[:2])
    panels = kernels.pack_text(text, False, "text")
    taus = [0.1, 1.0]
    for packed in (None, panels):
        inputs = (*leaves(image, text), packed, taus, c, moments)
        torch.library.opcheck(torch.ops.fastood.row_statistics.default, inputs)
    s = image @ text.mT
    inputs = (*leaves(s), taus, c, moments)
    torch.library.opcheck(torch.ops.fastood.similarity_statistics.default, inputs)

    found = rows.similarity_statistics(s, taus=taus, c=c, moments=moments)
    upstream = [torch.rand_like(x) if x.is_floating_point() else None for x in found]
    g = rows._gradient_of(found, upstream, taus, k)
    arguments = (taus, g.best, g.shift, g.coefficients, found.classes, g.tops)
    for packed in (None, panels):
        for wanted in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                torch.ops.fastood.row_statistics_backward.default,
                (image, text, packed, *arguments, *wanted),
            )
    operator = torch.ops.fastood.similarity_statistics_backward.default
    torch.library.opcheck(operator, (s, *arguments))


@pytest.mark.parametrize(("b", "k", "d", "c", "moments"), [*INPUTS, (0, 4, 3, 2, True)])
def test_the_defaults_in_plain_torch_agree(instruction_set, b, k, d, c, moments):
    """Once the kernels are loaded nobody calls them on a CPU: here they are, by name."""
    image, text = (unit(x) for x in clip_like(b, k, d)[:2])
    taus, s = [0.1, 1.0], image @ text.mT
    mine = rows.row_statistics(image, text, taus=taus, c=c, moments=moments)
    plain = rows._row_statistics(image, text, None, taus, c, moments)
    given = rows.similarity_statistics(s, taus=taus, c=c, moments=moments)
    for one, other, third in zip(mine, plain, given, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one, third, rtol=1e-4, atol=1e-6)

    upstream = [torch.rand_like(x) if x.is_floating_point() else None for x in mine]
    g = rows._gradient_of(mine, upstream, taus, k)
    arguments = (taus, g.best, g.shift, g.coefficients, mine.classes, g.tops)
    for wanted in ((True, True), (True, False), (False, True)):
        fast = torch.ops.fastood.row_statistics_backward(image, text, None, *arguments, *wanted)
        slow = rows._row_statistics_backward(image, text, None, *arguments, *wanted)
        for one, other in zip(fast, slow, strict=True):
            assert one.shape == other.shape
            if one.numel():
                assert_gradient(one, other)
    one = torch.ops.fastood.similarity_statistics_backward(s, *arguments)
    if b:
        assert_gradient(one, rows._similarity_statistics_backward(s, *arguments))


@pytest.mark.parametrize(("b", "k", "d", "c", "moments"), INPUTS)
def test_the_formulas_of_the_gradients(b, k, d, c, moments):
    """In float64, through the default implementations, against finite differences."""
    if k == 1:
        c = 1
    image, text = (unit(x) for x in clip_like(b, k, d, dtype=torch.float64)[:2])

    class Statistics(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, t):
            outputs = rows._row_statistics(z, t, None, [0.3, 1.0], c, moments)
            rows._save_row(ctx, (z, t, None, [0.3, 1.0], c, moments), outputs)
            return outputs

        @staticmethod
        def backward(ctx, *upstream):
            image, text, _, *output = ctx.saved_tensors
            found = rows.RowStatistics(*output)
            g = rows._gradient_of(found, upstream, ctx.taus, k)
            return rows._row_statistics_backward(
                image, text, None, ctx.taus, g.best, g.shift, g.coefficients, found.classes,
                g.tops, True, True,
            )  # fmt: skip

    def outputs(z, t):
        values, _, rest, *moments_found = Statistics.apply(z, t)
        finite = [rest] if c < k else []
        return (values, *finite, *(m for m in moments_found if m.numel()))

    assert torch.autograd.gradcheck(outputs, leaves(image, text))


# ------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("tau", [0.01, 1.0])
@pytest.mark.parametrize(
    ("b", "k", "d"), [(1, 1, 3), (9, 2, 16), (17, 33, 30), (270, 100, 24), (40, 1057, 48)]
)
def test_gradients_against_float64(instruction_set, b, k, d, tau):
    image, text, _ = clip_like(b, k, d)
    weights = torch.linspace(-1, 2, b)
    for request in every_request(k, tau, c=6, reset=0.125):
        found = []
        for impl, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
            z, t = leaves(image.to(dtype), text.to(dtype))
            (scores((request,), image=z, text=t, impl=impl)[0] * weights).sum().backward()
            found.append((z.grad, t.grad))
        for mine, true in zip(*found, strict=True):
            if k > 1:
                assert_gradient(mine, true, 4 * tolerances.GRADIENT_RTOL)
            else:
                torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-5 / tau)


@pytest.mark.parametrize("tau", [0.01, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_given_similarities(instruction_set, dtype, tau):
    s = cosines(30, 1057).to(dtype)
    for request in every_request(1057, tau, c=6):
        (mine,), (true,) = leaves(s), leaves(s.double())
        scores((request,), similarity=mine)[0].sum().backward()
        scores((request,), similarity=true, impl="reference")[0].sum().backward()
        assert mine.grad.dtype == dtype
        rtol = tolerances.GRADIENT_RTOL if dtype == torch.float32 else 1e-2
        true = true.grad.to(dtype).double()  # float16 holds nothing below 6e-8
        torch.testing.assert_close(
            mine.grad.double(), true, rtol=0, atol=rtol * float(true.abs().max()) + 1e-12
        )


def test_gradients_of_part_of_the_inputs(kernels):
    image, text, _ = clip_like(12, 40, 16)
    requests = (Request(Kind.DELTA_ENERGY, 0.1, 2), Request(Kind.MAX_SOFTMAX))
    both = leaves(image, text)
    scores(requests, image=both[0], text=both[1]).sum().backward()
    (z,) = leaves(image)
    scores(requests, image=z, text=text).sum().backward()
    assert torch.equal(z.grad, both[0].grad)
    (t,) = leaves(text)
    scores(requests, image=image, text=t).sum().backward()
    assert torch.equal(t.grad, both[1].grad)
    for prepared in (False, True):
        bank = ClassBank(text)
        if prepared:
            assert bank.panels is bank.packed
        (z,) = leaves(image)
        scores(requests, image=z, text=bank).sum().backward()
        assert_gradient(z.grad, both[0].grad, 1e-5)


def test_gradients_at_ties_and_extremes_are_finite(instruction_set):
    rows_of = [torch.zeros(40), torch.full((40,), 0.25), torch.linspace(-1, 1, 40) * 1e4]
    for tau in (1e-4, 0.01, 1.0):
        (s,) = leaves(torch.stack(rows_of))
        scores(every_request(40, tau, c=5), similarity=s).sum().backward()
        assert torch.isfinite(s.grad).all()


# ------------------------------------------------------------------------------ graphs


def compiled_like_eager(function, *inputs, backend="aot_eager", **options):
    torch._dynamo.reset()
    graph = torch.compile(function, fullgraph=True, backend=backend, **options)
    mine, theirs = leaves(*inputs), leaves(*inputs)
    got, want = graph(*mine), function(*theirs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    got.sum().backward()
    want.sum().backward()
    for one, other in zip(mine, theirs, strict=True):
        assert_gradient(one.grad, other.grad, 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(graph(*inputs), want.detach(), rtol=1e-4, atol=1e-6)


QUICK = ("mcm", "neg_entropy", "delta_energy")  # tracing takes seconds for each


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SCORES]
)
def test_every_score_is_one_graph(kernels, name):
    function = SCORES[name]
    image, text, _ = clip_like(6, 9, 16)
    compiled_like_eager(lambda z, t: function(z, t), image, text)
    compiled_like_eager(lambda s: function(similarity=s), cosines(6, 9))
    bank = ClassBank(text)
    compiled_like_eager(lambda z: function(z, bank), image)


def test_a_bank_that_is_packed_already(kernels):
    image, text, _ = clip_like(6, 9, 16)
    bank = ClassBank(text)
    assert bank.panels is bank.packed
    compiled_like_eager(lambda z: fastood.delta_energy(z, bank, c=2), image)


def test_local_scores_are_one_graph(kernels):
    image, text, _ = clip_like(4, 9, 16)
    local = clip_like(20, 9, 16, seed=3)[0].view(4, 5, 16)
    bank = ClassBank(text)
    compiled_like_eager(lambda z, t: fastood.l_mcm(z, t), local, text)
    compiled_like_eager(lambda z: fastood.l_mcm(z, bank), local)
    compiled_like_eager(lambda s: fastood.l_mcm(similarity=s), cosines(20, 9).view(4, 5, 9))
    compiled_like_eager(lambda z, zl, t: fastood.gl_mcm(z, zl, t), image, local, text)


def test_many_scores_are_one_graph_of_any_batch(kernels):
    image, text, _ = clip_like(6, 9, 16)
    bank = ClassBank(text)
    methods = {"a": "mcm", "b": ("delta_energy", {"c": 5}), "c": ("energy", {"tau": 0.5})}

    def total(z):
        return torch.stack(list(fastood.score(z, bank, methods=methods).values()))

    compiled_like_eager(total, image)
    torch._dynamo.reset()
    graph = torch.compile(total, fullgraph=True, backend="aot_eager")
    for b in (6, 4, 3, 2):  # from the second on with a symbol for it
        torch.testing.assert_close(graph(image[:b]), total(image[:b]), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_with_the_default_backend(kernels):
    image, text, _ = clip_like(6, 9, 16)

    def function(z, t):
        return fastood.delta_energy(z, t, tau=0.1, c=2) + fastood.neg_entropy(z, t)

    compiled_like_eager(function, image, text, backend="inductor")


# ------------------------------------------------------------------------------ refusals


def test_second_derivatives_are_refused(kernels):
    """They were once computed as if what lies behind the similarities were constant."""
    image, text, _ = clip_like(4, 9, 16)
    (z,), (s,) = leaves(image), leaves(cosines(4, 9))
    for out, x in ((fastood.mcm(z, text), z), (fastood.mcm(similarity=s), s)):
        with pytest.raises(RuntimeError, match="impl='reference'"):
            torch.autograd.grad(out.sum(), x, create_graph=True)
    out = fastood.mcm(z, text, impl="reference").sum()
    (g,) = torch.autograd.grad(out, z, create_graph=True)
    assert g.requires_grad


def test_functional_transforms_take_the_reference(kernels):
    s, ones = cosines(4, 9), torch.ones(4, 9)

    def score(x):
        return fastood.mcm(similarity=x, tau=0.1)

    (x,) = leaves(s)
    score(x).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda v: score(v).sum())(s), x.grad)
    _, tangent = torch.func.jvp(score, (s,), (ones * s,))
    torch.testing.assert_close(tangent, (x.grad * s).sum(dim=1), rtol=1e-4, atol=1e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(s, ones * s)
        again = torch.autograd.forward_ad.unpack_dual(score(dual)).tangent
    torch.testing.assert_close(again, tangent)  # it was once lost without a word
    for transform in (lambda f: torch.func.grad(f)(s), lambda f: torch.func.vmap(f)(s[:, None])):
        with pytest.raises(ValueError, match=r"knows neither torch\.func nor forward-mode"):
            transform(lambda v: fastood.mcm(similarity=v, impl="cpu").sum())
