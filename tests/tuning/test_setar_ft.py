"""SeTAR+FT: the original model at first, the plain form after a step, its settings and its file."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastood.cli.app import run
from fastood.demo import CALIBRATION, ID, NEAR_OOD, photo_folder
from fastood.errors import DataError, ModelError
from fastood.models.base import Encoder
from fastood.models.matrices import find, list_matrices
from fastood.pipeline.asked import check_given, sizes_of
from fastood.setar.lowrank import LowRankBasis, count_of
from fastood.setar.recipe import Recipe
from fastood.tuning.loop import train
from fastood.tuning.lora import LoRA
from fastood.tuning.method import Batch, total_loss
from fastood.tuning.setar_ft import SeTARFT
from fastood.tuning.state import load_method, read_header, save_method
from tests.models import tiny
from tests.tolerances import LORA_MERGED_ATOL, LOW_RANK_REST_RTOL
from tests.tuning.test_lora import Pixels, gradients, plain_loss
from tests.tuning.towers import ENCODERS, LABELS, NAMES, WORDS, open_clip_encoder, pixels

PICKS = [
    ["image", "up", 1, 0.25],
    ["image", "q", 0, 5],
    ["image", "v", 1, 0.3],
    ["image", "proj", None, 0.3],
    ["text", "down", 1, 0.4],
    ["text", "v", 0, 3],
    ["text", "proj", None, 2],
    ["text", "up", 0, 0],
]
UP = [["image", "up", 1, 0.25], ["image", "up", 0, 0.4], ["text", "up", 1, 0.3]]


@pytest.fixture(params=list(ENCODERS))
def encoder(request) -> Encoder:
    return ENCODERS[request.param]()


def moved(method: SeTARFT, seed: int = 0) -> SeTARFT:
    """``method`` with other numbers in A and B, as after some training."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.1)
    return method


def weights(method: SeTARFT) -> dict[str, Tensor]:
    return {m.address: m.weight(method._student.model).detach() for m in method.matrices}


