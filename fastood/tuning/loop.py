"""The training loop: the same bits whether it ran through, was interrupted, or shared its work."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from fastood.differences import differences
from fastood.tuning.history import History, Progress
from fastood.tuning.log import Curves
from fastood.tuning.method import Method
from fastood.tuning.recipes import Recipe
from fastood.tuning.run import CHECKPOINT, HISTORY, Run, permutation
from fastood.tuning.views import TrainingData

__all__ = ["CHECKPOINT", "HISTORY", "permutation", "train"]


def train(
    method: Method,
    data: TrainingData,
    *,
    recipe: Recipe | None = None,
    seed: int = 1,
    out: Path | str | None = None,
    validation: TrainingData | None = None,
    select: Literal["last", "validation"] = "last",
    resume: bool = False,
    amp: bool = False,
    clip: float | None = None,
    drop_last: bool = False,
    tensorboard: bool = False,
    progress: Callable[[Progress], None] | None = None,
    log: Callable[[str], None] | None = None,
) -> History:
    """Train a method, in place.

    Every epoch goes once through the images in an order that ``seed`` and the epoch decide. Loss
    and gradient of a batch are sums over all processes of ``method.world``, divided by sums of
    counts, so that several processes compute what one would (to rounding).

    With ``out``, the state is written after every epoch, when training is interrupted, and when
    it fails; ``resume=True`` goes on from there, in the middle of an epoch if need be, and ends
    with the same bits as a run that was never interrupted (same machine, same processes). The
    first Ctrl-C lets the step finish, saves and raises KeyboardInterrupt; the second does not
    wait.

    Args:
        method: what is trained; ``method.world`` says with which other processes.
        data: training images.
        recipe: default: the authors'.
        seed: order of the images. (Augmentation and initial values have seeds of their own.)
        out: folder for ``training.safetensors`` (state), ``history.jsonl`` and curves; every
            process must see it. None writes nothing.
        validation: images whose accuracy is noted after every epoch. Never the test set.
        select: parameters kept in the end: of the last epoch, or of the first one with the
            highest accuracy on ``validation``.
        resume: go on from the state in ``out``; from the start, with a warning, if it has none.
        amp: forward pass in mixed precision.
        clip: largest norm of the gradient.
        drop_last: leave out an epoch's last batch if it is not full, as CoOp's loader does; the
            default trains on every image.
        tensorboard: also write curves for TensorBoard, to ``out/tensorboard``.
        progress: called in the first process after every step.
        log: called there with lines of text worth showing.

    Returns:
        Numbers of every epoch, and which was selected.

    Raises:
        ValueError: settings that do not fit: nothing to train, other class names, ``select`` by
            validation without it.
        DataError: ``out`` holds a run and ``resume`` is False; its settings are others (the
            differences are printed); it is damaged; an image cannot be read.
        TrainingError: loss or gradient not finite; names epoch, step and term. The state before
            that step is saved, and the method has it.
        KeyboardInterrupt: after saving.
    """
    recipe = method.recipe if recipe is None else recipe
    _check(method, data, validation, select, clip, out, resume, tensorboard)
    run = Run(method, data, recipe, seed, validation, select, amp, clip, drop_last)
    run.progress, run.log = progress, log
    if out is not None:
        run.out = Path(out)
    if recipe.epochs == 0:
        run.warn_overlap()  # validation may choose settings, as Tip-Adapter's alpha and beta
        method.prepare(data)
        run.history.finished = True
        return run.history
    run.begin(resume)
    if run.rank == 0 and tensorboard and run.out is not None:
        run.curves = Curves(run.out / "tensorboard", start=run.at.epoch * run.steps + run.at.step)
    try:
        with torch.enable_grad(), _interrupts(run):  # whatever the caller's mode
            run.go()
    except BaseException:
        run.rescue()
        raise
    finally:
        if run.curves is not None:
            run.curves.close()
    return run.history


@contextmanager
def _interrupts(run: Run) -> Iterator[None]:
    """The first Ctrl-C asks the run to stop behind the step, the second stops it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        del number, frame
        if run.stop:
            raise KeyboardInterrupt
        run.stop = True

    signal.signal(signal.SIGINT, ask)
    try:
        yield
        if run.stop:  # asked behind the last step: the run is complete, the program still ends
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _check(
    method: Method,
    data: TrainingData,
    validation: TrainingData | None,
    select: str,
    clip: float | None,
    out: Path | str | None,
    resume: bool,
    tensorboard: bool,
) -> None:
    if select not in ("last", "validation"):
        test = " (the test set never selects)" if select == "test" else ""
        raise ValueError(f"select: expected 'last' or 'validation', got {select!r}{test}")
    if select == "validation" and validation is None:
        raise ValueError("select: 'validation' needs validation images, got none")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip: expected a norm > 0 or None, got {clip}")
    if out is None and (resume or tensorboard):
        raise ValueError("out: resume and tensorboard need a folder, got None")
    if len(data.labels) == 0:
        raise ValueError(f"{data.name}: expected at least one training image, got none")
    for what, given in (("data", data), ("validation", validation)):
        if given is not None and tuple(given.class_names) != method.class_names:
            lines = differences(list(method.class_names), list(given.class_names))
            raise ValueError(
                f"{what}: expected the {len(method.class_names)} classes of the method, got "
                f"{len(given.class_names)} ({lines[0].replace('saved', 'method').lstrip(': ')}); "
                "build both from the same list"
            )
