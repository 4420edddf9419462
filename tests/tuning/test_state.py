"""Saved methods: what comes back is what was saved, and what does not fit is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastood.errors import DataError, ModelError
from fastood.models import load_model
from fastood.tuning.registry import build_method
from fastood.tuning.state import FORMAT, VERSION, load_method, read_header, save_method
from tests.tuning.parity import NAMES, batches, encoder, trained

KINDS = {
    "zoclip": {"templates": ["a {}.", "the {}."]},
    "coop": {"n_ctx": 4},
    "cocoop": {},
    "locoop": {"n_ctx": 3, "top_k": 2},
    "ebm": {"ctx_init": "a photo of a", "weight": 0.3, "mask": "topp"},
    "clip-adapter": {"ratio": 0.6},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained CoOp on disk."""
    method = build_method("coop", encoder(), NAMES, n_ctx=4)
    trained(method, batches(2))
    path = save_method(
        tmp_path_factory.mktemp("state") / "coop.safetensors", method, history={"epochs": 2}
    )
    return method, path


def rewritten(path, target, **changes):
    """A copy of a saved file with another header."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["header"])
    header |= changes
    header = {k: v for k, v in header.items() if v is not None}
    save_file(load_file(path), target, {"format": FORMAT, "header": json.dumps(header)})
    return target


@pytest.mark.parametrize("name", KINDS)
def test_similarities_come_back_bit_for_bit(name, tmp_path):
    method = build_method(name, encoder(), NAMES, **KINDS[name])
    if list(method.parameters()):
        trained(method, batches(2))
    (batch,) = batches(1, seed=7)
    path = save_method(tmp_path / "folder" / "m.safetensors", method)
    again = load_method(path, encoder())
    assert type(again) is type(method)
    assert again.settings() == method.settings()
    assert again.class_names == NAMES
    assert again.fingerprint() == method.fingerprint()
    for a, b in zip(*(m.head().similarities(batch.image, batch.local) for m in (method, again)),
                    strict=True):  # fmt: skip
        assert a is b is None or torch.equal(a, b)
    assert all(p.requires_grad for p in again.parameters())  # training may go on


@pytest.mark.filterwarnings("ignore:.*learned prompts")
def test_class_specific_contexts_come_back(tmp_path):
    method = build_method("coop", encoder(), NAMES, class_specific=True, n_ctx=2)
    path = save_method(tmp_path / "m.safetensors", method)
    assert torch.equal(load_method(path, encoder()).context, method.context)


def test_the_header_says_what_it_is(saved):
    method, path = saved
    header = read_header(path)
    assert header.method == "coop"
    assert header.class_names == NAMES
    assert header.settings == method.settings()
    assert header.encoder["fingerprint"] == encoder().fingerprint
    assert header.encoder["name"] == "fastood-tiny"
    assert header.encoder["embed_dim"] == 192
    assert header.encoder["logit_scale"] == encoder().logit_scale
    assert header.training == {"epochs": 2}
    summary = header.summary()
    assert summary["classes"] == len(NAMES)
    assert "class_names" not in summary
    json.dumps(summary)


def test_histories_of_every_kind(tmp_path):
    @dataclass
    class Plain:
        losses: list[float]

    class Own:
        def as_dict(self):
            return {"losses": [2.0]}

    method = build_method("zoclip", encoder(), NAMES)
    for history, want in (
        (Plain([1.0]), {"losses": [1.0]}),
        (Own(), {"losses": [2.0]}),
        (None, {}),
    ):
        save_method(tmp_path / "m.safetensors", method, history=history)
        assert read_header(tmp_path / "m.safetensors").training == want
    for bad in ({"x": object()}, {"x": float("nan")}, [1]):
        with pytest.raises(ValueError, match="history"):
            save_method(tmp_path / "m.safetensors", method, history=bad)


def test_a_failed_write_leaves_the_old_file(saved, tmp_path, monkeypatch):
    method, _ = saved
    path = save_method(tmp_path / "m.safetensors", method, history={"epochs": 1})
    before = path.read_bytes()

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space"):
        save_method(path, method, history={"epochs": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_diverged_numbers_are_not_saved(tmp_path):
    method = build_method("coop", encoder(), NAMES, n_ctx=4)
    with torch.no_grad():
        method.context[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf in context"):
        save_method(tmp_path / "m.safetensors", method)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ refused


def test_another_backbone_is_refused_with_both_sides(saved):
    _, path = saved
    other = load_model("fastood-tiny")
    other.name = "another"
    with torch.no_grad():
        other.model.ln_final.weight.mul_(1.5)
    with pytest.raises(ModelError) as error:
        load_method(path, other)
    told = str(error.value)
    assert encoder().fingerprint[:12] in told
    assert other.fingerprint[:12] in told
    assert "fastood-tiny (" in told
    assert "another (" in told
    other.name = "fastood-tiny"
    with pytest.raises(ModelError, match="names agree, the weights do not"):
        load_method(path, other)
    with pytest.raises(ModelError, match="load the model in float32"):
        load_method(path, encoder(torch.float64))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (NAMES[:-1], r"on 7 classes, got 6; .* number 6: 'pot' in the file, nothing given"),
        ((*NAMES, "sun"), r"on 7 classes, got 8; .* number 7: nothing in the file, 'sun' given"),
        (NAMES[::-1], r"the same ones in another order; .* number 0: 'cat' in the file, 'pot'"),
        ((*NAMES[:2], "plane", *NAMES[3:]), r"number 2: 'airplane' in the file, 'plane' given"),
        (("cat", "brown dog", *NAMES[2:]), r"number 1: 'brown_dog' in the file, 'brown dog'"),
    ],
)
def test_other_class_lists_are_refused(saved, names, told):
    _, path = saved
    with pytest.raises(ModelError, match=told):
        load_method(path, encoder(), class_names=names)


def test_the_callers_own_classes_and_settings_may_be_given(saved):
    method, path = saved
    again = load_method(path, encoder(), class_names=list(NAMES), settings={"n_ctx": 4})
    assert torch.equal(again.context, method.context)


def test_other_settings_are_refused(saved):
    _, path = saved
    with pytest.raises(ModelError, match=r"n_ctx is 4 in the file, 16 given; seed is 1 .* 2 given"):
        load_method(path, encoder(), settings={"n_ctx": 16, "seed": 2})


def test_numbers_of_another_prompt_length_are_refused(saved, tmp_path):
    method, path = saved
    changed = rewritten(
        path, tmp_path / "m.safetensors", settings={**method.settings(), "n_ctx": 5}
    )
    with pytest.raises(DataError, match=r"context: .*'n_ctx': 5.* mean \(5, 128\), got \(4, 128\)"):
        load_method(changed, encoder())


def test_numbers_of_another_method_are_refused(saved, tmp_path):
    _, path = saved
    changed = rewritten(path, tmp_path / "m.safetensors", method="clip-adapter", settings={})
    with pytest.raises(DataError, match=r"expected adapter.0.weight, .*got context"):
        load_method(changed, encoder())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": VERSION + 1, "fastood": "9.0"}, "by fastood 9.0; .* update it"),
        ({"version": 0}, "header is damaged"),
        ({"version": None}, "header is damaged"),
        ({"method": "dreamcoop"}, "holds the method 'dreamcoop'"),
        ({"method": ["coop"]}, "holds the method"),
        ({"class_names": "cat"}, "class_names is no list"),
        ({"class_names": [1, 2]}, "class_names is no list"),
        ({"settings": None}, "without settings"),
        ({"settings": []}, "header is damaged"),
        ({"encoder": {}}, "encoder has no fingerprint"),
        ({"digest": "0"}, "changed or damaged after"),
    ],
)
def test_damaged_headers_are_refused(saved, tmp_path, changes, told):
    _, path = saved
    with pytest.raises(DataError, match=told):
        read_header(rewritten(path, tmp_path / "m.safetensors", **changes))


def test_an_unknown_setting_of_the_file_is_named(saved, tmp_path):
    _, path = saved
    changed = rewritten(path, tmp_path / "m.safetensors", settings={"n_ctxx": 4})
    with pytest.raises(DataError, match="coop has no 'n_ctxx'; did you mean 'n_ctx'"):
        load_method(changed, encoder())


def test_files_that_are_none_of_ours(saved, tmp_path):
    _, path = saved
    with pytest.raises(DataError, match="found no such file"):
        read_header(tmp_path / "missing.safetensors")
    weights = tmp_path / "weights.safetensors"
    save_file({"prompt_learner.ctx": torch.zeros(16, 512)}, weights)
    with pytest.raises(DataError, match="weights of other tools cannot be read"):
        read_header(weights)
    save_file({"x": torch.zeros(1)}, weights, {"format": FORMAT, "header": "{"})
    with pytest.raises(DataError, match="header is damaged"):
        read_header(weights)
    for content in (b"", b"hello", path.read_bytes()[:100], path.read_bytes()[:-1]):
        weights.write_bytes(content)
        with pytest.raises(DataError, match="damaged, cut short or no safetensors"):
            read_header(weights)
    with pytest.raises(DataError, match="expected a saved method, got a folder"):
        read_header(tmp_path)


def test_one_changed_bit_is_noticed(saved, tmp_path):
    _, path = saved
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    changed = tmp_path / "m.safetensors"
    changed.write_bytes(bytes(content))
    with pytest.raises(DataError, match="changed or damaged after it was saved"):
        load_method(changed, encoder())
