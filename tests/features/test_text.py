"""Text features: the ensemble, the caches, and what users are told."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastood.errors import ModelError
from fastood.features.cache import FeatureCache
from fastood.features.text import (
    clear_text_memory,
    encode_classes,
    encode_prompts,
    prompts_digest,
)
from fastood.models import CallableEncoder, OpenClipEncoder
from tests.models import tiny

NAMES = ["cat", "dog", "dachshund puppy"]


@pytest.fixture(autouse=True)
def fresh_memory():
    clear_text_memory()


@pytest.fixture(scope="module")
def encoder():
    return OpenClipEncoder(tiny.clip(), tiny.blank, tiny.TOKENIZER, name="tiny")


class Store(dict):
    """A cache that counts."""

    def __init__(self):
        super().__init__()
        self.reads = self.writes = 0

    def get(self, key):
        self.reads += 1
        return super().get(key)

    def put(self, key, tensor):
        self.writes += 1
        self[key] = tensor


def counting(encoder, monkeypatch):
    seen: list[str] = []
    real = type(encoder).encode_text

    def encode_text(prompts):
        seen.extend(prompts)
        return real(encoder, prompts)

    monkeypatch.setattr(encoder, "encode_text", encode_text)
    return seen


def test_single_template_is_the_normalised_feature(encoder):
    got = encode_classes(encoder, NAMES)
    expected = F.normalize(encoder.encode_text([f"a photo of a {n}" for n in NAMES]), dim=-1)
    torch.testing.assert_close(got.features, expected, atol=1e-6, rtol=0)
    assert got.features.dtype == torch.float32 and got.warnings == () and not got.cached
    assert got.digest == prompts_digest(NAMES, ["a photo of a {}"])


def test_ensemble_normalises_before_and_after_the_mean(encoder):
    templates = ["a photo of a {}", "{} texture.", "a very blurry drawing of the {}."]
    got = encode_classes(encoder, NAMES, templates=templates, batch_size=4).features
    for k, name in enumerate(NAMES):
        each = [
            F.normalize(encoder.encode_text([t.format(name)])[0].double(), dim=0) for t in templates
        ]
        expected = F.normalize(torch.stack(each).mean(dim=0), dim=0)
        torch.testing.assert_close(got[k].double(), expected, atol=1e-6, rtol=0)
    assert encode_classes(encoder, NAMES, templates="mcm").templates == ("a photo of a {}",)


def test_memory_then_disk_then_nothing_new(encoder, monkeypatch):
    seen = counting(encoder, monkeypatch)
    store = Store()
    first = encode_classes(encoder, NAMES, cache=store)
    prompts = [f"a photo of a {n}" for n in NAMES]
    assert [p for p in seen if p in prompts] == prompts and store.writes == 1
    seen.clear()
    again = encode_classes(encoder, NAMES, cache=store)
    assert not seen and store.reads == 1 and again.cached
    clear_text_memory()
    from_disk = encode_classes(encoder, NAMES, cache=store)
    assert not seen and store.reads == 2 and from_disk.cached and store.writes == 1
    assert torch.equal(first.features, again.features)
    assert torch.equal(first.features, from_disk.features)


def test_the_feature_cache_keeps_text_between_processes(encoder, monkeypatch, tmp_path):
    first = encode_classes(encoder, NAMES, cache=FeatureCache(tmp_path))
    clear_text_memory()
    seen = counting(encoder, monkeypatch)
    again = encode_classes(encoder, NAMES, cache=FeatureCache(tmp_path))
    assert again.cached and not seen and torch.equal(first.features, again.features)


def test_anything_that_changes_features_misses_the_cache(monkeypatch):
    model = tiny.clip()
    enc = OpenClipEncoder(model, tiny.blank, tiny.TOKENIZER)
    encode_classes(enc, NAMES)
    seen = counting(enc, monkeypatch)
    encode_classes(enc, NAMES[::-1])
    assert seen
    seen.clear()
    encode_classes(enc, NAMES, templates="coop")
    assert seen
    seen.clear()
    with torch.no_grad():
        model.text_projection.mul_(-1)
    encode_classes(enc, NAMES)
    assert seen


def test_damaged_cache_entry_is_encoded_again(encoder):
    store = Store()
    good = encode_classes(encoder, NAMES, cache=store).features
    (key,) = store
    store[key] = torch.zeros(2, 2)
    clear_text_memory()
    assert torch.equal(encode_classes(encoder, NAMES, cache=store).features, good)
    assert store[key].shape == good.shape


def test_writing_to_the_result_does_not_reach_the_cache(encoder):
    first = encode_classes(encoder, NAMES).features
    kept = first.clone()
    first.zero_()
    assert torch.equal(encode_classes(encoder, NAMES).features, kept)


def test_repeated_names_tie_exactly_and_are_reported(encoder):
    names = ["missile", "cat", "missile"]
    with pytest.raises(ValueError, match="missile"):
        encode_classes(encoder, names)
    got = encode_classes(encoder, names, allow_duplicates=True, templates="openai-imagenet-7")
    assert torch.equal(got.features[0], got.features[2])
    assert "tie exactly" in got.warnings[0]
    many = ["Cardigan", *(f"thing {i}" for i in range(9)), "cardigan"]
    alike = encode_classes(encoder, many, batch_size=4, templates="openai-imagenet-7")
    assert "'Cardigan' = 'cardigan'" in alike.warnings[0]
    assert torch.equal(alike.features[0], alike.features[-1])


def test_model_warnings_reach_the_caller():
    enc = OpenClipEncoder(
        tiny.clip(), tiny.blank, tiny.TOKENIZER, warn=lambda prompts: [f"{len(prompts)} prompts"]
    )
    assert encode_classes(enc, NAMES).warnings == ("3 prompts",)


def test_whole_prompts(encoder):
    prompts = ["the nice cat", "the nice dog", "the nice cat"]
    got = encode_prompts(encoder, prompts)
    torch.testing.assert_close(
        got, F.normalize(encoder.encode_text(prompts), dim=-1), atol=1e-6, rtol=0
    )
    assert torch.equal(got[0], got[2])
    assert encode_prompts(encoder, []).shape == (0, tiny.DIM)
    with pytest.raises(TypeError, match="one string"):
        encode_prompts(encoder, "a cat")


def test_features_that_cannot_be_used_are_named():
    def towers(value):
        return CallableEncoder(
            torch.nn.Flatten(), tiny.blank, embed_dim=4, preprocess_id="x", fingerprint=str(value),
            text=lambda prompts: torch.full((len(prompts), 4), value),
        )  # fmt: skip

    for value in (0.0, float("nan"), float("inf")):
        with pytest.raises(ModelError, match=r"zero or not finite, first 'a photo of a cat'"):
            encode_classes(towers(value), NAMES)
    no_text = CallableEncoder(torch.nn.Flatten(), tiny.blank, embed_dim=4, preprocess_id="x")
    with pytest.raises(ModelError, match="no text tower"):
        encode_classes(no_text, NAMES)
    with pytest.raises(ValueError, match="batch_size"):
        encode_classes(towers(1.0), NAMES, batch_size=0)


def test_digest_depends_on_order_and_every_part():
    base = prompts_digest(["a", "b"], ["{}"])
    assert base == prompts_digest(("a", "b"), ("{}",))
    others = [
        prompts_digest(["b", "a"], ["{}"]),
        prompts_digest(["a", "b"], ["{}."]),
        prompts_digest(["a"], ["b", "{}"]),
        prompts_digest(["a", "b"], ["{}"], []),
        prompts_digest(["a", "b"], ["{}"], ["c"]),
    ]
    assert len({base, *others}) == 6
