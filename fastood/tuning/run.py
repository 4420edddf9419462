"""One training run: its steps, its epochs, and everything a checkpoint has to hold."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastood._version import installed
from fastood.data.paths import path_text
from fastood.differences import differences
from fastood.errors import DataError, TrainingError
from fastood.tuning import checkpoint
from fastood.tuning.history import History, Progress
from fastood.tuning.log import Curves
from fastood.tuning.method import Method
from fastood.tuning.recipes import Recipe
from fastood.tuning.schedule import learning_rate
from fastood.tuning.step import Outcome, Stepper
from fastood.tuning.validation import accuracy
from fastood.tuning.views import TrainingData, overlap

__all__ = ["CHECKPOINT", "HISTORY", "At", "Run", "permutation"]

CHECKPOINT, HISTORY = "training.safetensors", "history.jsonl"

_AHEAD = 2
"""Batches asked for before they are needed."""


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """(n,) the order of the images in an epoch: by raw bits of PCG64, the same on every machine."""
    key = hashlib.blake2b(f"fastood order {seed} {epoch}".encode(), digest_size=16).digest()
    bits = np.random.PCG64(int.from_bytes(key, "little")).random_raw(n)
    return torch.from_numpy(np.argsort(bits, kind="stable"))


@dataclass
class At:
    """Where training is, with the sums of the epoch under way; what a checkpoint holds."""

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    whole: bool = True
    """False while parameters and counters do not belong together."""


class Run:
    def __init__(
        self,
        method: Method,
        data: TrainingData,
        recipe: Recipe,
        seed: int,
        validation: TrainingData | None,
        select: str,
        amp: bool,
        clip: float | None,
        drop_last: bool,
    ) -> None:
        self.method, self.data, self.recipe, self.seed = method, data, recipe, seed
        self.validation, self.select = validation, select
        self.amp, self.clip, self.drop_last = amp, clip, drop_last
        self.rank = method.world.rank
        self.out: Path | None = None
        self.progress: Callable[[Progress], None] | None = None
        self.log: Callable[[str], None] | None = None
        self.curves: Curves | None = None
        self.stop = False
        self.at = At()
        self.best: dict[str, Tensor] = {}
        n, size = len(data.labels), recipe.batch_size
        full = drop_last and n >= size
        self.steps = n // size if full else math.ceil(n / size)
        self.history = History(select=select, settings=self._settings())
        self.history.environment = {
            "processes": method.world.size,
            "torch": torch.__version__,
            "fastood": installed("fastood"),
        }
        self.history.data = {"training": data.describe()}
        if validation is not None:
            self.history.data["validation"] = validation.describe()
        if "note" in self.history.data["training"]:
            self.history.note(self.history.data["training"]["note"])

    def _settings(self) -> dict[str, Any]:
        recipe = self.recipe.as_dict()
        recipe.pop("source", None)
        return {
            "method": self.method.name,
            "settings": self.method.settings(),
            "class_names": list(self.method.class_names),
            "encoder": self.method.encoder.fingerprint,
            "recipe": recipe,
            "seed": self.seed,
            "data": self.data.digest,
            "validation": None if self.validation is None else self.validation.digest,
            "select": self.select,
            "amp": self.amp,
            "clip": self.clip,
            "drop_last": self.drop_last,
        }

    def begin(self, resume: bool) -> None:
        """Everything before the first step."""
        world = self.method.world
        found = None
        if self.out is not None:
            file = self.out / CHECKPOINT
            seen = int(world.sum(torch.tensor(float(file.is_file()))))
            if 0 < seen < world.size:
                raise DataError(
                    f"{path_text(self.out)}: only {seen} of {world.size} processes see the saved "
                    "state; the folder must be the same for all"
                )
            if seen and not resume:
                raise DataError(
                    f"{path_text(self.out)}: already holds a training run; pass resume=True to go "
                    "on with it, or another folder"
                )
            if seen:
                found = checkpoint.read_checkpoint(file)
                self._refuse_changes(found)
            elif resume:
                self.note(f"{path_text(self.out)}: no saved state to resume; starting anew")
        self.method.prepare(self.data)
        self.stepper = Stepper(self.method, self.recipe, amp=self.amp, clip=self.clip)
        self.history.environment["device"] = str(self.stepper.device)
        if found is not None:
            self._restore(found)
        else:
            self.warn_overlap()
        world.barrier()  # nobody writes before everybody has read

    def note(self, text: str) -> None:
        """Warn, and keep it with the numbers."""
        self.history.note(text)
        if self.rank == 0:
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def say(self, text: str) -> None:
        if self.log is not None and self.rank == 0:
            self.log(text)

    def go(self) -> None:
        self.started, self.done_here = time.monotonic(), 0
        if self.history.finished:
            self.say("this run is finished; nothing to do")
            return
        epochs = self.recipe.epochs
        while self.at.epoch < epochs:
            self._epoch()
        self._finish()

    def _epoch(self) -> None:
        at, began = self.at, time.monotonic()
        spent = at.sums.get("seconds", 0.0)
        order = permutation(len(self.data.labels), self.seed, at.epoch)
        self._ahead(order, at.step, _AHEAD)
        while at.step < self.steps:
            index, ghost = self._own(order, at.step)
            batch = self.data.batch(index, at.epoch)
            self._ahead(order, at.step + _AHEAD, 1)
            lr = learning_rate(self.recipe, at.epoch, at.step, self.steps)
            at.whole = False
            try:
                outcome = self.stepper.step(batch, lr, stop=self.stop, ghost=ghost)
            except TrainingError as error:
                at.whole = True
                place = f"epoch {at.epoch + 1}, step {at.step + 1}"
                hint = "a lower learning rate, or clip=1.0, may help"
                kept = "" if self.out is None else f"; the state before it is in {self.out}"
                raise TrainingError(f"{place}: {error}{kept}; {hint}") from error
            except BaseException:
                # Nothing was changed unless the update itself was cut short.
                at.whole = not self.stepper.updating
                raise
            self._count(outcome, lr)
            at.sums["seconds"] = spent + time.monotonic() - began
            at.whole = True
            self._look_at_first(outcome)
            self._report(outcome)
            if outcome.stop:
                raise KeyboardInterrupt
        self._close_epoch(self._accuracy())

    def _own(self, order: Tensor, step: int) -> tuple[Tensor, bool]:
        """This process's share of a batch, (b,) indices; or an image that is not to count.

        A process without a share still has to take part in the others' sums, and only a method
        that sees an image makes the same ones as theirs.
        """
        size = self.recipe.batch_size
        whole = order[step * size : (step + 1) * size]
        own = whole[self.method.world.part(len(whole))]
        return (own, False) if len(own) else (whole[:1], True)

    def _ahead(self, order: Tensor, first: int, count: int) -> None:
        for step in range(first, min(first + count, self.steps)):
            self.data.prefetch(self._own(order, step)[0], self.at.epoch)

    def _count(self, outcome: Outcome, lr: float) -> None:
        sums = self.at.sums

        def add(name: str, value: float) -> None:
            sums[name] = sums.get(name, 0.0) + value

        add("loss", outcome.loss * outcome.images)
        for name, value in outcome.terms.items():
            add(f"term {name}", value * outcome.images)
        add("correct", outcome.correct)
        add("images", outcome.images)
        sums["lr"] = lr
        self.at.step += 1
        self.done_here += 1

    def _look_at_first(self, outcome: Outcome) -> None:
        if self.at.epoch == 0 and self.at.step == 1 and outcome.gradient == 0:
            self.note(
                "every gradient of the first step is exactly zero: nothing is being learned; does "
                "the loss depend on what is trained, and is each class's text different?"
            )

    def _report(self, outcome: Outcome) -> None:
        at, sums = self.at, self.at.sums
        if self.rank != 0:
            return
        if self.curves is not None:
            step = at.epoch * self.steps + at.step
            self.curves.add(step, {"step/loss": outcome.loss, "step/lr": sums["lr"]})
        if self.progress is None:
            return
        left = (self.recipe.epochs - at.epoch) * self.steps - at.step
        eta = (time.monotonic() - self.started) / self.done_here * left
        loss, accuracy = sums["loss"] / sums["images"], sums["correct"] / sums["images"]
        self.progress(
            Progress(at.epoch + 1, self.recipe.epochs, at.step, self.steps, loss, accuracy, eta)
        )

    def _accuracy(self) -> float | None:
        if self.validation is None:
            return None
        return accuracy(self.method, self.validation, lambda: self.stop)

    def _close_epoch(self, accuracy: float | None) -> None:
        at, sums = self.at, self.at.sums
        if not self.stepper.finite():
            raise TrainingError(
                f"epoch {at.epoch + 1}: parameters are not finite after the last step; the state "
                "saved before is kept; a lower learning rate may help"
            )
        images = sums["images"]
        terms = {
            k.removeprefix("term "): v / images for k, v in sums.items() if k.startswith("term ")
        }
        row: dict[str, Any] = {
            "epoch": at.epoch + 1,
            "loss": sums["loss"] / images,
            "terms": {k: v if math.isfinite(v) else None for k, v in terms.items()},
            "accuracy": sums["correct"] / images,
            "lr": sums["lr"],
            "images": int(images),
            "steps": self.steps,
            "seconds": sums["seconds"],
            "validation": accuracy,
        }
        self.history.epochs.append(row)
        if self.select == "validation" and accuracy is not None:
            if at.best is None or accuracy > at.best:
                at.best = accuracy
                state = checkpoint.module_state(self.method)
                self.best = {k: v.detach().clone() for k, v in state.items()}
                self.history.selected = at.epoch + 1
        else:
            self.history.selected = at.epoch + 1
        at.epoch, at.step, at.sums = at.epoch + 1, 0, {}
        if self.curves is not None:
            flat = {"loss": row["loss"], "accuracy": row["accuracy"], "validation": accuracy}
            flat |= {f"terms/{k}": v for k, v in row["terms"].items()}
            self.curves.add(at.epoch, {f"epoch/{k}": v for k, v in flat.items()})
        if at.epoch < self.recipe.epochs:
            self.save()

    def _finish(self) -> None:
        epochs = self.history.epochs
        if len(epochs) > 1 and not epochs[-1]["loss"] < epochs[0]["loss"]:
            self.note(
                f"no learning progress: the loss was {epochs[0]['loss']:.6g} in the first epoch "
                f"and {epochs[-1]['loss']:.6g} in the last"
            )
        if self.select == "validation":
            checkpoint.load_module_state(self.method, self.best)
        self.history.finished = True
        self.save()
        chosen = epochs[(self.history.selected or len(epochs)) - 1]
        on = "" if chosen["validation"] is None else f", validation {chosen['validation']:.4f}"
        self.say(
            f"epoch {chosen['epoch']} of {len(epochs)} selected ({self.select}): loss "
            f"{chosen['loss']:.4f}, accuracy {chosen['accuracy']:.4f}{on}"
        )

    def save(self) -> None:
        """Write the state (first process only)."""
        if self.out is None or self.rank != 0:
            return
        tensors = {f"method/{k}": v for k, v in checkpoint.module_state(self.method).items()}
        tensors |= {f"best/{k}": v for k, v in self.best.items()}
        optimizer = checkpoint.optimizer_state(self.stepper.optimizer, self.stepper.names)
        tensors |= {f"optimizer/{k}": v for k, v in optimizer.items()}
        scaler = self.stepper.scaler
        state = {
            "epoch": self.at.epoch,
            "step": self.at.step,
            "sums": self.at.sums,
            "best": self.at.best,
            "scaler": None if scaler is None else scaler.state_dict(),
            "history": self.history.as_dict(),
        }
        checkpoint.write_checkpoint(self.out / CHECKPOINT, tensors, state)
        self.history.write(self.out / HISTORY)

    def rescue(self) -> None:
        """Save after an interrupt or an error, if what there is can be trusted."""
        if not self.at.whole or self.history.finished or not self.stepper.finite():
            return
        try:
            self.save()
        except Exception as error:
            warnings.warn(f"the state could not be saved: {error}", RuntimeWarning, stacklevel=2)
            return
        if self.out is not None:
            self.say(f"saved in {self.out}; resume to go on")

    def _refuse_changes(self, found: checkpoint.Checkpoint) -> None:
        saved = History.of(found.state["history"])
        changed = differences(saved.settings, self.history.settings)
        if changed:
            raise DataError(
                f"{path_text(self.out or '')}: the saved run has other settings and cannot be "
                f"resumed with these: {'; '.join(changed)}; choose another folder, or start again "
                "(fastood train --overwrite)"
            )

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {
                k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)
            }

        state = found.state
        saved = History.of(state["history"])
        changed = differences(saved.environment, self.history.environment)
        saved.environment = self.history.environment
        self.history = saved
        if changed:
            self.note(
                f"resumed in another environment ({'; '.join(changed)}): results agree to "
                "rounding, not bit for bit"
            )
        checkpoint.load_module_state(self.method, part("method/"))
        checkpoint.load_optimizer_state(
            self.stepper.optimizer, self.stepper.names, part("optimizer/")
        )
        self.best = {k: v.to(self.stepper.device) for k, v in part("best/").items()}
        if self.stepper.scaler is not None and state["scaler"]:
            self.stepper.scaler.load_state_dict(state["scaler"])
        self.at = At(state["epoch"], state["step"], dict(state["sums"]), state["best"])
        self.say(f"resumed at epoch {self.at.epoch + 1}, step {self.at.step + 1}")

    def warn_overlap(self) -> None:
        """Note validation images that are training images too."""
        validation = self.validation
        if validation is None:
            return
        shared = overlap(self.data, validation) if self.rank == 0 else []
        if shared:
            more = "" if len(shared) <= 5 else f" and {len(shared) - 5} more"
            self.note(
                f"{len(shared)} of {len(validation.labels)} validation images are training images "
                f"too ({', '.join(shared[:5])}{more}): their accuracy says little"
            )
