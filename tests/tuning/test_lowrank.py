"""Low-rank updates on a model: attached, merged, taken off."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastood.models.copies import copy_encoder
from fastood.models.matrices import find
from fastood.tuning.lora import LoRA
from fastood.tuning.lowrank import attach, attached, detach, merge
from tests.tuning.towers import NAMES, moved, open_clip_encoder


@pytest.mark.parametrize("kinds", ["q", "k", "v", ("q", "v")])
def test_slices_touch_their_own_rows_only(kinds):
    encoder = open_clip_encoder()
    method = moved(LoRA(encoder, NAMES, kinds=kinds, rank=2, towers="image"))
    merged = method.adapted(encoder).model.state_dict()
    touched = {m.key: [] for m in method.matrices}
    for m in method.matrices:
        touched[m.key].append(m.rows)
    for key, before in encoder.model.state_dict().items():
        changed = (merged[key] != before).reshape(len(before), -1).any(dim=1) if before.ndim else []
        want = torch.zeros(len(changed), dtype=torch.bool)
        for rows in touched.get(key, []):
            want[slice(*rows)] = True
        assert torch.equal(torch.as_tensor(changed, dtype=torch.bool), want), key


def test_fast_attention_path_sees_the_update():
    """nn.MultiheadAttention hands ``in_proj_weight`` to a fused kernel in evaluation mode."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    block = nn.ModuleDict({"attn": layer})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = nn.Module()
            self.visual.transformer = nn.Module()
            self.visual.transformer.resblocks = nn.ModuleList([block])

    model = Model()
    (matrix,) = find(model, towers="image", kinds="v")
    factors = (nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.randn(16, 2)))
    x = torch.randn(3, 5, 16)
    before = layer(x, x, x, need_weights=False)[0]
    attach(model, {matrix: factors}, scale=0.5)
    with torch.no_grad():
        fast = layer(x, x, x, need_weights=False)[0]
    slow = layer.train()(x, x, x, need_weights=False)[0]
    assert slow.requires_grad
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    assert float((fast - before).detach().abs().max()) > 0.1
    merge(model)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x, x, x, need_weights=False)[0], fast)


def test_detach_restores_and_attached_tells():
    encoder = open_clip_encoder()
    model = copy_encoder(encoder).model
    state = copy.deepcopy(model.state_dict())
    matrices = find(model, kinds=("q", "up"), towers="text")
    updates = {
        m: (nn.Parameter(torch.randn(2, m.shape[1]).double()),
            nn.Parameter(torch.randn(m.shape[0], 2).double()))
        for m in matrices
    }  # fmt: skip
    attach(model, updates, scale=1.0)
    assert {m.address for m in attached(model)} == {m.address for m in matrices}
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        model.load_state_dict(state, strict=True)  # an attached model is not the original
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        encoder.model.load_state_dict(model.state_dict(), strict=True)
    with pytest.raises(ValueError, match="already has a parametrisation; merge or detach"):
        attach(model, updates, scale=1.0)
    detach(model)
    assert attached(model) == ()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for remove in (merge, detach):
        with pytest.raises(ValueError, match="found none"):
            remove(model)


def test_attach_refuses_what_does_not_fit():
    model = open_clip_encoder().model
    (matrix, *_) = find(model, kinds="up", towers="image")
    wrong = (nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.zeros(7, 2)))
    with pytest.raises(ValueError, match=r"image.0.up, got \(2, 5\) and \(7, 2\)"):
        attach(model, {matrix: wrong}, scale=1.0)
    with pytest.raises(ValueError, match="at least one matrix"):
        attach(model, {}, scale=1.0)
