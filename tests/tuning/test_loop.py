"""The training loop: what it computes, what it keeps, and that nothing but time is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import warnings

import pytest
import torch
import torch.nn.functional as F

from fastood.errors import DataError, TrainingError
from fastood.tuning.loop import CHECKPOINT, HISTORY, permutation, train
from fastood.tuning.method import Term
from fastood.tuning.recipes import Recipe
from fastood.tuning.schedule import learning_rate
from fastood.tuning.step import Stepper
from fastood.tuning.views import FeatureData
from tests.tolerances import TWO_PROCESSES_ATOL
from tests.tuning.launch import launch
from tests.tuning.toy import ToyHead, toy_features, toy_method

ADAMW = Recipe(3, 8, "adamw", 0.01, per="step", warmup_epochs=0, weight_decay=0.01, eps=1e-4)


def _data(**changes) -> FeatureData:
    return FeatureData(toy_features(**changes))


def _plain(recipe: Recipe, *, clip: float | None = None, drop_last: bool = False):
    """The same training written down directly: one weight, autograd, a torch optimiser."""
    features, method = toy_features(), toy_method()
    weight = method.weight.detach().clone().requires_grad_()
    z, y = F.normalize(features.image(), dim=-1), torch.as_tensor(features.labels)
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD([weight], recipe.lr, 0.9, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.AdamW(
            [weight], recipe.lr, weight_decay=recipe.weight_decay, eps=recipe.eps
        )
    losses = []
    for epoch in range(recipe.epochs):
        order = permutation(len(y), 1, epoch)
        parts = order.split(recipe.batch_size)
        if drop_last and len(parts[-1]) < recipe.batch_size:
            parts = parts[:-1]
        for step, rows in enumerate(parts):
            logits = z[rows] @ weight.T
            liked = logits.detach() > 0.1
            loss = F.cross_entropy(logits, y[rows])
            loss = loss + 0.1 * (logits.square() * liked).sum() / liked.sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_([weight], clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, epoch, step, len(parts))
            optimizer.step()
            losses.append((loss.item(), len(rows)))
    return weight.detach(), losses


@pytest.mark.parametrize("recipe", [ToyHead.recipe, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("options", [{}, {"clip": 0.05}, {"drop_last": True}], ids=str)
def test_it_computes_what_the_plain_loop_computes(recipe, options):
    method = toy_method()
    history = train(method, _data(), recipe=recipe, **options)
    weight, losses = _plain(recipe, **options)
    torch.testing.assert_close(method.weight.detach(), weight, rtol=1e-5, atol=1e-6)
    per = len(losses) // recipe.epochs
    for epoch, row in enumerate(history.epochs):
        part = losses[epoch * per : (epoch + 1) * per]
        images = sum(n for _, n in part)
        assert row["loss"] == pytest.approx(sum(x * n for x, n in part) / images, rel=1e-5)
        assert row["images"] == images == (40 if options.get("drop_last") else 44)
        assert row["steps"] == per
    assert history.finished
    assert history.selected == recipe.epochs
    assert method.seen == len(losses)


def test_it_learns_and_says_how_well(tmp_path):
    seen, lines = [], []
    history = train(
        toy_method(), _data(), recipe=dataclasses.replace(ToyHead.recipe, epochs=12, lr=0.5),
        validation=_data(seed=7, name="val"), out=tmp_path, progress=seen.append, log=lines.append,
    )  # fmt: skip
    first, last = history.epochs[0], history.epochs[-1]
    assert last["loss"] < first["loss"]
    assert last["accuracy"] > 0.9 > first["accuracy"]
    assert last["validation"] > 0.9
    assert set(last["terms"]) == {"ce", "liked", "note"}
    assert last["loss"] == pytest.approx(last["terms"]["ce"] + 0.1 * last["terms"]["liked"])
    assert len(seen) == 12 * 6
    assert (seen[-1].epoch, seen[-1].step, seen[-1].eta_seconds) == (12, 6, 0)
    assert seen[0].eta_seconds > 0
    assert "epoch 12 of 12 selected (last)" in lines[-1]
    rows = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    assert rows[0]["run"]["settings"]["method"] == "toy"
    assert rows[1:] == history.epochs


def test_order_is_a_permutation_of_seed_and_epoch():
    assert permutation(6, 1, 0).tolist() == PINNED  # other numbers change everybody's results
    assert sorted(permutation(1000, 1, 3).tolist()) == list(range(1000))
    assert not torch.equal(permutation(50, 1, 0), permutation(50, 1, 1))
    assert not torch.equal(permutation(50, 1, 0), permutation(50, 2, 0))


PINNED = [1, 5, 3, 0, 4, 2]


def test_the_best_epoch_on_validation_data_is_kept():
    """The validation labels reward standing still: the first epoch wins and is what remains."""
    after_one = toy_method()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(after_one, _data(), recipe=dataclasses.replace(ToyHead.recipe, epochs=1))
        features = toy_features(seed=3)
        stuck = after_one.head().similarities(features.image(), None)[0]
        validation = FeatureData(
            dataclasses.replace(features, labels=stuck.argmax(dim=1).numpy()), _data().class_names
        )
        method, last = toy_method(), toy_method()
        recipe = dataclasses.replace(ToyHead.recipe, lr=1.0)
        history = train(method, _data(), recipe=recipe, validation=validation, select="validation")
        train(last, _data(), recipe=recipe)
    assert history.epochs[0]["validation"] == 1.0 > history.epochs[-1]["validation"]
    assert history.selected == 1
    assert torch.equal(method.weight, after_one.weight)
    assert not torch.equal(method.weight, last.weight)


def test_of_equally_good_epochs_the_first_is_kept():
    recipe = dataclasses.replace(ToyHead.recipe, lr=1e-9, warmup_lr=1e-9)
    options = {"recipe": recipe, "validation": _data(seed=5, name="val"), "select": "validation"}
    with pytest.warns(RuntimeWarning, match="no learning progress"):
        history = train(toy_method(), FeatureData(_still()), **options)
    assert len({row["validation"] for row in history.epochs}) == 1
    assert history.selected == 1


def _still():
    """Eight images, so that an epoch is one batch and its loss does not depend on the order."""
    return toy_features(8)


# --- interrupted and resumed


class Halt:
    """A progress callback that interrupts behind a step, by an exception or by Ctrl-C."""

    def __init__(self, epoch: int, step: int, *, ctrl_c: bool) -> None:
        self.at, self.ctrl_c, self.steps = (epoch, step), ctrl_c, 0

    def __call__(self, progress) -> None:
        self.steps += 1
        if (progress.epoch, progress.step) == self.at:
            if not self.ctrl_c:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)


def _numbers(history) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history.epochs]


@pytest.mark.parametrize("recipe", [ToyHead.recipe, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("place", [(1, 1), (1, 6), (2, 3), (3, 6)], ids=str)
@pytest.mark.parametrize("ctrl_c", [False, True], ids=["raised", "ctrl-c"])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, recipe, place, ctrl_c):
    options = {"recipe": recipe, "validation": _data(seed=5, name="val"), "select": "validation"}
    whole = toy_method()
    want = train(whole, _data(), **options)
    method, halt = toy_method(), Halt(*place, ctrl_c=ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        train(method, _data(), **options, out=tmp_path, progress=halt)
    assert halt.steps <= (place[0] - 1) * 6 + place[1] + ctrl_c
    again = toy_method(seed=0)
    with torch.no_grad():
        again.weight.fill_(123)  # what is not restored shows
    got = train(again, _data(), **options, out=tmp_path, resume=True)
    assert torch.equal(again.weight, whole.weight)
    assert torch.equal(again.seen, whole.seen)
    assert _numbers(got) == _numbers(want)
    assert got.selected == want.selected
    assert got.finished
    third = toy_method()
    assert _numbers(train(third, _data(), **options, out=tmp_path, resume=True)) == _numbers(want)
    assert torch.equal(third.weight, whole.weight)


def test_ctrl_c_behind_the_last_step_ends_the_program_with_a_finished_run(tmp_path):
    method, whole = toy_method(), toy_method()
    with pytest.raises(KeyboardInterrupt):
        train(method, _data(), out=tmp_path, progress=Halt(4, 6, ctrl_c=True))
    train(whole, _data())
    assert torch.equal(method.weight, whole.weight)
    assert train(toy_method(), _data(), out=tmp_path, resume=True).finished
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_between_steps_loses_nothing(tmp_path):
    class Breaks(FeatureData):
        fuse = 9

        def batch(self, index, epoch):
            self.fuse -= 1
            if self.fuse == 0:
                raise DataError("a.png: truncated")
            return super().batch(index, epoch)

    with pytest.raises(DataError, match="truncated"):
        train(toy_method(), Breaks(toy_features()), out=tmp_path)
    method, whole = toy_method(), toy_method()
    train(method, _data(), out=tmp_path, resume=True)
    train(whole, _data())
    assert torch.equal(method.weight, whole.weight)


def test_an_update_that_was_cut_short_is_not_saved(tmp_path, monkeypatch):
    method = toy_method()
    with pytest.raises(KeyboardInterrupt):
        train(method, _data(), out=tmp_path, progress=Halt(2, 2, ctrl_c=False))
    before = (tmp_path / CHECKPOINT).read_bytes()
    steps = []

    def torn(self, closure=None):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return original(self, closure)

    original = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", torn)
    with pytest.raises(KeyboardInterrupt):
        train(toy_method(), _data(), out=tmp_path, resume=True)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_changed_settings_are_refused_with_the_difference(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(toy_method(), _data(), out=tmp_path, progress=Halt(2, 2, ctrl_c=False))
    other = dataclasses.replace(ToyHead.recipe, lr=0.1)
    for options, words in (
        ({"recipe": other}, r"recipe.lr: saved 0.05, now 0.1"),
        ({"seed": 2}, "seed: saved 1, now 2"),
        ({"clip": 1.0}, "clip: saved None, now 1.0"),
        ({"data": _data(seed=8)}, "data: saved"),
        ({"method": toy_method(weight=0.2)}, "settings.weight: saved 0.1, now 0.2"),
        ({"validation": _data(seed=8)}, "validation: saved None"),
    ):
        call = {"method": toy_method(), "data": _data(), **options}
        with pytest.raises(DataError, match=words):
            train(**call, out=tmp_path, resume=True)
    with pytest.raises(DataError, match="already holds a training run"):
        train(toy_method(), _data(), out=tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(b"nonsense")
    with pytest.raises(DataError, match="damaged"):
        train(toy_method(), _data(), out=tmp_path, resume=True)


def test_nothing_to_resume_starts_anew_and_says_so(tmp_path):
    method, whole = toy_method(), toy_method()
    with pytest.warns(RuntimeWarning, match="no saved state"):
        train(method, _data(), out=tmp_path / "new", resume=True)
    train(whole, _data())
    assert torch.equal(method.weight, whole.weight)


# --- what can go wrong


class Poisoned(ToyHead):
    """Turns bad at one step: in the loss, or only in the gradient."""

    bad_step, kind = 8, "loss"
    calls = 0

    def terms(self, batch):
        terms, predicted = super().terms(batch)
        self.calls += 1
        if self.kind == "always" or self.calls == self.bad_step:
            bad = torch.tensor(float("nan")) if self.kind == "loss" else self.weight.sum() * 0
            if self.kind != "loss":
                bad = (self.weight.flatten()[0] - self.weight.detach().flatten()[0]).sqrt()
            terms.append(Term("odd", terms[0].numerator * 0 + bad, 1.0))
        return terms, predicted


@pytest.mark.parametrize(
    ("kind", "words"),
    [("loss", r"loss is not finite \(odd = nan"), ("gradient", r"gradient .*\(of weight\)")],
)
def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(tmp_path, kind, words):
    def method():
        made = Poisoned(toy_method().encoder, toy_method().class_names)
        made.kind = kind
        return made

    broken = method()
    with pytest.raises(TrainingError, match=rf"epoch 2, step 2: the {words}"):
        train(broken, _data(), out=tmp_path)
    assert torch.isfinite(broken.weight).all()
    resumed = method()
    resumed.bad_step, whole = -1, toy_method()
    resumed_history = train(resumed, _data(), out=tmp_path, resume=True)
    train(whole, _data())
    assert torch.equal(resumed.weight, whole.weight)
    assert resumed_history.finished


def test_zero_gradients_and_no_progress_are_warned_about():
    class Deaf(ToyHead):
        def terms(self, batch):
            terms, predicted = super().terms(batch)
            return [Term("ce", terms[0].numerator * 0 + 1, 1.0)], predicted

    deaf = Deaf(toy_method().encoder, toy_method().class_names)
    recipe = dataclasses.replace(ToyHead.recipe, weight_decay=0.0)
    with pytest.warns(RuntimeWarning) as caught:
        history = train(deaf, _data(), recipe=recipe)
    texts = [str(w.message) for w in caught]
    assert "exactly zero" in texts[0]
    assert "no learning progress: the loss was 1 in the first epoch and 1 in the last" in texts[1]
    assert history.notes == texts


def test_validation_images_among_the_training_images_are_warned_about():
    features = toy_features()
    mixed = dataclasses.replace(toy_features(seed=4, name="val"), chunks=features.chunks)
    with pytest.warns(RuntimeWarning, match=r"44 of 44 validation images .*val/0.png"):
        train(toy_method(), FeatureData(features), validation=FeatureData(mixed))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(toy_method(), FeatureData(features), validation=_data(seed=4, name="val"))


def test_bad_calls_are_refused_before_any_work(tmp_path):
    method, data = toy_method(), _data()
    with pytest.raises(ValueError, match="the test set never selects"):
        train(method, data, select="test")
    with pytest.raises(ValueError, match="needs validation images"):
        train(method, data, select="validation")
    with pytest.raises(ValueError, match="clip"):
        train(method, data, clip=0)
    with pytest.raises(ValueError, match="need a folder"):
        train(method, data, resume=True)
    names = ("class 0", "class 1", "another", "class 3")
    with pytest.raises(ValueError, match=r"\[2\]: method 'class 2', now 'another'"):
        train(method, FeatureData(toy_features(), names))
    frozen = toy_method()
    frozen.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train(frozen, data)
    assert train(frozen, data, recipe=dataclasses.replace(ToyHead.recipe, epochs=0)).epochs == []


def test_mixed_precision_on_a_cpu_stays_close_and_keeps_float32():
    full, mixed = toy_method(), toy_method()
    train(full, _data())
    train(mixed, _data(), amp=True)
    assert mixed.weight.dtype == torch.float32
    assert not torch.equal(full.weight, mixed.weight)
    assert torch.allclose(full.weight, mixed.weight, atol=0.02)


@pytest.fixture
def scaled(monkeypatch):
    """Loss scaling as on a GPU, on the CPU."""

    def use(scale: float):
        def init(self, method, recipe, *, amp, clip):
            original(self, method, recipe, amp=amp, clip=clip)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=7)

        monkeypatch.setattr(Stepper, "__init__", init)

    original = Stepper.__init__
    return use


def test_loss_scaling_by_powers_of_two_changes_no_bit(scaled):
    plain, method = toy_method(), toy_method()
    train(plain, _data(), clip=0.05)
    scaled(2.0**10)
    train(method, _data(), clip=0.05)
    assert torch.equal(method.weight, plain.weight)


def test_a_scale_that_overflows_is_halved_until_it_fits_and_kept_by_resuming(scaled, tmp_path):
    scaled(2.0**127)
    whole, method, again = toy_method(), toy_method(), toy_method()
    history = train(whole, _data())
    assert history.finished
    assert torch.isfinite(whole.weight).all()
    assert not torch.equal(whole.weight, toy_method().weight)
    with pytest.raises(KeyboardInterrupt):
        train(method, _data(), out=tmp_path, progress=Halt(2, 3, ctrl_c=False))
    train(again, _data(), out=tmp_path, resume=True)
    assert torch.equal(again.weight, whole.weight)


def test_a_gradient_no_scale_can_save_stops(scaled, monkeypatch):
    monkeypatch.setattr("fastood.tuning.step._MOST_SKIPPED", 3)
    scaled(1024.0)
    broken = Poisoned(toy_method().encoder, toy_method().class_names)
    broken.kind = "always"
    with pytest.raises(TrainingError, match=r"epoch 1, step 4: the gradient is not finite"):
        train(broken, _data())


def test_curves_without_tensorboard_say_so(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match="pip install tensorboard"):
        train(toy_method(), _data(), out=tmp_path, tensorboard=True)
    assert (tmp_path / HISTORY).is_file()


def test_curves_with_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = train(toy_method(), _data(), out=tmp_path, tensorboard=True)
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    got = [point.value for point in curves.Scalars("epoch/loss")]
    assert got == pytest.approx([row["loss"] for row in history.epochs])


# --- several processes

SCRIPT = """
import sys, dataclasses, torch
from pathlib import Path
from fastood.tuning.loop import train
from fastood.tuning.parallel import World
from fastood.tuning.views import FeatureData
from tests.tuning.toy import ToyHead, toy_features, toy_method
from tests.tuning.test_loop import ADAMW, Halt, _data

