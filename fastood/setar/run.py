"""SeTAR: a greedy search for the low-rank version of each weight matrix that lowers a loss.

Source: arXiv 2406.12629.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from fastood.data.digests import digest_bytes
from fastood.data.imageset import ImageSet
from fastood.data.prompts import check_class_names, clean_name, fill, resolve_templates
from fastood.errors import DataError, ModelError
from fastood.models.base import Encoder
from fastood.models.classifier import class_order
from fastood.models.copies import network_of
from fastood.scores.inputs import check_count
from fastood.setar.authors import backbone_of, published
from fastood.setar.evaluate import Evaluator
from fastood.setar.lowrank import Part, check_part
from fastood.setar.objective import BEST, Objective, Value
from fastood.setar.plan import RATIOS, make_plan
from fastood.setar.recipe import RECIPE, Recipe
from fastood.setar.table import Row, Table
from fastood.setar.towers.base import check_precision
from fastood.setar.walk import Progress, Walk
from fastood.tuning.live import LiveImages

__all__ = ["RECIPE", "Found", "Partition", "Progress", "search"]

Partition = Literal["reference", "global"]


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        recipe: the picks; ``recipe.apply(encoder)`` makes the model.
        baseline, final: values of the model as it was, and with all picks.
        rows: every evaluated candidate.
        file: the written recipe; None without ``out``.
        notes: what a reader of the numbers should know.
    """

    recipe: Recipe
    baseline: Value
    final: Value
    rows: tuple[Row, ...]
    file: Path | None
    notes: tuple[str, ...]


