"""CoOp, LoCoOp and EBM: the published trajectories, identities, heads, several processes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastood
from bench import peers_tuning as peers
from fastood.errors import ModelError
from fastood.scores import delta_energy, gl_mcm, mcm
from fastood.scores.bank import ClassBank
from fastood.tuning.method import Batch, Term, setting_names, total_loss
from fastood.tuning.prompt_methods import EBM, CoOp, LoCoOp
from fastood.tuning.registry import METHODS, build_method, method_class
from tests.tolerances import (
    BF16_TOWER_COSINE_ATOL,
    BF16_TOWER_LOSS_ATOL,
    SCORE_FROM_FEATURES_RTOL,
)
from tests.tuning.parity import LR, NAMES, batches, classes, close, encoder, moved, still, trained

DTYPES = [torch.float32, torch.float64]
N_CTX = 4
WORDS = [name.replace("_", " ") for name in NAMES]


def plain_prompts(dtype, n_ctx=N_CTX):
    network = encoder(dtype)
    tokens = network.tokenize([f"{'X ' * n_ctx}{name}." for name in WORDS])
    return peers.PlainPrompts(network.model, tokens, n_ctx)


def plain_losses(method, data, loss):
    """20 steps of a plain ``loss(text, batch)`` from the same start."""
    prompts = plain_prompts(method.dtype)
    context = method.context.detach().clone().requires_grad_()
    steps = [lambda batch=batch: loss(prompts(context), batch) for batch in data]
    return peers.sgd_losses([context], steps, lr=LR)


# ------------------------------------------------------------------------------ trajectories


@pytest.mark.parametrize("dtype", DTYPES)
def test_coop_runs_the_published_trajectory(dtype):
    method, data = CoOp(encoder(dtype), NAMES, n_ctx=N_CTX), batches(dtype=dtype)
    gamma = encoder(dtype).logit_scale
    want = plain_losses(
        method, data, lambda text, b: peers.coop_loss(text, b.image, b.labels, gamma)
    )
    without, got = still(method, data), trained(method, data)
    assert moved(got, without)
    close(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_locoop_runs_the_published_trajectory(dtype):
    method = LoCoOp(encoder(dtype), NAMES, n_ctx=N_CTX, top_k=2)
    data, gamma = batches(dtype=dtype), encoder(dtype).logit_scale
    want = plain_losses(
        method,
        data,
        lambda text, b: peers.locoop_loss(text, b.image, b.local, b.labels, gamma, 0.25, 2),
    )
    shares = [float(t.numerator / t.count) for t in method.terms(data[0])[0] if t.name[:3] == "ood"]
    assert 0.1 < shares[0] < 0.9  # of patches that are OOD: both kinds occur
    without, got = still(method, data), trained(method, data)
    assert moved(got, without)
    close(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ebm_runs_the_published_trajectory(dtype):
    method, data = EBM(encoder(dtype), NAMES, n_ctx=N_CTX), batches(dtype=dtype)
    gamma = encoder(dtype).logit_scale
    want = plain_losses(
        method, data, lambda text, b: peers.ebm_loss(text, b.image, b.labels, gamma, 0.1)
    )
    without, got = still(method, data), trained(method, data)
    assert moved(got, without)
    close(got, want, dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"position": "middle"},
        {"position": "front"},
        {"class_specific": True},
        {"chunk": 2},
        {"chunk": 3, "class_specific": True},
    ],
)
@pytest.mark.filterwarnings("ignore:.*learned prompts")
def test_contexts_of_every_kind_learn(options):
    """Same start, same data: finite differences along the gradient agree with the gradient."""
    method = CoOp(encoder(torch.float64), NAMES, n_ctx=N_CTX, **options)
    (batch,) = batches(1, dtype=torch.float64)
    loss = total_loss(method.terms(batch)[0])
    loss.backward()
    gradient = method.context.grad
    step = 1e-7 * gradient / gradient.norm()
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            method.context += sign * step
            ends.append(float(total_loss(method.terms(batch)[0])))
            method.context -= sign * step
    slope = (ends[0] - ends[1]) / 2e-7
    assert slope == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_chunks_change_nothing():
    (batch,) = batches(1, dtype=torch.float64)
    found = []
    for chunk in (None, 1, 3, 100):
        method = LoCoOp(encoder(torch.float64), NAMES, n_ctx=N_CTX, top_k=2, chunk=chunk)
        loss = total_loss(method.terms(batch)[0])
        loss.backward()
        found.append(torch.cat([loss.detach()[None], method.context.grad.flatten()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------ identities


def test_coop_at_step_0_from_words_is_zero_shot():
    zero_shot = build_method("zoclip", encoder(), NAMES, templates="a photo of a {}.")
    (batch,) = batches(1)
    for name in ("coop", "locoop", "ebm"):
        method = build_method(name, encoder(), NAMES, ctx_init="a photo of a")
        got, want = (m.head().similarities(batch.image, batch.local) for m in (method, zero_shot))
        torch.testing.assert_close(got.image, want.image, rtol=0, atol=2e-6)
        torch.testing.assert_close(got.local, want.local, rtol=0, atol=2e-6)


def test_ebm_without_weight_on_original_logits_is_coop():
    data = batches(5, dtype=torch.float64)
    coop = CoOp(encoder(torch.float64), NAMES, n_ctx=N_CTX)
    ebm = EBM(encoder(torch.float64), NAMES, n_ctx=N_CTX, weight=0.0, ce_on="original")
    close(trained(ebm, data), trained(coop, data), torch.float64)


def test_locoop_where_no_patch_is_ood_is_coop():
    data = [b._replace(local=100 * classes(torch.float64)[b.labels][:, None]) for b in
            batches(3, dtype=torch.float64)]  # fmt: skip
    coop = CoOp(encoder(torch.float64), NAMES, ctx_init="a photo of a")
    locoop = LoCoOp(encoder(torch.float64), NAMES, ctx_init="a photo of a", top_k=6)
    close(trained(locoop, data), trained(coop, data), torch.float64)


@pytest.mark.filterwarnings("ignore:.*learned prompts")
def test_the_random_start_is_private_and_seeded():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (CoOp(encoder(), NAMES, n_ctx=N_CTX, seed=s).context for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.dtype == torch.float32
    big = CoOp(encoder(), NAMES, class_specific=True).context  # 7 * 16 * 128 draws
    assert float(big.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.filterwarnings("ignore:.*learned prompts")
def test_a_class_specific_context_from_words_starts_equal():
    method = CoOp(encoder(), NAMES, ctx_init="a photo of a", class_specific=True)
    assert method.context.shape == (len(NAMES), 4, 128)
    assert torch.equal(method.context[0], method.context[-1])


def test_the_tower_stays_as_it_was():
    network = encoder()
    before = network.fingerprint
    method = CoOp(network, NAMES, n_ctx=N_CTX)
    assert [name for name, _ in method.named_parameters()] == ["context"]
    trained(method, batches(2))
    assert network.fingerprint == before
    assert all(p.grad is None for p in network.model.parameters())


# ------------------------------------------------------------------------------ loss terms


def test_ebm_reports_what_to_watch():
    method = EBM(encoder(torch.float64), NAMES, n_ctx=N_CTX)
    (batch,) = batches(1, dtype=torch.float64)
    terms, predicted = method.terms(batch)
    z, t = F.normalize(batch.image, dim=-1), F.normalize(method.text(), dim=-1)
    s = z @ t.T
    rows = torch.arange(len(z))
    best = s.argmax(-1)
    rise = (z * (z * t[best] > 0) * t[best]).sum(-1) - s[rows, best]
    want = {
        "cross_entropy": F.cross_entropy(s / method.tau, batch.labels),
        "p_top1": (s / method.tau).softmax(-1).amax(-1).mean(),
        "edited_rise": rise.mean(),
    }
    watched = {t.name: t.numerator / t.count for t in terms if t.weight == 0}
    assert watched.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(watched[name], value.detach(), rtol=1e-9, atol=1e-12)
        assert not watched[name].requires_grad
    assert torch.equal(predicted, best)
    full = fastood.ebm_loss(batch.image, method.text(), batch.labels, tau=method.tau)
    torch.testing.assert_close(total_loss(terms), full)


@pytest.mark.parametrize(
    ("mask", "mask_by", "edit", "ce_on", "renorm"),
    list(
        itertools.product(
            ("sign", "topp"), ("top1", "label"), ("top1", "all"), ("edited", "original"), (0, 1)
        )
    )[::3],
)
def test_ebm_has_all_options_of_its_loss(mask, mask_by, edit, ce_on, renorm):
    options = {
        "mask": mask, "mask_by": mask_by, "edit": edit, "ce_on": ce_on, "renorm": bool(renorm),
        "keep": 0.3, "weight": 0.7,
    }  # fmt: skip
    method = EBM(encoder(), NAMES, n_ctx=N_CTX, **options)
    (batch,) = batches(1)
    want = fastood.ebm_loss(batch.image, method.text(), batch.labels, tau=method.tau, **options)
    torch.testing.assert_close(total_loss(method.terms(batch)[0]), want, rtol=1e-6, atol=0)
    assert method.settings().items() >= options.items()


def test_locoop_terms_add_up_to_its_loss():
    method = LoCoOp(encoder(), NAMES, n_ctx=N_CTX, weight=0.4)
    assert method.settings()["top_k"] == 1  # a fifth of 7
    (batch,) = batches(1)
    terms, _ = method.terms(batch)
    want = fastood.locoop_loss(
        batch.image, batch.local, method.text(), batch.labels, tau=method.tau, weight=0.4, top_k=1
    )
    torch.testing.assert_close(total_loss(terms), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [CoOp, LoCoOp, EBM])
def test_two_processes_sum_to_one(kind):
    """Shares of a batch, one of them empty, with the counts of all: losses and gradients sum."""
    options = {"top_k": 2} if kind is LoCoOp else {}
    (batch,) = batches(1, dtype=torch.float64)
    whole = kind(encoder(torch.float64), NAMES, n_ctx=N_CTX, **options)
    loss = total_loss(whole.terms(batch)[0])
    loss.backward()
    for cuts in ((0, 4, 6), (0, 6, 6), (0, 1, 2, 6)):
        method = kind(encoder(torch.float64), NAMES, n_ctx=N_CTX, **options)
        shares = [
            method.terms(Batch(*(x[a:b] for x in batch)))[0] for a, b in itertools.pairwise(cuts)
        ]
        # the loop adds up by position
        assert len({tuple((t.name, t.weight) for t in share) for share in shares}) == 1
        counts = [sum(float(t.count) for t in same) for same in zip(*shares, strict=True)]
        parts = [total_loss(share, counts) for share in shares]
        total = torch.stack(parts).sum()
        total.backward()
        torch.testing.assert_close(total, loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(method.context.grad, whole.context.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [CoOp, LoCoOp, EBM])
def test_an_empty_share_is_0_and_still_goes_backward(kind):
    method = kind(encoder(), NAMES, n_ctx=N_CTX)
    (batch,) = batches(1)
    terms, predicted = method.terms(Batch(*(x[:0] for x in batch)))
    assert predicted.shape == (0,)
    loss = total_loss(terms)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(method.context.grad, torch.zeros_like(method.context))


@pytest.mark.parametrize("kind", [CoOp, LoCoOp, EBM])
def test_a_diverged_context_gives_nan_rather_than_an_error(kind):
    """The training loop stops and keeps the last good state; the losses would refuse the input."""
    method = kind(encoder(), NAMES, n_ctx=N_CTX)
    (batch,) = batches(1)
    before = method.terms(batch)[0]
    with torch.no_grad():
        method.context.fill_(float("nan"))
    terms = method.terms(batch)[0]
    assert total_loss(terms).isnan()
    assert [(t.name, t.weight) for t in terms] == [(t.name, t.weight) for t in before]


def test_totals_of_terms():
    one, two = Term("a", torch.tensor(6.0), 3, 1.0), Term("b", torch.tensor(4.0), 0, 0.5)
    assert float(total_loss([one, two])) == 2.0 + 0.5 * 4.0
    assert float(total_loss([one, two], [6, torch.tensor(8)])) == 1.0 + 0.25
    with pytest.raises(ValueError, match="at least one with a weight"):
        total_loss([Term("watched", torch.tensor(1.0), 1, 0.0)])


# ------------------------------------------------------------------------------ heads


@pytest.mark.parametrize("name", ["zoclip", "coop", "cocoop", "locoop", "ebm", "clip-adapter"])
def test_scores_of_every_head(name):
    """Scores from features are those of the head's similarities in float64."""
    method = build_method(name, encoder(), NAMES)
    (batch,) = batches(1)
    head = method.head()
    assert (head.dim, head.logit_scale) == (encoder().embed_dim, encoder().logit_scale)
    s = head.similarities(batch.image, batch.local)
    exact = build_method(name, encoder(torch.float64), NAMES)
    exact.load_state_dict({k: v.double() for k, v in method.state_dict().items()})
    wide = exact.head().similarities(batch.image.double(), batch.local.double())
    asked = {
        "mcm": lambda s: mcm(similarity=s.image),
        "gl_mcm": lambda s: gl_mcm(similarity=s.image, local_similarity=s.local),
        "delta_energy": lambda s: delta_energy(similarity=s.image, tau=method.tau, c=2),
    }
    for score in asked.values():
        torch.testing.assert_close(
            score(s).double(), score(wide), rtol=SCORE_FROM_FEATURES_RTOL, atol=0
        )
    if isinstance(head, ClassBank):  # the fused way
        fused = delta_energy(batch.image, head, tau=method.tau, c=2)
        torch.testing.assert_close(
            fused.double(), asked["delta_energy"](wide), rtol=SCORE_FROM_FEATURES_RTOL, atol=0
        )
        fused = gl_mcm(batch.image, batch.local, head)
        torch.testing.assert_close(
            fused.double(), asked["gl_mcm"](wide), rtol=SCORE_FROM_FEATURES_RTOL, atol=0
        )