folder = Path(sys.argv[1])
world = World.from_environment()
found = {}
for name, recipe in (("sgd", dataclasses.replace(ToyHead.recipe, batch_size=43)), ("adamw", ADAMW)):
    method = toy_method()
    method.world = world
    options = dict(recipe=recipe, clip=0.5, validation=_data(seed=5, name="val"))
    history = train(method, _data(), **options)
    # the same, interrupted in one process only, and resumed
    again = toy_method()
    again.world = world
    halt = Halt(2, 1, ctrl_c=True) if world.rank == 0 else None
    try:
        train(again, _data(), **options, out=folder / name, progress=halt)
        raise SystemExit("not interrupted")
    except KeyboardInterrupt:
        pass
    train(again, _data(), **options, out=folder / name, resume=True)
    assert torch.equal(again.weight, method.weight)
    left = toy_method()
    left.world = world
    try:
        train(left, _data(), **options, out=folder / f"{name} left", progress=halt)
    except KeyboardInterrupt:
        pass
    found[name] = (method.weight.detach(), method.seen, [r["loss"] for r in history.epochs],
                   [r["validation"] for r in history.epochs])
torch.save(found, folder / f"{world.rank}.pt")
"""


def test_two_processes_compute_what_one_does_and_resume_alike(tmp_path):
    """43 images and then one: the last batch leaves a process without any."""
    launch(SCRIPT, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    recipes = {"sgd": dataclasses.replace(ToyHead.recipe, batch_size=43), "adamw": ADAMW}
    for name, recipe in recipes.items():
        alone = toy_method()
        validation = _data(seed=5, name="val")
        history = train(alone, _data(), recipe=recipe, clip=0.5, validation=validation)
        assert torch.equal(ranks[0][name][0], ranks[1][name][0])
        torch.testing.assert_close(
            ranks[0][name][0], alone.weight.detach(), rtol=0, atol=TWO_PROCESSES_ATOL
        )
        assert ranks[0][name][1] == alone.seen
        losses = [row["loss"] for row in history.epochs]
        assert ranks[0][name][2] == pytest.approx(losses, rel=1e-6)
        assert ranks[0][name][3] == [row["validation"] for row in history.epochs]
        # what two processes began, one may finish, but says so
        resumed = toy_method()
        with pytest.warns(RuntimeWarning, match="processes: saved 2, now 1"):
            train(
                resumed, _data(), recipe=recipe, clip=0.5, validation=validation,
                out=tmp_path / f"{name} left", resume=True,
            )  # fmt: skip
        torch.testing.assert_close(
            resumed.weight.detach(), alone.weight.detach(), rtol=0, atol=TWO_PROCESSES_ATOL
        )
