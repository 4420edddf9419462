"""One optimisation step of all processes together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastood.errors import TrainingError
from fastood.tuning.method import Batch, Method, Term, total_loss
from fastood.tuning.recipes import Recipe

__all__ = ["Outcome", "Stepper"]

_MOST_SKIPPED = 50
"""Loss scaling halves the scale with every skipped step: 2^16 is below 1e-10 by then."""


@dataclass(frozen=True)
class Outcome:
    """A step, over the images of all processes.

    Attributes:
        loss: what was minimised.
        terms: numerator / count of every term, unweighted.
        correct, images: predictions before the step.
        stop: some process was asked to stop.
        gradient: norm of the gradient, before clipping; None if loss scaling skipped the step.
    """

    loss: float
    terms: Mapping[str, float]
    correct: int
    images: int
    stop: bool
    gradient: float | None


class Stepper:
    """Forward, backward, sums over processes, checks, update.

    A step whose loss or gradient is not finite changes nothing and raises.

    Args:
        method: its parameters that require a gradient are trained.
        recipe: optimiser and its numbers.
        amp: forward pass in mixed precision: float16 with loss scaling on a GPU, bfloat16 on a
            CPU. Parameters and their update stay float32.
        clip: largest norm of the gradient; None: any.
    """

    def __init__(self, method: Method, recipe: Recipe, *, amp: bool, clip: float | None) -> None:
        named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(
                f"method: {method.name} has nothing to train (no parameter requires a gradient)"
            )
        self.method, self.clip, self.amp = method, clip, amp
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.device = self.parameters[0].device
        self.optimizer = _optimizer(recipe, self.parameters)
        scaled = amp and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler("cuda") if scaled else None
        self.skipped = 0
        self.updating = False

    def step(self, batch: Batch, lr: float, *, stop: bool = False, ghost: bool = False) -> Outcome:
        """Train on this process's share of a batch.

        Args:
            stop: tell all processes that one was asked to stop.
            ghost: the batch stands in for an empty share: it is computed, so that this process
                takes part in whatever the others do together, and counts nothing.

        Raises:
            TrainingError: loss or gradient not finite; nothing was changed.
        """
        world = self.method.world
        batch = Batch(*(None if x is None else x.to(self.device) for x in batch))  # type: ignore[arg-type]
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            terms, predicted = self.method.terms(batch)
            labels = batch.labels
            if ghost:
                terms = [t._replace(numerator=t.numerator * 0, count=t.count * 0) for t in terms]
                predicted, labels = predicted[:0], labels[:0]
        sums = world.sum(self._sums(terms, predicted, labels, stop))
        counts = [sums[len(terms) + i] for i in range(len(terms))]
        loss = total_loss(terms, counts)
        if not loss.requires_grad:
            raise ValueError(f"method: the loss of {self.method.name} depends on no parameter")
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self._sum_gradients()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = _norm([p.grad for p in self.parameters if p.grad is not None], sums)
        # The one place where a GPU is waited for.
        *values, gradient = torch.cat([sums, norm[None]]).tolist()
        outcome = _outcome(terms, values, gradient)
        self._refuse(outcome)
        self._update(lr, gradient)
        return outcome if math.isfinite(gradient) else _skipped(outcome)

    def _autocast(self) -> Any:
        if not self.amp:
            return contextlib.nullcontext()
        kind = self.device.type
        return torch.autocast(kind, torch.float16 if kind == "cuda" else torch.bfloat16)

    def _sums(self, terms: Sequence[Term], predicted: Tensor, labels: Tensor, stop: bool) -> Tensor:
        """Numerators, counts, right predictions, images, stop; float64."""
        if predicted.ndim == 2:
            predicted = predicted.argmax(dim=1)
        right = (predicted == labels).sum()
        numbers = [*(t.numerator for t in terms), *(t.count for t in terms), right]
        numbers += [float(len(labels)), float(stop)]
        # One copy to the device for all that are known here.
        known = [0.0 if isinstance(x, Tensor) else float(x) for x in numbers]
        sums = torch.tensor(known, dtype=torch.float64, device=self.device)
        for i, x in enumerate(numbers):
            if isinstance(x, Tensor):
                sums[i] = x.detach()
        return sums

    def _sum_gradients(self) -> None:
        """Add up the processes' gradients; one that a process lacks counts as zeros there."""
        world = self.method.world
        if world.size == 1:
            return
        own = [p.grad for p in self.parameters]
        flat = [
            (torch.zeros_like(p) if g is None else g).reshape(-1).float()
            if p.dtype != torch.float64
            else (torch.zeros_like(p) if g is None else g).reshape(-1)
            for p, g in zip(self.parameters, own, strict=True)
        ]
        dtype = torch.float64 if any(f.dtype == torch.float64 for f in flat) else torch.float32
        has = torch.tensor([float(g is not None) for g in own], dtype=dtype, device=self.device)
        total = world.sum(torch.cat([*(f.to(dtype) for f in flat), has]))
        position = 0
        for index, p in enumerate(self.parameters):
            part = total[position : position + p.numel()]
            position += p.numel()
            # None stays None where no process has one: weight decay passes over it then.
            had = bool(total[len(total) - len(self.parameters) + index] > 0)
            p.grad = part.reshape(p.shape).to(p.dtype) if had else None

    def _refuse(self, outcome: Outcome) -> None:
        if not math.isfinite(outcome.loss):
            bad = {k: v for k, v in outcome.terms.items() if not math.isfinite(v)}
            named = ", ".join(f"{name} = {value}" for name, value in bad.items())
            raise TrainingError(f"the loss is not finite ({named or 'the sum of its terms'})")
        if outcome.gradient is not None and math.isfinite(outcome.gradient):
            self.skipped = 0
            return
        if self.scaler is not None and self.skipped < _MOST_SKIPPED:
            self.skipped += 1
            return
        named = ", ".join(
            name for name, p in zip(self.names, self.parameters, strict=True)
            if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        )  # fmt: skip
        raise TrainingError(f"the gradient is not finite (of {named})")

    def _update(self, lr: float, gradient: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.clip is not None and math.isfinite(gradient) and gradient > self.clip:
            for p in self.parameters:
                if p.grad is not None:
                    p.grad.mul_(self.clip / gradient)
        self.updating = True  # stays so if it is cut short
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.updating = False

    def finite(self) -> bool:
        """Whether every parameter is."""
        return all(bool(torch.isfinite(p.detach()).all()) for p in self.parameters)


def _optimizer(recipe: Recipe, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, eps=recipe.eps
        )
    return torch.optim.SGD(
        parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


def _norm(gradients: Sequence[Tensor], like: Tensor) -> Tensor:
    squares = [torch.linalg.vector_norm(g.detach().to(like.dtype)).square() for g in gradients]
    return torch.stack(squares).sum().sqrt() if squares else like.new_zeros(())


def _outcome(terms: Sequence[Term], values: Sequence[float], gradient: float) -> Outcome:
    n = len(terms)
    means = [v / max(c, 1.0) for v, c in zip(values[:n], values[n : 2 * n], strict=True)]
    weighted = [t.weight * m for t, m in zip(terms, means, strict=True) if t.weight != 0]
    right, images, stop = values[2 * n :]
    named = {t.name: m for t, m in zip(terms, means, strict=True)}
    return Outcome(sum(weighted), named, int(right), int(images), stop > 0, gradient)


def _skipped(outcome: Outcome) -> Outcome:
    return Outcome(outcome.loss, outcome.terms, outcome.correct, outcome.images, outcome.stop, None)
