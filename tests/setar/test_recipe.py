"""Recipes: their file, the authors' lists, and what applying one does to a model."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import Tensor

from fastood.errors import DataError, ModelError
from fastood.models import CallableEncoder
from fastood.models.base import Encoder
from fastood.models.matrices import Matrix, find, list_matrices
from fastood.setar.picks import Pick, as_pick, stage_and_block
from fastood.setar.recipe import FORMAT, RECIPE, Recipe, is_recipe
from fastood.tuning.adaptation import adapt
from fastood.tuning.lora import LoRA
from fastood.tuning.state import ADAPTATION, read_header, save_method
from tests.models import tiny
from tests.tolerances import LOW_RANK64_RTOL
from tests.tuning.towers import ENCODERS, NAMES, WORDS, moved, open_clip_encoder, pixels

# non-zero picks of the published recipe for CLIP ViT-B/16 on ImageNet-1k
PUBLISHED = [
    ["visual", "W_up", 11, 0.15],
    ["visual", "W_up", 10, 0.15],
    ["visual", "W_up", 9, 0],
    ["visual", "W_up", 3, 0.05],
    ["visual", "W_up", 0, 0.15],
    ["text", "W_up", 6, 0.25],
    ["text", "W_up", 5, 0.1],
    ["text", "W_up", 4, 0.2],
    ["text", "W_up", 3, 0.05],
    ["text", "W_up", 2, 0.05],
    ["text", "W_up", 0, 0.2],
]
PICKS = [
    ["image", "up", 1, 0.25],
    ["image", "q", 0, 5],
    ["image", "proj", None, 0.3],
    ["text", "v", 1, 0.4],
    ["text", "down", 0, 0],
    ["text", "proj", None, 2],
]


@pytest.fixture(params=list(ENCODERS))
def encoder(request) -> Encoder:
    return ENCODERS[request.param]()


def dropped(weight: Tensor, count: int, part: str) -> Tensor:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    kept = slice(0, len(s) - count) if part == "minor" else slice(count, len(s))
    return (u[:, kept] * s[kept]) @ vh[kept]


@pytest.mark.parametrize("part", ["minor", "principal"])
def test_applied_weights_are_those_of_a_plain_svd(encoder, part):
    recipe = Recipe.of(encoder, PICKS, part=part)
    before = {k: v.clone() for k, v in encoder.model.state_dict().items()}
    changed = recipe.apply(encoder)
    counts = {p.address: p.count for p in recipe.picks}
    assert counts == {
        "image.1.up": 8, "image.0.q": 5, "image.proj": 5, "text.1.v": 13, "text.0.down": 0,
        "text.proj": 2,
    }  # fmt: skip
    for matrix in list_matrices(encoder.model):
        weight, was = matrix.weight(changed.model), matrix.weight(encoder.model)
        count = counts.get(matrix.address, 0)
        if count:
            torch.testing.assert_close(
                weight,
                dropped(was, count, part),
                rtol=0,
                atol=LOW_RANK64_RTOL * float(was.detach().norm()),
            )
        else:  # k and v beside q in the same parameter too
            assert torch.equal(weight, was), matrix.address
    assert all(torch.equal(v, before[k]) for k, v in encoder.model.state_dict().items())
    assert list(changed.model.state_dict()) == list(before)
    assert changed.name == f"{encoder.name} + setar"
    assert changed.fingerprint != encoder.fingerprint
    assert not torch.equal(changed.encode_text(WORDS), encoder.encode_text(WORDS))
    images = pixels(encoder)
    assert not torch.equal(changed.encode_image(images).image, encoder.encode_image(images).image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_precision(dtype):
    encoder = open_clip_encoder(dtype=dtype)
    changed = Recipe.of(encoder, [["image", "up", 0, 0.5], ["image", "v", 0, 0.25]]).apply(encoder)
    assert changed.dtype == dtype
    for kind, count in (("up", 16), ("v", 8)):
        (matrix,) = find(encoder.model, towers="image", kinds=kind, layers=[0])
        want = dropped(matrix.weight(encoder.model), count, "minor").to(dtype)
        found = matrix.weight(changed.model)
        assert found.dtype == dtype
        torch.testing.assert_close(found, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_nothing_picked_changes_nothing(encoder):
    recipe = Recipe.of(encoder, [["image", "up", 1, 0.0], ["text", "up", 0, 0]])
    assert recipe.changes == ()
    assert recipe.apply(encoder).fingerprint == encoder.fingerprint


def test_random_directions_are_those_of_the_seed():
    encoder = open_clip_encoder()
    one, again, other = (
        Recipe.of(encoder, [["image", "up", 0, 0.5]], part="random", seed=seed).apply(encoder)
        for seed in (1, 1, 2)
    )
    assert one.fingerprint == again.fingerprint != other.fingerprint


def test_a_seed_tells_recipes_apart_only_where_something_is_drawn():
    picks = [["image", "up", 0, 0.5]]
    for part, same in (("minor", True), ("random", False)):
        one, other = (Recipe(tuple(picks), part, seed).digest for seed in (1, 2))
        assert (one == other) is same


def test_written_and_read(encoder, tmp_path):
    search = {"objective": {"metric": "loss"}, "final": {"loss": 0.61}, "images": 10}
    picks = [Pick("image", "up", 1, 0.25, objective=0.7), Pick("text", "up", 0, 0, objective=0.61)]
    recipe = Recipe.of(encoder, picks, search=search)
    path = recipe.write(tmp_path / "new" / "recipe.json")
    again = Recipe.read(path)
    assert again == recipe and again.digest == recipe.digest
    assert again.objective == 0.61
    assert [p.address for p in again.changes] == ["image.1.up"]
    assert again.model["fingerprint"] == encoder.fingerprint
    assert again.model["matrices"] == {"image.1.up": [128, 32], "text.0.up": [128, 32]}
    assert again.apply(encoder).fingerprint == recipe.apply(encoder).fingerprint
    assert is_recipe(path) and path.stat().st_size < 2000
    # ratios that are numbers stay numbers
    whole = Recipe.of(encoder, [["image", "up", 0, 1]])
    assert Recipe.read(whole.write(tmp_path / "one.json")).picks[0].count == 1
    with pytest.raises(ValueError, match="expected JSON values"):
        Recipe.of(encoder, picks, search={"loss": float("nan")}).write(tmp_path / "nan.json")


def test_a_published_recipe_counts_as_published():
    """Counts of 768 and 512 directions, and the trainable numbers of SeTAR+FT."""
    recipe = Recipe.from_lora_settings(PUBLISHED)
    sizes = {"image": (3072, 768), "text": (2048, 512)}
    found = {}
    for pick in recipe.changes:
        matrix = Matrix(pick.tower, pick.layer, "up", "", "", None, False, sizes[pick.tower])
        found[pick.address] = pick.counted(matrix).count
    assert found == {
        "image.11.up": 115, "image.10.up": 115, "image.3.up": 38, "image.0.up": 115,
        "text.6.up": 128, "text.5.up": 51, "text.4.up": 102, "text.3.up": 26, "text.2.up": 26,
        "text.0.up": 102,
    }  # fmt: skip
    trainable = sum(r * sum(sizes[address.split(".")[0]]) for address, r in found.items())
    assert trainable == 2_584_320
    assert recipe.lora_settings() == PUBLISHED


def test_files_of_the_authors(tmp_path):
    plain, config = tmp_path / "list.json", tmp_path / "config_best.json"
    plain.write_text(json.dumps(PUBLISHED), encoding="utf-8")
    config.write_text(
        json.dumps({"lora_settings": PUBLISHED, "lora_svd_init_type": "large"}), encoding="utf-8"
    )
    assert Recipe.read(plain).lora_settings() == PUBLISHED
    assert Recipe.from_lora_settings(str(plain)) == Recipe.read(plain)
    assert Recipe.read(config).part == "principal"
    assert is_recipe(plain) and is_recipe(config)
    # their interleaved search comes back to the projections: the last time counts
    twice = [["visual", "W_p", None, 0.1], ["text", "W_p", None, 0], ["visual", "W_p", None, 0.3]]
    assert {p.address: p.ratio for p in Recipe.from_lora_settings(twice).picks} == {
        "image.proj": 0.3, "text.proj": 0,
    }  # fmt: skip
    config.write_text(json.dumps({"lora_settings": PUBLISHED, "lora_svd_init_type": "random"}))
    with pytest.warns(RuntimeWarning, match="cannot be found again"):
        assert Recipe.read(config).part == "random"


def test_names_of_the_authors():
    names = {"W_q": "q", "W_k": "k", "W_v": "v", "W_o": "o", "W_up": "up", "W_down": "down"}
    for theirs, ours in names.items():
        pick = as_pick(["visual", theirs, 3, 0.05])
        assert (pick.tower, pick.kind, pick.layer) == ("image", ours, 3)
        assert pick.lora_setting() == ["visual", theirs, 3, 0.05]
        assert as_pick(["image", ours, 3, 0.05]) == pick
    assert as_pick(["visual", "W_up", [2, 17], 0.4]).address == "image.2.17.up"
    assert as_pick(["visual", "W_p", [None, None], 0.4]).layer is None
    stages = [2, 2, 18, 2]
    assert [stage_and_block(i, stages) for i in (0, 3, 4, 21, 23)] == [
        (0, 0), (1, 1), (2, 0), (2, 17), (3, 1),
    ]  # fmt: skip
    assert Pick("image", "up", 21, 0.4).lora_setting(stages) == ["visual", "W_up", [2, 17], 0.4]
    assert Pick("image", "proj", None, 0.4).lora_setting(stages)[2] == [None, None]


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        (["vision", "up", 0, 0.1], "tower: expected one of image, text, got 'vision'"),
        (["image", "W_upp", 0, 0.1], "kinds: expected some of .* did you mean 'W_up'"),
        (["image", "up", -1, 0.1], "layer: expected the number of a block"),
        (["image", "up", None, 0.1], "layer: expected the number of a block"),
        (["image", "up", "3", 0.1], "layer: expected the number of a block"),
        (["image", "up", [1, 2, 3], 0.1], "layer: expected the number of a block"),
        (["image", "proj", 2, 0.1], "layer: a projection has none, got 2"),
        (["image", "up", 0, 1.0], r"expected a share in \[0, 1\), got 1.0"),
        (["image", "up", 0, -0.1], r"expected a share in \[0, 1\)"),
        (["image", "up", 0, float("nan")], r"expected a share in \[0, 1\)"),
        (["image", "up", 0, True], "expected a share"),
        (["image", "up", 0, "0.1"], "expected a share"),
        (["image", "up", 0], r"expected \[tower, weight, layer, ratio\]"),
        ("up", r"expected \[tower, weight, layer, ratio\]"),
        ({"tower": "image", "kind": "up", "layer": 0}, "without ratio"),
        ({"tower": "image", "kind": "up", "layer": 0, "ratio": 0, "rank": 2}, "with rank"),
        ({"tower": "image", "kind": "up", "layer": 0, "ratio": 0, "count": 1.5}, "count: expected"),
        (
            {"tower": "image", "kind": "up", "layer": 0, "ratio": 0, "objective": "x"},
            "objective: expected",
        ),
    ],
)
def test_bad_picks(pick, message):
    with pytest.raises(ValueError, match=message):
        Recipe((pick,))


def test_bad_recipes():
    with pytest.raises(ValueError, match="picks: expected at least one"):
        Recipe(())
    with pytest.raises(ValueError, match=r"image.0.up more than once"):
        Recipe((["image", "up", 0, 0.1], ["visual", "W_up", 0, 0]))
    with pytest.raises(ValueError, match="part: expected one of minor, principal, random"):
        Recipe((["image", "up", 0, 0.1],), part="small")
    with pytest.raises(ValueError, match="seed"):
        Recipe((["image", "up", 0, 0.1],), seed=-1)
    with pytest.raises(ValueError, match="lora_settings: expected a list"):
        Recipe.from_lora_settings({"visual": 1})


def test_models_that_do_not_fit():
    encoder = open_clip_encoder()
    for pick, message in (
        (["image", "up", 7, 0.1], r"has no image.7.up; it has image.0..1 of q, k, v, o, up, down"),
        (["text", "up", [0, 0], 0.1], "has no stages, so no text.0.0.up"),
    ):
        with pytest.raises(ModelError, match=message):
            Recipe.of(encoder, [pick])
        with pytest.raises(ModelError, match=message):
            Recipe.from_lora_settings([pick]).apply(encoder)
    with pytest.raises(ValueError, match=r"image.0.up \(128, 32\): .*min\(m, n\) = 32, got 33"):
        Recipe.of(encoder, [["image", "up", 0, 33]])
    recipe = Recipe.of(encoder, [["image", "up", 0, 0.1]])
    wide = open_clip_encoder(image=tiny.vision(width=64))
    with pytest.raises(ModelError, match=r"is \(256, 64\), but \(128, 32\) where it was picked"):
        recipe.apply(wide)
    resnet = open_clip_encoder(image=tiny.RESNET)
    with pytest.raises(ModelError, match=r"has no image.0.up; it has text.0..1"):
        recipe.apply(resnet)
    function = CallableEncoder(torch.nn.Flatten(), tiny.blank, embed_dim=4, preprocess_id="none")
    with pytest.raises(ModelError, match="CallableEncoder"):
        recipe.apply(function)


def test_weights_that_are_not_finite():
    encoder = open_clip_encoder()
    recipe = Recipe.of(encoder, [["image", "v", 1, 0.1]])
    (matrix,) = find(encoder.model, towers="image", kinds="v", layers=[1])
    with torch.no_grad():
        matrix.weight(encoder.model)[0, 0] = float("nan")
    with (
        pytest.warns(RuntimeWarning, match="other weights"),
        pytest.raises(ModelError, match=r"image.1.v has NaN or Inf"),
    ):
        recipe.apply(encoder)


def test_weights_that_are_computed_from_others():
    """A recipe would be lost on them without a word."""
    encoder = open_clip_encoder()
    mlp = encoder.model.visual.transformer.resblocks[0].mlp
    torch.nn.utils.parametrizations.weight_norm(mlp.c_fc)
    recipe = Recipe((["image", "up", 0, 0.4],))
    for factored in (False, True):
        with pytest.raises(ModelError, match="is computed from other parameters"):
            recipe.apply(encoder, factored=factored)


def test_other_weights_of_the_same_architecture(tmp_path):
    encoder, other = open_clip_encoder(), open_clip_encoder(dtype=torch.float32)
    path = Recipe.of(encoder, [["image", "up", 0, 0.1]]).write(tmp_path / "r.json")
    with pytest.warns(RuntimeWarning, match=f"{encoder.fingerprint[:12]}, float64.*float32"):
        Recipe.read(path).apply(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Recipe.read(path).apply(encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), r"version 2 of the format .* update it"),
        (lambda c: c.update(version="1"), "version '1'"),
        (lambda c: c.update(format="other"), "expected a recipe of fastood .* got JSON of format"),
        (lambda c: c.pop("picks"), "picks: expected a list"),
        (lambda c: c["picks"].append(3), "picks: expected a list"),
        (lambda c: c["picks"][0].update(ratio=1.5), "expected a share"),
        (lambda c: c["picks"][0].update(ratio=None), "expected a share"),
        (lambda c: c["picks"].append(c["picks"][0]), "more than once"),
        (lambda c: c.update(model=[]), "model: expected fields"),
        (lambda c: c["model"].update(matrices=[1]), "model: expected matrices"),
        (lambda c: c["model"]["matrices"].update({"image.1.up": 7}), "model: expected matrices"),
        (lambda c: c["model"]["matrices"].update({"image.1.up": [8]}), "model: expected matrices"),
        (lambda c: c["model"].update(stages="2"), "model: expected matrices"),
        (lambda c: c.update(part=["minor"]), "part: expected"),
        (lambda c: c.update(seed="a"), "seed"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    path = Recipe.of(open_clip_encoder(), PICKS).write(tmp_path / "r.json")
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        Recipe.read(path)
    with pytest.raises(DataError, match=message):
        adapt(open_clip_encoder(), [path])


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match="found no such file"):
        Recipe.read(tmp_path / "missing.json")
    with pytest.raises(DataError, match="found no such file"):
        adapt(open_clip_encoder(), [tmp_path / "missing.json"])
    for read in (Recipe.read, lambda folder: adapt(open_clip_encoder(), [folder])):
        with pytest.raises(DataError, match=r"got a folder$"):
            read(tmp_path)
    (tmp_path / RECIPE).touch()
    with pytest.raises(DataError, match=r"a recipe, got a folder; did you mean .*/recipe\.json\?"):
        Recipe.read(tmp_path)
    (tmp_path / ADAPTATION).touch()
    with pytest.raises(DataError, match=r"did you mean .*adaptation\.safetensors or .*recipe"):
        adapt(open_clip_encoder(), [tmp_path])
    bad = tmp_path / "bad.json"
    for content in (b"", b"{", b"[NaN]", b"\xff\xfe{", b'{"lora_settings": 3}', b"[" * 100_000):
        bad.write_bytes(content)
        with pytest.raises(DataError):
            Recipe.read(bad)
        with pytest.raises(DataError):
            adapt(open_clip_encoder(), [bad])
    edited = Recipe.of(open_clip_encoder(), [["image", "up", 0, 0.5]]).write(bad)
    edited.write_text(edited.read_text("utf-8").replace("0.5", "0.4"), encoding="utf-8")
    message = r"bad\.json: image.0.up .* a ratio of 0.4 means 13 directions, the recipe says 16"
    with pytest.raises(ValueError, match=message):
        adapt(open_clip_encoder(), [edited])


def test_adapt_takes_recipes_and_what_was_trained_on_them(tmp_path):
    encoder = open_clip_encoder()
    recipe = Recipe.of(encoder, PICKS[:2], search={"created": "now"})
    first = recipe.write(tmp_path / "recipe")  # the name does not matter
    changed = recipe.apply(encoder)
    second = save_method(
        tmp_path / "lora.safetensors", moved(LoRA(changed, NAMES, rank=2, layers=[1]))
    )
    found = adapt(encoder, [first, second])
    assert found.head is None and found.class_names is None
    assert found.encoder.name.endswith("+ setar + lora")
    made, trained = found.made_of
    assert (made["method"], made["digest"], made["classes"]) == ("setar", recipe.digest, 0)
    assert made["settings"]["picks"] == [["image", "up", 1, 0.25], ["image", "q", 0, 5]]
    assert made["encoder"]["fingerprint"] == encoder.fingerprint and made["created"] == "now"
    assert trained["encoder"]["fingerprint"] == changed.fingerprint
    assert not read_header(first).has_head
    with pytest.raises(ModelError, match="was trained on"):
        adapt(encoder, [second, first])
    theirs = tmp_path / "theirs.json"
    theirs.write_text(json.dumps([["visual", "W_up", 1, 0.25], ["visual", "W_q", 0, 5]]))
    assert adapt(encoder, [theirs]).encoder.fingerprint == changed.fingerprint
    assert FORMAT == "fastood-setar"
