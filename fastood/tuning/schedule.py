"""Learning rates as a plain function of where training is, so that nothing has to be resumed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastood.tuning.recipes import Recipe

__all__ = ["learning_rate"]


def learning_rate(recipe: Recipe, epoch: int, step: int = 0, steps: int = 1) -> float:
    """The learning rate of one step.

    With E = ``recipe.epochs``, W = ``recipe.warmup_epochs`` and the epoch e counted from 0::

        e < W:                warmup_lr, constant
        "cosine" per epoch:   lr · (1 + cos(π (e - W) / E)) / 2
        "cosine" per step:    lr · (1 + cos(π (t - W·steps) / (E·steps))) / 2,  t = e·steps + step
        "constant":           lr

    The cosine starts anew behind the warm-up but keeps its full length E, so CoOp's last epoch is
    at lr · (1 + cos(π (E - 2) / E)) / 2, not at the curve's end. That is what the published code
    computes: its warm-up wraps a cosine over all E epochs and lets it count from the first epoch
    behind the warm-up ("recount", the default there and in CoOp's configurations). Per step
    without a warm-up this is Tip-Adapter-F's schedule.

    Source: KaiyangZhou/Dassl.pytorch and KaiyangZhou/CoOp (read, not run);
    gaopengcuhk/Tip-Adapter.

    Args:
        recipe: epochs, lr, schedule, per, warmup_epochs, warmup_lr.
        epoch: 0..E-1.
        step: step within the epoch, 0..steps-1.
        steps: steps of an epoch.
    """
    if epoch < recipe.warmup_epochs:
        return recipe.warmup_lr
    if recipe.schedule == "constant":
        return recipe.lr
    done = float(epoch - recipe.warmup_epochs)
    if recipe.per == "step":
        done += step / steps
    return recipe.lr * (1 + math.cos(math.pi * done / recipe.epochs)) / 2