def test_heads_are_frozen_and_told_apart():
    method = CoOp(encoder(), NAMES, n_ctx=N_CTX)
    head, again = method.head(), method.head()
    assert head.fingerprint == again.fingerprint
    assert not head.text.requires_grad
    kept = head.text.clone()
    trained(method, batches(1))
    assert torch.equal(head.text, kept)
    prints = {head.fingerprint, method.head().fingerprint}
    prints.add(CoOp(encoder(), NAMES, n_ctx=N_CTX, seed=2).head().fingerprint)
    prints.add(CoOp(encoder(), NAMES[::-1], n_ctx=N_CTX).head().fingerprint)
    prints.add(EBM(encoder(), NAMES, n_ctx=N_CTX).head().fingerprint)
    assert len(prints) == 5


def test_pipelines_and_thresholds_tell_adaptations_apart():
    """The fingerprint survives a move between devices, which pipelines make."""
    network, method = encoder(), CoOp(encoder(), NAMES, n_ctx=N_CTX)
    pipeline = fastood.Pipeline(network, class_names=NAMES, head=method.head())
    assert pipeline.model_fingerprint == f"{network.fingerprint}+{method.fingerprint()}"
    conditional = build_method("cocoop", network, NAMES)
    pipeline = fastood.Pipeline(network, class_names=NAMES, head=conditional.head())
    assert pipeline.model_fingerprint == f"{network.fingerprint}+{conditional.fingerprint()}"


