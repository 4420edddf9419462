"""How many validation images a method gets right, by all processes together."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastood.tuning.method import Batch, Method
from fastood.tuning.views import TrainingData

__all__ = ["accuracy"]

_BATCH = 256


@torch.no_grad()
def accuracy(method: Method, data: TrainingData, stop: Callable[[], bool] = lambda: False) -> float:
    """Share of the images whose class is right, with the method as it is now.

    By the head, on global features; patches are not asked for. Methods that need pixels predict
    as they do in training.

    Args:
        data: every process has all of it and looks at its share.
        stop: asked between batches; True raises KeyboardInterrupt (one process only: several stop
            behind their next step, together).
    """
    world = method.world
    device = next((p.device for p in method.parameters()), torch.device("cpu"))
    head = None if method.needs == "pixels" else method.head()
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    order = torch.arange(len(data.labels))
    for start in range(0, len(order), _BATCH):
        if stop() and world.size == 1:
            raise KeyboardInterrupt
        whole = order[start : start + _BATCH]
        batch = data.batch(whole[world.part(len(whole))], 0)
        labels = batch.labels.to(device)
        if head is None:
            moved = [None if x is None else x.to(device) for x in batch]
            predicted = method.terms(Batch(*moved))[1]  # type: ignore[arg-type]
        elif len(labels):
            predicted = head.similarities(batch.image.to(device), None)[0]
        else:
            continue
        if predicted.ndim == 2:
            predicted = predicted.argmax(dim=1)
        counts[0] += (predicted == labels).sum()
        counts[1] += len(labels)
    right, images = world.sum(counts).tolist()
    return float(right / images)
