"""CoCoOp: the published trajectory, its identity with CoOp, per-image prompts in the head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench import peers_tuning as peers
from fastood.scores.many import score
from fastood.tuning.cocoop import CoCoOp
from fastood.tuning.method import Batch, total_loss
from fastood.tuning.prompt_methods import CoOp
from tests.tuning.parity import LR, NAMES, batches, close, encoder, moved, still, trained
from tests.tuning.test_prompt_methods import plain_prompts


def weights(method):
    first, _, second = method.meta
    return [first.weight, first.bias, second.weight, second.bias]


def zeroed(method):
    with torch.no_grad():
        for p in method.meta.parameters():
            p.zero_()
    return method


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cocoop_runs_the_published_trajectory(dtype):
    """Batches of one as the authors train, then larger ones; plain: image after image."""
    method = CoCoOp(encoder(dtype), NAMES, ctx_init=None)
    data = [*batches(10, b=1, dtype=dtype), *batches(10, b=4, dtype=dtype, seed=1)]
    prompts, gamma = plain_prompts(dtype), encoder(dtype).logit_scale
    trains = [x.detach().clone().requires_grad_() for x in (method.context, *weights(method))]
    steps = [
        lambda b=b: peers.cocoop_loss(prompts, trains[0], trains[1:], b.image, b.labels, gamma)
        for b in data
    ]
    want = peers.sgd_losses(trains, steps, lr=LR)
    without, got = still(method, data), trained(method, data)
    assert moved(got, without)
    close(got, want, dtype)


def test_a_zero_meta_net_is_coop():
    """In similarities, loss and the gradient of the context."""
    network = encoder(torch.float64)
    coop = CoOp(network, NAMES, ctx_init="a photo of a")
    cocoop = zeroed(CoCoOp(network, NAMES))
    (batch,) = batches(1, dtype=torch.float64)
    found = []
    for method in (coop, cocoop):
        loss = total_loss(method.terms(batch)[0])
        loss.backward()
        s = method.head().similarities(batch.image, batch.local)
        found.append((loss.detach(), method.context.grad, s.image, s.local))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_the_authors_start():
    method = CoCoOp(encoder(), NAMES)
    assert method.settings() == {
        "n_ctx": 4, "ctx_init": "a photo of a", "position": "end", "reduction": 16, "seed": 1,
        "chunk": None,
    }  # fmt: skip
    assert [tuple(w.shape) for w in weights(method)] == [(12, 192), (12,), (128, 12), (128,)]
    assert all(p.dtype == torch.float32 for p in method.parameters())
    other = CoCoOp(encoder(), NAMES, seed=2)
    assert not torch.equal(weights(other)[0], weights(method)[0])
    assert torch.equal(other.context, method.context)  # from words


def test_the_head_gives_every_image_its_own_prompts(monkeypatch):
    method = CoCoOp(encoder(torch.float64), NAMES)
    (batch,) = batches(1, dtype=torch.float64)
    prompts = plain_prompts(torch.float64)
    z, zl = F.normalize(batch.image, dim=-1), F.normalize(batch.local, dim=-1)
    rows, patches = [], []
    with torch.no_grad():
        for one, some in zip(z, zl, strict=True):
            text = F.normalize(prompts(method.context + method.meta(one)), dim=-1)
            rows.append(text @ one)
            patches.append(some @ text.T)
    head = method.head()
    got = head.similarities(batch.image, batch.local)
    torch.testing.assert_close(got.image, torch.stack(rows), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.local, torch.stack(patches), rtol=0, atol=1e-12)
    assert not got.image.requires_grad
    # image after image where memory allows no more
    monkeypatch.setattr("fastood.scores.inputs.BLOCK", 1)
    blocked = head.similarities(batch.image, batch.local)
    torch.testing.assert_close(blocked.image, got.image, rtol=0, atol=1e-12)
    torch.testing.assert_close(blocked.local, got.local, rtol=0, atol=1e-12)


def test_the_head_without_images_and_with_half_precision():
    head = CoCoOp(encoder(), NAMES).head()
    (batch,) = batches(1)
    none = head.similarities(batch.image[:0], batch.local[:0])
    assert none.image.shape == (0, 7)
    assert none.local.shape == (0, 5, 7)
    half = head.similarities(batch.image.half()).image
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, head.similarities(batch.image).image, rtol=0, atol=1e-3)


def test_the_head_works_with_all_scores():
    head = CoCoOp(encoder(), NAMES).head()
    (batch,) = batches(1)
    found = score(batch.image, head, methods=["mcm", "gl_mcm"], local=batch.local)
    assert all(v.shape == (6,) and v.isfinite().all() for v in found.values())


def test_training_on_leaves_the_head_alone():
    method = CoCoOp(encoder(), NAMES)
    head, (batch,) = method.head(), batches(1)
    before = head.similarities(batch.image).image
    trained(method, [batch])
    assert torch.equal(head.similarities(batch.image).image, before)
    assert head.fingerprint != method.head().fingerprint


def test_chunks_change_nothing():
    found = []
    (batch,) = batches(1, b=3, dtype=torch.float64)
    for chunk in (None, 2, 5):
        method = CoCoOp(encoder(torch.float64), NAMES, chunk=chunk)
        loss = total_loss(method.terms(batch)[0])
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in method.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)


def test_two_processes_sum_to_one():
    (batch,) = batches(1, dtype=torch.float64)
    whole, parts = (CoCoOp(encoder(torch.float64), NAMES) for _ in range(2))
    total_loss(whole.terms(batch)[0]).backward()
    for share in (slice(0, 4), slice(4, 6), slice(6, 6)):
        terms, _ = parts.terms(Batch(*(x[share] for x in batch)))
        total_loss(terms, [6]).backward()
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.ones(2, 100), "were both encoded by the same model"),
        (torch.zeros(2, 192), "a zero vector has no direction"),
        (torch.full((2, 192), float("nan")), "must be finite"),
    ],
)
def test_features_that_do_not_fit(features, message):
    with pytest.raises(ValueError, match=message):
        CoCoOp(encoder(), NAMES).head().similarities(features)


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="n_ctx: expected 4, the number of tokens of ctx_init"):
        CoCoOp(encoder(), NAMES, n_ctx=8)
    with pytest.raises(ValueError, match="reduction: expected 1 <= reduction"):
        CoCoOp(encoder(), NAMES, reduction=0)
    with pytest.raises(ValueError, match="local: expected patches of 2 images, got 3"):
        CoCoOp(encoder(), NAMES).head().similarities(torch.ones(2, 192), torch.ones(3, 4, 192))