# ------------------------------------------------------------------------------ precision

KINDS = {"coop": {}, "locoop": {"top_k": 2}, "ebm": {}, "cocoop": {}, "clip-adapter": {}}


@pytest.mark.parametrize("name", KINDS)
def test_a_half_precision_tower_trains_float32_masters(name):
    (batch,) = batches(1)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        settings = KINDS[name] | ({} if name == "clip-adapter" else {"ctx_init": "a photo of a"})
        method = build_method(name, encoder(dtype), NAMES, **settings)
        loss = total_loss(method.terms(batch._replace(image=batch.image.to(dtype)))[0])
        loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in method.parameters())
        s = method.head().similarities(batch.image, batch.local)
        assert s.image.dtype == s.local.dtype == torch.float32
        found.append((float(loss.detach()), s.image))
    assert found[1][0] == pytest.approx(found[0][0], abs=BF16_TOWER_LOSS_ATOL)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=BF16_TOWER_COSINE_ATOL)


@pytest.mark.parametrize("name", KINDS)
def test_autocast_is_for_the_towers_not_for_the_losses(name):
    """Same numbers to bfloat16's grade, and cosines that are no bfloat16 values."""
    settings = KINDS[name] | ({} if name == "clip-adapter" else {"ctx_init": "a photo of a"})
    method = build_method(name, encoder(), NAMES, **settings)
    (batch,) = batches(1)
    want = float(total_loss(method.terms(batch)[0]).detach())
    with torch.autocast("cpu", torch.bfloat16):
        terms, _ = method.terms(batch)
        loss = total_loss(terms)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in
               method.parameters())  # fmt: skip
    assert float(loss.detach()) == pytest.approx(want, abs=BF16_TOWER_LOSS_ATOL)


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": 0}, "n_ctx: expected at least 1"),
        ({"n_ctx": 40}, r"n_ctx: .*window of 32 .* got 40"),
        ({"n_ctx": 28}, "names: 3 do not fit .*'brown dog'.*'handwritten letter'"),
        ({"n_ctx": 3, "ctx_init": "a photo of a"}, "n_ctx: expected 4, the number of tokens"),
        ({"ctx_init": " "}, "ctx_init: expected text"),
        ({"position": "back"}, "position: expected"),
        ({"chunk": 0}, "chunk: expected 1 <= chunk"),
        ({"seed": -1}, "seed: expected 0 <= seed"),
    ],
)
def test_contexts_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        CoOp(encoder(), NAMES, **options)