@pytest.mark.parametrize("part", ["minor", "principal", "random"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("library", list(ENCODERS))
def test_at_first_it_is_the_original_model_bit_for_bit(library, dtype, part):
    encoder = ENCODERS[library](dtype=dtype)
    method = SeTARFT(encoder, NAMES, picks=PICKS, part=part)
    for matrix in method.matrices:
        assert torch.equal(weights(method)[matrix.address], matrix.weight(encoder.model))
    images, prompts = pixels(encoder), [f"a photo of a {w}" for w in WORDS]
    with torch.no_grad():
        ours, theirs = (e.encode_image(images, local=True) for e in (method._student, encoder))
    assert torch.equal(ours.image, theirs.image) and torch.equal(ours.local, theirs.local)
    assert torch.equal(method._student.encode_text(prompts), encoder.encode_text(prompts))
    assert method.adapted(encoder).fingerprint == encoder.fingerprint


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("library", list(ENCODERS))
def test_then_it_is_what_is_kept_plus_the_update(library, dtype):
    """W' = drop(W) + B A, for kept parts made anew; merged weights are the attached ones."""
    encoder = ENCODERS[library](dtype=dtype)
    method = moved(SeTARFT(encoder, NAMES, picks=PICKS))
    merged = method.adapted(encoder)
    ratios = {f"{t}{'' if n is None else f'.{n}'}.{k}": r for t, k, n, r in PICKS}
    assert {m.address for m in method.matrices} == {a for a, r in ratios.items() if r}
    for matrix in list_matrices(encoder.model):
        was, found = matrix.weight(encoder.model), matrix.weight(merged.model)
        if not ratios.get(matrix.address):
            assert torch.equal(found, was)
            continue
        key = matrix.address.replace(".", "_")
        kept = LowRankBasis(was.double()).drop(ratios[matrix.address])
        want = kept + method.B[key].double() @ method.A[key].double()
        rtol = 1e-12 if dtype == torch.float64 else LOW_RANK_REST_RTOL
        assert float((found - want).norm().detach()) <= rtol * float(want.norm().detach())
        assert torch.equal(found, weights(method)[matrix.address])
        assert float((found - was).norm().detach()) > 0.1
    images = pixels(encoder)
    with torch.no_grad():
        ours, theirs = (e.encode_image(images, local=True) for e in (merged, method._student))
    torch.testing.assert_close(ours.image, theirs.image, rtol=0, atol=LORA_MERGED_ATOL)
    torch.testing.assert_close(ours.local, theirs.local, rtol=0, atol=LORA_MERGED_ATOL)
    assert list(merged.model.state_dict()) == list(encoder.model.state_dict())
    assert merged.name == f"{encoder.name} + setar-ft"


def test_gradients_are_those_of_the_plain_form(encoder):
    """Base and B A written out, put into the untouched model."""
    method = moved(SeTARFT(encoder, NAMES, picks=PICKS, loss="ce"))
    batch = Batch(pixels(encoder), LABELS)
    base = copy.deepcopy(encoder.model)
    with torch.no_grad():
        for matrix in method.matrices:
            a, b = method._start(matrix)
            matrix.weight(base).sub_(b @ a)

    class Plain:
        """As ``test_lora.plain_loss`` looks at a LoRA: updates of scale 1."""

        matrices, A, B = method.matrices, method.A, method.B

        @staticmethod
        def settings():
            return {"alpha": 1.0, "rank": 1}

    frozen = copy.copy(encoder)
    frozen.model = base
    ours, theirs = total_loss(method.terms(batch)[0]), plain_loss(Plain, frozen, batch, "ce")
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    mine, wanted = gradients(ours, method), gradients(theirs, method)
    assert len(mine) == 2 * len(method.matrices)
    for name, want in wanted.items():
        torch.testing.assert_close(mine[name], want, rtol=1e-7, atol=1e-9, msg=name)
        assert float(want.abs().max()) > 0, name


def test_factors_are_balanced_and_counted():
    """A A' = B' B = S1: as many numbers as published, r (in + out) of each matrix."""
    encoder = open_clip_encoder()
    method = SeTARFT(encoder, NAMES, picks=UP)
    for tower, kind, layer, ratio in UP:
        (matrix,) = find(encoder.model, towers=tower, kinds=kind, layers=[layer])
        r = count_of(ratio, 32)
        s = torch.linalg.svdvals(matrix.weight(encoder.model).detach())[-r:]
        a, b = (held[matrix.address.replace(".", "_")] for held in (method.A, method.B))
        assert (a.shape, b.shape) == ((r, 32), (128, r))
        torch.testing.assert_close(a @ a.T, s.diag(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(b.T @ b, s.diag(), rtol=1e-9, atol=1e-12)
    assert method.trainable == sum(count_of(r, 32) * (32 + 128) for *_, r in UP)


def test_directions_of_zero_stay_zero():
    encoder = open_clip_encoder(dtype=torch.float32)
    (matrix,) = find(encoder.model, towers="image", kinds="up", layers=[1])
    with torch.no_grad():  # 4 directions of nothing
        weight = matrix.weight(encoder.model)
        weight.copy_(LowRankBasis(weight.double()).drop(4))
        weight[:, 3] = weight[:, 2]  # an exact fifth
    method = SeTARFT(encoder, NAMES, picks=[["image", "up", 1, 8]], top_k=2)
    a, b = method.A["image_1_up"], method.B["image_1_up"]
    dead = (a == 0).all(dim=1)
    assert 1 <= int(dead.sum()) <= 5 and torch.equal(dead, (b == 0).all(dim=0))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    before = a.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        total_loss(method.terms(Batch(pixels(encoder), LABELS))[0]).backward()
        optimizer.step()
    assert bool(a.isfinite().all()) and bool(b.isfinite().all())
    assert torch.equal((a == 0).all(dim=1), dead) and torch.equal((b == 0).all(dim=0), dead)
    assert not torch.equal(a, before)


def test_weight_decay_moves_the_weights_towards_what_is_kept():
    """With B A shrunk to nothing, what is left is the model the search made."""
    encoder = open_clip_encoder()
    method = SeTARFT(encoder, NAMES, picks=PICKS)
    with torch.no_grad():
        for p in method.parameters():
            p.zero_()
    searched = Recipe.of(encoder, PICKS).apply(encoder)
    images = pixels(encoder)
    ours, theirs = (e.encode_image(images, local=True) for e in (method.adapted(encoder), searched))
    torch.testing.assert_close(ours.image, theirs.image, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.local, theirs.local, rtol=1e-9, atol=1e-9)


def test_the_loop_trains_saves_and_resumes(tmp_path):
    encoder = open_clip_encoder(dtype=torch.float32)
    data = Pixels(encoder, 16)
    recipe = replace(SeTARFT.recipe, epochs=4, batch_size=6, lr=0.05)

    def build() -> SeTARFT:
        return SeTARFT(encoder, NAMES, picks=UP, top_k=2)

    method = build()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    history = train(method, data, recipe=recipe, out=tmp_path / "whole")
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    for name, x in method.state_dict().items():  # A0 and B0 stay
        assert torch.equal(x, before[name]) == name.startswith(("A0_", "B0_")), name

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.epoch == 3:
            raise Stop

    again = build()
    with pytest.raises(Stop):
        train(again, data, recipe=recipe, out=tmp_path / "cut", progress=stop)
    again = build()
    train(again, data, recipe=recipe, out=tmp_path / "cut", resume=True)
    for name, x in method.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name


def test_saved_and_loaded_without_the_recipe(encoder, tmp_path):
    file = Recipe.of(encoder, PICKS).write(tmp_path / "recipe.json")
    method = moved(SeTARFT(encoder, NAMES, picks=file))
    path = save_method(tmp_path / "ft.safetensors", method)
    file.unlink()
    again = load_method(path, encoder)
    assert isinstance(again, SeTARFT)
    assert again.settings() == method.settings()
    assert again.settings()["picks"] == [p for p in PICKS if p[3]]
    assert again.adapted(encoder).fingerprint == method.adapted(encoder).fingerprint
    assert again.fingerprint() == method.fingerprint()
    # a machine that finds other vectors, of other signs say, has the saved ones after loading
    other = moved(SeTARFT(encoder, NAMES, picks=PICKS), seed=1)
    for name, x in other.named_buffers():
        x.mul_(-1 if name.startswith("A0") else -2)
    other.restore({k: v.clone() for k, v in method.state_dict().items()})
    assert other.adapted(encoder).fingerprint == method.adapted(encoder).fingerprint


def test_settings_come_from_the_search(tmp_path):
    encoder = open_clip_encoder()
    search = {
        "objective": {"metric": "loss", "weight": 0.35, "top_k": 3},
        "class_names": NAMES,
        "templates": ["a bad photo of a {}", "a {}"],
    }
    recipe = Recipe.of(encoder, UP, part="principal", search=search)
    path = recipe.write(tmp_path / "r.json")

    def chosen(names=NAMES, **settings):
        found = SeTARFT(encoder, names, **{"picks": path, **settings}).settings()
        return found["weight"], found["top_k"], found["part"]

    assert chosen() == (0.35, 3, "principal")
    assert chosen(weight=0.2, top_k=1, part="minor") == (0.2, 1, "minor")
    assert chosen(picks=recipe) == (0.35, 3, "principal")
    assert chosen([*NAMES, "bird"]) == (0.1, 2, "principal")  # another number of classes
    assert chosen(picks=UP) == (0.1, 1, "minor")  # round(.3 K)
    theirs = [["visual" if t == "image" else t, f"W_{k}", n, r] for t, k, n, r in UP]
    assert chosen(picks=theirs) == (0.1, 1, "minor")
    for picks, given, expected in (
        (path, None, search["templates"]), (path, "coop", "coop"), (theirs, None, "mcm")
    ):  # fmt: skip
        method = SeTARFT(encoder, NAMES, picks=picks, templates=given)
        assert method.settings()["templates"] == expected


def test_published_training():
    recipe = SeTARFT.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.momentum) == (5, 100, 0.01, 0.9)
    assert (recipe.weight_decay, recipe.warmup_epochs, recipe.per) == (5e-4, 0, "step")
    assert replace(LoRA.recipe, source="") == replace(recipe, source="")  # the baseline's
    deep = open_clip_encoder(image=tiny.vision(layers=13))
    for kind in (SeTARFT, LoRA):
        assert sizes_of(kind, open_clip_encoder()) == {"batch_size": 100}
        assert sizes_of(kind, deep) == {"batch_size": 20}


@pytest.mark.parametrize(
    "make", [lambda e: SeTARFT(e, NAMES, picks=UP), lambda e: LoRA(e, NAMES, rank=2)]
)
def test_an_empty_share_has_the_terms_of_the_others(make):
    """Processes add terms up by position: a share without images must have as many."""
    encoder = open_clip_encoder()
    method = make(encoder)
    full, _ = method.terms(Batch(pixels(encoder), LABELS))
    empty, predicted = method.terms(Batch(pixels(encoder)[:0], LABELS[:0]))
    assert [(t.name, t.weight) for t in empty] == [(t.name, t.weight) for t in full]
    total_loss(empty).backward()
    assert len(predicted) == 0 and any(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "picks: setar-ft starts from the recipe .* `fastood search setar`"),
        ({"picks": []}, ValueError, "picks: expected at least one"),
        ({"picks": [["image", "up", 0, 0.0]]}, ValueError, "some that drop something"),
        ({"picks": [["image", "up", 0, 1.5]]}, ValueError, "expected a share"),
        ({"picks": [["image", "up", 0, 33]]}, ValueError, r"min\(m, n\) = 32, got 33"),
        ({"picks": [["image", "up", 9, 0.1]]}, ModelError, "has no image.9.up"),
        ({"picks": "missing.json"}, DataError, "missing.json: expected a recipe, found no such"),
        ({"picks": UP, "part": "small"}, ValueError, "part: expected one of"),
        ({"picks": UP, "top_k": 4}, ValueError, "top_k: expected below the 4 classes"),
        ({"picks": UP, "loss": "mse"}, ValueError, 'loss: expected "locoop" or "ce"'),
        ({"picks": UP, "weight": "x"}, ValueError, "weight: expected a finite number"),
        ({"picks": UP, "chunk": 0}, ValueError, "chunk: expected"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        SeTARFT(open_clip_encoder(), NAMES, **settings)


def test_refused_before_there_is_a_model(tmp_path):
    with pytest.raises(ValueError, match="`fastood search setar` writes one"):
        check_given(SeTARFT, {})
    with pytest.raises(ValueError, match=r"setar-ft has no 'pick'; did you mean 'picks'\?"):
        check_given(SeTARFT, {"pick": "r.json"})
    bad = tmp_path / "bad.json"
    bad.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="expected a recipe of fastood"):
        check_given(SeTARFT, {"picks": str(bad)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_that_lost_them_already(dtype):
    encoder = open_clip_encoder(dtype=dtype)
    recipe = Recipe.of(encoder, UP)
    changed = recipe.apply(encoder)
    with (
        pytest.warns(RuntimeWarning, match="other weights"),
        pytest.raises(ModelError, match="is zero already; was the recipe applied"),
    ):
        SeTARFT(changed, NAMES, picks=recipe)


def test_other_models():
    resnet = open_clip_encoder(image=tiny.RESNET)
    with pytest.raises(ModelError, match="has no image"):
        SeTARFT(resnet, NAMES, picks=UP, loss="ce")
    method = SeTARFT(open_clip_encoder(), NAMES, picks=UP)
    with pytest.raises(ModelError, match="does not have the matrices"):
        method.adapted(open_clip_encoder(image=tiny.vision(width=64)))


def test_half_precision_towers_train_float32_masters():
    encoder = open_clip_encoder(dtype=torch.bfloat16)
    method = SeTARFT(encoder, NAMES, picks=UP, loss="ce")
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    total_loss(method.terms(Batch(pixels(encoder), LABELS))[0]).backward()
    assert all(bool(p.grad.isfinite().all()) for p in method.parameters())
    assert moved(method).adapted(encoder).dtype == torch.bfloat16


def test_the_command_line_trains_and_evaluates(tmp_path, capsys, monkeypatch):
    """A recipe whose name has a comma and a plus; what was trained then scores."""
    from fastood.models import load_model

    monkeypatch.setenv("FASTOOD_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "a, b+c.json"
    Recipe.of(load_model("fastood-tiny"), [["image", "up", 5, 0.25], ["text", "up", 0, 0]]).write(
        recipe
    )
    words = ["--model", "fastood-tiny", "-q"]
    given = ["train", f"setar-ft:picks={recipe},top_k=1", *words, "--shots", "1", "--epochs", "1"]
    out = tmp_path / "out"
    code = run([*given, "--id", str(photo_folder(CALIBRATION)), "--out", str(out)])
    assert code == 0, capsys.readouterr().err
    header = read_header(out / "adaptation.safetensors")
    assert header.method == "setar-ft" and not header.has_head
    assert header.settings["picks"] == [["image", "up", 5, 0.25]] and header.settings["top_k"] == 1
    assert "crop of 0.9 to 1" in str(header.training["data"])
    for adapt in ([recipe], [out / "adaptation.safetensors"]):
        code = run(
            [
                "eval", *words, "--id", str(photo_folder(ID)), "--ood", str(photo_folder(NEAR_OOD)),
                "--bootstrap", "0", "--score", "mcm", "--score", "gl_mcm", "--limit", "4",
                *[word for file in adapt for word in ("--adapt", str(file))],
                "--out", str(tmp_path / f"eval-{adapt[0].suffix[1:]}"),
            ]
        )  # fmt: skip
        assert code == 0, capsys.readouterr().err
    assert run(["train", "setar-ft", *words, "--id", str(photo_folder(ID))]) == 2
    assert "fastood search setar" in capsys.readouterr().err


def test_text_features_are_of_the_updated_tower():
    encoder = open_clip_encoder()
    method = moved(SeTARFT(encoder, NAMES, picks=PICKS))
    merged = method.adapted(encoder)
    want = F.normalize(merged.encode_text([f"a photo of a {w}" for w in WORDS]), dim=-1)
    torch.testing.assert_close(method.text().detach(), want, rtol=1e-9, atol=1e-9)