def search(
    encoder: Encoder,
    images: ImageSet,
    *,
    class_names: Sequence[str] | None = None,
    order: str = "image_text",
    kinds: Iterable[str] | str = "up",
    ratios: Sequence[float] = RATIOS,
    projections: bool = False,
    layers: Iterable[int] | None = None,
    part: Part = "minor",
    seed: int = 0,
    metric: str = "loss",
    score: str | None = None,
    weight: float | None = None,
    top_k: int | None = None,
    temperature: float | None = None,
    pred_label: bool = False,
    id_set: str | None = None,
    partition: Partition = "reference",
    batch_size: int | None = None,
    templates: str | Sequence[str] = "mcm",
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    memory: int | None = None,
    chunk: int | None = None,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Found:
    """Search for the picks of a recipe, on ``encoder`` as it is; it is not changed.

    Starting from the model as it is, each matrix of ``order`` is tried without each share of its
    singular directions; of the candidates of a visit the best is accepted if it is strictly better
    than the best so far, otherwise the matrix stays.

    Args:
        encoder: a ViT CLIP of open_clip or Hugging Face with patch features, or a Swin classifier;
            float32 or float64.
        images: labelled images of the ID classes; the authors take one training image of each
            class. Order matters to ``partition="reference"``.
        class_names: K names in the order of the labels; default: those of the images.
        order, kinds, ratios, projections, layers: what is visited, see ``plan.make_plan``.
        part, seed: which directions are dropped, see ``low_rank``.
        metric, score, pred_label: the objective, see ``Objective``.
        weight, top_k, temperature: of the objective; default: the authors' for the backbone and ID
            set, else top_k = round(0.3 K), see ``published``; temperature 100 (a classifier: 1).
        id_set: ``"imagenet"`` or ``"voc"``: whose published settings; default by K.
        partition: ``"reference"``: the mean over OOD patches is taken in batches of
            ``batch_size`` images in the order of the set, as the authors' loader makes them (the
            result depends on both); ``"global"``: over all images at once.
        batch_size: of ``"reference"``; default the authors', 512 (Swin: 384).
        templates: class prompts; the authors' has no full stop.
        out: folder for the table of candidates and the recipe. A search that was stopped goes on
            there.
        overwrite: start again where another search lies. Its files stay until the first value of
            this one is known.
        memory: bytes to keep between candidates (what enters blocks, features); default a quarter
            of what is free. Less memory costs time, never accuracy.
        chunk: images run together; decides about memory only.
        workers: threads that decode.
        progress: told where the search is.
    Returns:
        ``Found``.
    Raises:
        TypeError: an encoder, images or class names that are none.
        ValueError: settings that do not exist or do not fit (ratios outside [0, 1), ranks above a
            matrix, unknown layers, top_k >= K, labels outside the classes, images without labels).
        ModelError: towers that cannot be taken apart (ResNets, unknown blocks), a dtype below
            float32, weights that are not finite.
        DataError: images that cannot be read; ``out`` cannot be written or holds another search.

    Example:
        >>> from fastood.models import load_model
        >>> from fastood.setar.plan import make_plan
        >>> plan = make_plan(load_model("fastood-tiny").model)
        >>> plan.visits, plan.evaluations
        (9, 72)
    """
    _check_types(encoder, images, class_names)
    check_part(part, seed)
    memory = None if memory is None else check_count("memory", memory, 0, None)
    chunk = None if chunk is None else check_count("chunk", chunk, 1, None)
    model = network_of(encoder)
    check_precision(encoder)
    plan = make_plan(
        model, order=order, kinds=kinds, ratios=ratios, projections=projections, layers=layers
    )
    for matrix in plan.matrices:
        if not bool(matrix.of(matrix.stored(model)).isfinite().all()):
            raise ModelError(
                f"{encoder.name}: {matrix.address} has NaN or Inf in its weights; is the file "
                "damaged?"
            )
    data = LiveImages(
        encoder,
        images,
        needs="pixels",
        augmentation=None,
        class_names=class_names,
        workers=workers,
    )
    names = data.class_names
    labels, prompts = data.labels, []
    if encoder.head() is None:
        prompts = _prompts(encoder, names, templates)
    else:
        labels = torch.tensor(class_order(encoder, names))[labels]
    found = published(backbone_of(model), len(names), id_set)
    objective = Objective(
        metric,
        score,
        top_k=found.top_k if top_k is None else top_k,
        weight=found.weight if weight is None else weight,
        temperature=(100.0 if prompts else 1.0) if temperature is None else temperature,
        pred_label=pred_label,
    )
    objective.check_classes(len(names))
    batches = _batches(len(data), partition, found.batch if batch_size is None else batch_size)
    settings: dict[str, Any] = {
        "model": {"name": encoder.name, "fingerprint": encoder.fingerprint},
        "plan": plan.describe(),
        "part": part,
        "seed": seed if part == "random" else 0,  # of nothing else here
        "objective": objective.describe(),
        "partition": {"kind": partition, "batches": batches},
        "prompts": [list(row) for row in prompts],
        "class_names": list(names),
        "images": {"number": len(data), "digest": _digest(images, labels.tolist())},
    }
    folder = None if out is None else Path(out)
    table = Table(folder, settings, score=score, overwrite=overwrite)
    evaluator: Evaluator | None = None

    def evaluating() -> Evaluator:
        """Made when something has to be computed, with what has been decided so far."""
        nonlocal evaluator
        if evaluator is None:
            evaluator = Evaluator(
                encoder,
                lambda index: data.batch(index, 0).image,
                labels,
                prompts,
                objective,
                batches=batches,
                plan=plan,
                part=part,
                seed=seed,
                memory=memory,
                chunk=chunk,
            )
        return evaluator

    try:
        walk = Walk(plan, objective, table, evaluating, progress)
        walk.run()
        notes = _notes(walk, objective, evaluator)
        source = found.source if weight is None and top_k is None else "given"
        of_search = {k: settings[k] for k in ("plan", "objective", "partition", "class_names")}
        recipe = Recipe.of(
            encoder,
            walk.picks,
            part=part,
            seed=seed,
            search={
                **of_search,
                "images": {"name": images.name, **settings["images"]},
                "templates": list(resolve_templates(templates)) if prompts else [],
                "settings_from": source,
                "baseline": walk.baseline.as_dict(),
                "final": walk.best.as_dict(),
                "evaluations": len(table.rows),
                "notes": list(notes),
            },
        )
        file = None if folder is None else recipe.write(folder / RECIPE)
        return Found(recipe, walk.baseline, walk.best, table.rows, file, notes)
    finally:
        data.close()
        table.close()


def _check_types(encoder: Any, images: Any, class_names: Any) -> None:
    if not isinstance(encoder, Encoder):
        raise TypeError(
            f"encoder: expected a model of load_model, got {type(encoder).__name__}; wrap a model "
            "of open_clip in OpenClipEncoder, one of Hugging Face in HFEncoder"
        )
    if not isinstance(images, ImageSet):
        raise TypeError(
            f"images: expected an ImageSet (load_images), got {type(images).__name__}; a search "
            "runs the image tower"
        )
    if isinstance(class_names, str):
        raise TypeError(f"class_names: expected a list of names, got the text {class_names!r}")


def _prompts(
    encoder: Encoder, names: Sequence[str], templates: str | Sequence[str]
) -> list[list[str]]:
    """Templates x K."""
    # the authors' ImageNet names have two twice
    for note in check_class_names([clean_name(n) for n in names], allow_duplicates=True):
        warnings.warn(note, RuntimeWarning, stacklevel=3)
    found = [[fill(t, clean_name(n)) for n in names] for t in resolve_templates(templates)]
    for prompts in found:
        for note in encoder.warn_prompts(prompts):
            warnings.warn(note, RuntimeWarning, stacklevel=3)
    return found


def _batches(n: int, partition: str, size: int) -> list[int]:
    if partition not in get_args(Partition):
        raise ValueError(
            f"partition: expected one of {', '.join(get_args(Partition))}, got {partition!r}"
        )
    size = n if partition == "global" else check_count("batch_size", size, 1, None)
    return [min(size, n - start) for start in range(0, n, size)]


def _digest(images: ImageSet, labels: Sequence[int]) -> str:
    """Over contents and labels in their order, wherever the files lie.

    Raises:
        DataError: a file that cannot be read, by name.
    """
    state = hashlib.blake2b(digest_size=16)
    for item, label in zip(images, labels, strict=True):
        try:
            state.update(digest_bytes(item.read()))
        except OSError as error:
            raise DataError(f"{item.path}: cannot be read: {error.strerror or error}") from error
        except DataError as error:
            raise DataError(f"{item.path}: {error}") from error
        state.update(f"{label} ".encode())
    return state.hexdigest()


def _notes(walk: Walk, objective: Objective, evaluator: Evaluator | None) -> tuple[str, ...]:
    notes = [] if evaluator is None else list(evaluator.notes)
    if walk.baseline.objective == BEST.get(objective.metric):
        notes.append(
            f"{objective.metric} of {objective.score} is {walk.baseline.objective:g} for the model "
            "as it is, and nothing can be better; choose another metric or score"
        )
    for name, value in (("the model as it is", walk.baseline), ("the result", walk.best)):
        if value.empty_batches:
            notes.append(
                f"{value.empty_batches} batches of {name} have no pseudo-OOD patch; their patch "
                "term is 0"
            )
        if value.ties:
            notes.append(
                f"ties at the k-th logit decide about {value.ties} patches of {name}; the lowest "
                "index wins (classes with equal prompts?)"
            )
    return tuple(notes)