def test_locoop_refuses_a_top_k_nothing_can_be_outside_of():
    for top_k in (7, 8):
        with pytest.raises(ValueError, match=f"7 classes, got {top_k}: no patch could be OOD"):
            LoCoOp(encoder(), NAMES, top_k=top_k)
    with pytest.raises(ValueError, match="top_k: expected 1 <= top_k"):
        LoCoOp(encoder(), NAMES, top_k=0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        LoCoOp(encoder(), NAMES[:1])


def test_locoop_needs_patches():
    method = LoCoOp(encoder(), NAMES)
    with pytest.raises(ValueError, match="local: LoCoOp trains with patch features"):
        method.terms(batches(1)[0]._replace(local=None))


def test_ebm_refuses_options_before_it_encodes_anything():
    with pytest.raises(ValueError, match="mask: expected one of 'sign', 'topp', got 'top'"):
        EBM(encoder(), NAMES, mask="top")
    with pytest.raises(ValueError, match="keep: expected 0 < keep <= 1, got 0"):
        EBM(encoder(), NAMES, keep=0)


def test_batches_that_do_not_fit():
    method, (batch,) = CoOp(encoder(), NAMES), batches(1)
    with pytest.raises(ValueError, match="image: expected features of width 192"):
        method.terms(batch._replace(image=batch.image[:, :100]))
    with pytest.raises(ValueError, match=r"labels: expected values in 0..6"):
        method.terms(batch._replace(labels=batch.labels + 7))


def test_class_names_are_checked():
    with pytest.raises(TypeError, match="class_names: expected a list"):
        CoOp(encoder(), "cat")
    with pytest.raises(ValueError, match="at least one class"):
        CoOp(encoder(), [])
    with pytest.warns(UserWarning, match="tie exactly"):
        method = CoOp(encoder(), ["cat", "cat", "dog"], n_ctx=2)
    text = method.text()
    assert torch.equal(text[0], text[1])


def test_encoders_without_what_is_needed():
    class Bare(type(encoder())):
        text, no_local = None, "it is bare"

        def __init__(self):
            self.__dict__.update(encoder().__dict__)
            self.text, self.no_local = None, "it is bare"

    with pytest.raises(ModelError, match="no text tower"):
        CoOp(Bare(), NAMES)
    with pytest.raises(ModelError, match="it is bare"):
        LoCoOp(Bare(), NAMES)


# ------------------------------------------------------------------------------ registry


def test_unknown_methods_and_settings_name_the_nearest():
    with pytest.raises(ValueError, match=r"method: .*got 'locop'; did you mean 'locoop'"):
        build_method("locop", encoder(), NAMES)
    with pytest.raises(ValueError, match="did you mean 'clip-adapter'"):
        method_class("CLIP_Adapter")
    with pytest.raises(ValueError, match=r"coop has no 'nctx'; did you mean 'n_ctx'"):
        build_method("coop", encoder(), NAMES, nctx=4)
    with pytest.raises(ValueError, match=r"ebm has no 'masks'; did you mean 'mask'"):
        build_method("ebm", encoder(), NAMES, masks="sign")
    with pytest.raises(ValueError, match=r"locoop has no 'whatever' \(its settings: .*n_ctx"):
        build_method("locoop", encoder(), NAMES, whatever=1)


@pytest.mark.parametrize("name", METHODS)
def test_registered_methods_know_their_names(name):
    kind = method_class(name)
    assert kind.name == name
    assert kind.needs in ("features", "local", "pixels")
    assert kind.recipe.epochs >= 0
    assert kind.local_note or kind.needs == "pixels"


def test_names_of_settings():
    assert setting_names(method_class("locoop"))[:3] == ("weight", "top_k", "n_ctx")
    for name in ("coop", "locoop", "ebm", "cocoop", "clip-adapter", "zoclip"):
        kind = method_class(name)
        assert set(setting_names(kind)) == set(kind(encoder(), NAMES).settings())
