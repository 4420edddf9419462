"""CLIP-Adapter: the published trajectory, identities, and what its head does with patches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench import peers_tuning as peers
from fastood.scores.many import score
from fastood.tuning.clip_adapter import ClipAdapter
from fastood.tuning.method import Batch, total_loss
from fastood.tuning.registry import build_method
from fastood.tuning.zero_shot import ZeroShot
from tests.tuning.parity import NAMES, batches, close, encoder, moved, still, trained


def weights(method):
    return [method.adapter[0].weight, method.adapter[2].weight]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_adapter_runs_the_published_trajectory(dtype):
    method, data = ClipAdapter(encoder(dtype), NAMES), batches(dtype=dtype)
    trains = [w.detach().clone().requires_grad_() for w in weights(method)]
    gamma, text = encoder(dtype).logit_scale, method.text
    steps = [
        lambda b=b: peers.clip_adapter_loss(text, trains, b.image, b.labels, gamma, 0.2)
        for b in data
    ]
    want = peers.sgd_losses(trains, steps, lr=5.0)
    without, got = still(method, data), trained(method, data, lr=5.0)
    assert moved(got, without)
    close(got, want, dtype)


def test_a_ratio_of_0_is_zero_shot():
    method = ClipAdapter(encoder(), NAMES, ratio=0.0)
    zero_shot = ZeroShot(encoder(), NAMES)
    (batch,) = batches(1)
    got, want = (m.head().similarities(batch.image, batch.local) for m in (method, zero_shot))
    torch.testing.assert_close(got.image, want.image, rtol=0, atol=1e-6)
    assert torch.equal(got.local, want.local)


def test_zero_shot_is_the_ordinary_head():
    from fastood.features.text import encode_classes
    from fastood.scores.bank import ClassBank

    words = [n.replace("_", " ") for n in NAMES]
    (batch,) = batches(1)
    for templates in ("coop", "openai-imagenet-7", ("a {}", "the {} there")):
        head = ZeroShot(encoder(), NAMES, templates=templates).head()
        bank = ClassBank(encode_classes(encoder(), words, templates=templates).features)
        assert torch.equal(head.text, bank.text)
        got, want = (h.similarities(batch.image, batch.local) for h in (head, bank))
        assert torch.equal(got.image, want.image)
        assert torch.equal(got.local, want.local)


def test_zero_shot_trains_nothing():
    method = ZeroShot(encoder(), NAMES)
    assert not list(method.parameters())
    assert not method.state_dict()
    (batch,) = batches(1)
    terms, predicted = method.terms(batch)
    s = method.head().similarities(batch.image).image
    assert torch.equal(predicted, s.argmax(-1))
    want = F.cross_entropy(s * encoder().logit_scale, batch.labels)
    torch.testing.assert_close(total_loss(terms), want, rtol=1e-5, atol=0)
    empty, _ = method.terms(Batch(*(x[:0] for x in batch)))
    assert float(total_loss(empty)) == 0


def test_the_norm_of_a_feature_does_not_matter_and_patches_do_not_move():
    """Without biases relu(W relu(W 2f)) = 2 relu(W relu(W f)): only the direction is left."""
    method = ClipAdapter(encoder(torch.float64), NAMES)
    head, (batch,) = method.head(), batches(1, dtype=torch.float64)
    f = batch.image
    w1, w2 = weights(method)
    moved_to = 0.2 * F.relu(F.relu(f @ w1.T) @ w2.T) + 0.8 * f
    want = F.normalize(moved_to, dim=-1) @ method.text.T
    got = head.similarities(f, batch.local)
    torch.testing.assert_close(got.image, want.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(head.similarities(2 * f).image, got.image, rtol=0, atol=1e-12)
    unadapted = F.normalize(batch.local, dim=-1) @ method.text.T
    torch.testing.assert_close(got.local, unadapted, rtol=0, atol=1e-12)


def test_the_start_is_seeded_and_private():
    before = torch.get_rng_state()
    a, b, c = (ClipAdapter(encoder(), NAMES, seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights(a)[0], weights(b)[0])
    assert not torch.equal(weights(a)[0], weights(c)[0])
    assert [tuple(w.shape) for w in weights(a)] == [(48, 192), (192, 48)]
    assert [name for name, _ in a.named_parameters()] == ["adapter.0.weight", "adapter.2.weight"]


def test_training_on_leaves_the_head_alone():
    method = ClipAdapter(encoder(), NAMES)
    head, (batch,) = method.head(), batches(1)
    before = head.similarities(batch.image).image
    trained(method, [batch], lr=0.1)
    assert torch.equal(head.similarities(batch.image).image, before)
    assert head.fingerprint != method.head().fingerprint


def test_the_head_works_with_all_scores():
    (batch,) = batches(1)
    head = ClipAdapter(encoder(), NAMES).head()
    found = score(batch.image, head, methods=["mcm", "gl_mcm"], local=batch.local)
    assert all(v.shape == (6,) and v.isfinite().all() for v in found.values())


def test_an_empty_share_is_0_and_still_goes_backward():
    method, (batch,) = ClipAdapter(encoder(), NAMES), batches(1)
    total_loss(method.terms(Batch(*(x[:0] for x in batch)))[0]).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in method.parameters())


def test_diverged_weights_give_nan():
    method = ClipAdapter(encoder(), NAMES)
    with torch.no_grad():
        weights(method)[1].fill_(float("inf"))
    assert total_loss(method.terms(batches(1)[0])[0]).isnan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "ratio: expected 0 <= ratio <= 1, got 1.5"),
        ({"ratio": float("nan")}, "ratio: expected a finite number"),
        ({"reduction": 0}, "reduction: expected 1 <= reduction <= D = 192"),
        ({"reduction": 193}, "reduction: expected 1 <= reduction <= D = 192"),
        ({"seed": -1}, "seed: expected"),
        ({"templates": "no place"}, "templates: expected one with {}"),
        ({"ratios": 0.1}, "clip-adapter has no 'ratios'; did you mean 'ratio'"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        build_method("clip-adapter", encoder(), NAMES, **options)


def test_features_that_do_not_fit():
    head = ClipAdapter(encoder(), NAMES).head()
    with pytest.raises(ValueError, match="were both encoded by the same model"):
        head.similarities(torch.ones(2, 100))
    with pytest.raises(ValueError, match="a zero vector"):
        head.similarities(torch.zeros(2, 192))
