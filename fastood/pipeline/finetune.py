"""Images and a method's name in, a trained method and its file out."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from fastood.data.classes import plain_name
from fastood.data.imageset import ImageSet
from fastood.data.paths import path_text
from fastood.differences import differences
from fastood.errors import DataError, ModelError
from fastood.features.featureset import FeatureSet
from fastood.pipeline.asked import check_given, recipe_of, sizes_of
from fastood.pipeline.output import OutputFolder
from fastood.scores.inputs import check_count
from fastood.tuning.augment import CLIP_TRAIN, TIP_VIEWS
from fastood.tuning.fewshot import few_shot
from fastood.tuning.history import History, Progress
from fastood.tuning.live import LiveImages
from fastood.tuning.loop import CHECKPOINT, train
from fastood.tuning.low_rank_method import SETAR_TRAIN, LowRankMethod
from fastood.tuning.method import Method, setting_names
from fastood.tuning.parallel import World
from fastood.tuning.registry import method_class
from fastood.tuning.state import ADAPTATION, read_header, save_method
from fastood.tuning.tip import TipAdapter
from fastood.tuning.views import FeatureData, FeatureViews, TrainingData

if TYPE_CHECKING:
    from fastood.features.cache import FeatureCache
    from fastood.features.encode import Progress as Encoding
    from fastood.models.base import Encoder

__all__ = ["ADAPTATION", "FineTuned", "fine_tune", "recipe_of", "with_classes"]

Given = ImageSet | FeatureSet


@dataclass(frozen=True)
class FineTuned:
    """A trained method.

    Attributes:
        method: ``head()`` scores with it; LoRA and SeTAR+FT have ``adapted(encoder)`` instead.
        history: loss, accuracy and settings of every epoch.
        file: what ``--adapt`` and ``Pipeline(adapt=[...])`` take; None without ``out``.
    """

    method: Method
    history: History
    file: Path | None


def fine_tune(
    encoder: Encoder,
    method: str,
    images: Given,
    *,
    class_names: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    shots: int | None = 16,
    seed: int = 1,
    validation: Given | None = None,
    select: Literal["last", "validation"] = "last",
    recipe: Mapping[str, Any] | None = None,
    views: int = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    cache: FeatureCache | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    amp: bool = False,
    tensorboard: bool = False,
    encoding: Encoding | None = None,
    progress: Callable[[Progress], None] | None = None,
    log: Callable[[str], None] | None = None,
) -> FineTuned:
    """Adapt ``encoder`` to the classes of ``images`` by one of the methods of ``METHODS``.

    Args:
        encoder: the network; its weights stay as they are (and are frozen).
        method: ``"coop"``, ``"cocoop"``, ``"locoop"``, ``"ebm"``, ``"tip"``, ``"tip-f"``,
            ``"clip-adapter"``, ``"lora"``, ``"setar-ft"`` (which needs ``picks``), ``"zoclip"``.
        images: labelled training images, or features of them.
        class_names: K names in the order of the labels; default: those of ``images``.
        settings: of the method (``n_ctx``, ``weight``, ...), where not the authors' defaults.
        shots: images of each class, drawn with ``seed``; None takes all.
        seed: of the draw, the order, the augmentation and, unless set, the initial values.
        validation: labelled images of the same classes: their accuracy is noted after every epoch,
            and Tip-Adapter's alpha and beta are chosen on them. Never the test set.
        select: parameters of the last epoch (as published), or of the best on ``validation``.
        recipe: changes to the authors' recipe (``epochs``, ``lr``, ``batch_size``, ...), which for
            LoRA and SeTAR+FT has smaller batches for deep towers, see ``fastood.setar.authors``.
        views: 0 augments freshly in every epoch, which runs the image tower in every step; V > 0
            encodes V views once and takes them in turn (V >= 2 augmented), an approximation. One
            view is the picture as it is. Features are what they are.
        out: folder for ``adaptation.safetensors``, the state of the run and its history.
        resume: go on from the state in ``out``, if there is one.
        cache, batch_size, workers, encoding: as for ``encode_images`` (progress: ``encoding``).
        amp, tensorboard, progress, log: as for ``fastood.tuning.train``.
    Returns:
        The trained method, its history and file.
    Raises:
        TypeError: images that are no image or feature set.
        ValueError: unknown method, setting or recipe field; classes without images or with fewer
            than ``shots``; ``select="validation"`` without validation images.
        DataError: a class of which no image can be read; ``out`` cannot be written, or holds the
            result of something else.
        DataError, ModelError, TrainingError: as ``fastood.tuning.train``.
    """
    kind = method_class(method)
    _check_types(images, validation, class_names)
    views = check_count("views", views, 0, None)
    if views and kind.needs == "pixels":
        raise ValueError(
            f"views: {kind.name} trains the image tower, so features of views cannot be kept; "
            f"expected 0, got {views}"
        )
    seed = check_count("seed", seed, 0, 2**63 - 1)
    chosen = _settings(kind, settings or {}, seed)
    asked = {k: v for k, v in (recipe or {}).items() if v is not None}
    changed = recipe_of(
        kind, shots=shots, dataset=images.name, **{**sizes_of(kind, encoder), **asked}
    )
    names = tuple(class_names if class_names is not None else images.class_names or ())
    if not names:
        raise ValueError(
            f"{images.name}: expected class names with the images (folders named after classes), "
            "or class_names"
        )
    if class_names is not None and isinstance(images, FeatureSet) and images.class_names is None:
        images = dataclasses.replace(images, class_names=names)  # labels index what was given
    if isinstance(images, ImageSet) and images.without_images:
        raise ValueError(
            f"{images.name}: classes without images: {', '.join(images.without_images[:10])}; add "
            "images or remove the folders"
        )
    images = few_shot(with_classes(images, names), shots, seed, class_names=names)
    held = None if validation is None else with_classes(validation, names)
    if held is not None and held.name == images.name:
        held = dataclasses.replace(held, name=f"{held.name}, validation")
    _refuse_features(kind, images, held)
    world = World.from_environment()
    folder = None if out is None else Path(out)
    if folder is not None and world.rank == 0:
        OutputFolder(folder)  # refuses one that cannot be written, before the work
    built = kind.build(encoder, names, **chosen)
    built.world = world

    options: dict[str, Any] = {
        "cache": cache,
        "batch_size": batch_size,
        "workers": workers,
        "progress": encoding if world.rank == 0 else None,
        "log": log,
        "world": world,
    }
    data = _training(encoder, kind, images, names, views, seed, options)
    checking = _validation(encoder, kind, held, names, options)
    notes = _unreadable(data, images, names)
    if folder is not None:
        _refuse_other(folder, built, data, trains=changed.epochs > 0)
    try:
        history = train(
            built,
            data,
            recipe=changed,
            seed=seed,
            out=folder,
            validation=checking,
            select=select if changed.epochs else "last",
            resume=resume and folder is not None and (folder / CHECKPOINT).exists(),
            amp=amp,
            tensorboard=tensorboard,
            progress=progress,
            log=log,
        )
    finally:
        for given in (data, checking):
            if isinstance(given, LiveImages):
                given.close()
    for line in notes:
        history.note(line)
    if isinstance(built, TipAdapter) and checking is not None:
        found = built.choose(_all(checking), checking.labels, dataset=images.name)
        history.note(
            f"alpha {found.alpha:.4g} and beta {found.beta:.4g} chosen on {found.images} "
            f"validation images (accuracy {found.accuracy:.4f})"
        )
    if not history.data:  # nothing was trained
        history.data = {"training": data.describe()}
    file = None
    if folder is not None and world.rank == 0:
        file = save_method(folder / ADAPTATION, built, encoder=encoder, history=history)
    return FineTuned(built, history, file)


def with_classes(given: Given, names: Sequence[str]) -> Given:
    """The same set with labels that index ``names``; spelling decides, not order.

    Raises:
        DataError: classes of the set that are not among ``names``, or no classes at all.
    """
    theirs = given.class_names
    if theirs is not None and tuple(theirs) == tuple(names):
        return given
    if theirs is None:
        raise DataError(f"{given.name}: expected labelled images (folders named after classes)")
    own = {plain_name(name): k for k, name in enumerate(names)}
    foreign = [name for name in theirs if plain_name(name) not in own]
    if foreign or len(own) < len(names):
        shown = ", ".join(foreign[:5]) or "names that differ only in spelling"
        raise DataError(
            f"{given.name}: expected the {len(names)} classes trained on, got "
            f"{len(theirs)} with others among them: {shown}"
        )
    index = np.array([own[plain_name(name)] for name in theirs], dtype=np.int64)
    if isinstance(given, ImageSet):
        items = tuple(
            item if item.label is None else dataclasses.replace(item, label=int(index[item.label]))
            for item in given
        )
        return dataclasses.replace(given, items=items, class_names=tuple(names))
    labels = given.labels
    if labels is not None:
        labels = np.where(labels < 0, -1, index[np.maximum(labels, 0)])
    return dataclasses.replace(given, labels=labels, class_names=tuple(names))


def _check_types(images: Any, validation: Any, class_names: Any) -> None:
    for what, given in (("images", images), ("validation", validation)):
        if not isinstance(given, (ImageSet, FeatureSet)) and (
            given is not None or what == "images"
        ):
            raise TypeError(
                f"{what}: expected an ImageSet (load_images) or a FeatureSet (load_features), got "
                f"{type(given).__name__}"
            )
    if isinstance(class_names, str):
        raise TypeError(f"class_names: expected a list of names, got the text {class_names!r}")


def _settings(kind: type[Method], settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What was asked, with ``seed`` where the method draws initial values."""
    check_given(kind, settings)
    return {"seed": seed, **settings} if "seed" in setting_names(kind) else dict(settings)


def _refuse_features(kind: type[Method], *sets: Given | None) -> None:
    for given in sets:
        if kind.needs == "pixels" and isinstance(given, FeatureSet):
            raise ModelError(
                f"{given.name}: {kind.name} trains the towers and needs images, got features"
            )


def _training(
    encoder: Encoder,
    kind: type[Method],
    images: Given,
    names: tuple[str, ...],
    views: int,
    seed: int,
    options: Mapping[str, Any],
) -> TrainingData:
    local = kind.needs == "local"
    if isinstance(images, FeatureSet):
        return FeatureData(images, names, local=local, device=encoder.device)
    # Tip-Adapter-F too: it starts from the same keys
    augmentation = TIP_VIEWS if issubclass(kind, TipAdapter) else CLIP_TRAIN
    if issubclass(kind, LowRankMethod):
        augmentation = SETAR_TRAIN
    if views == 0 or kind.needs == "pixels":
        return LiveImages(
            encoder,
            images,
            needs=kind.needs,
            augmentation=augmentation,
            seed=seed,
            class_names=names,
            workers=options["workers"],
        )
    return FeatureViews.encode(
        encoder,
        images,
        views=views,
        augmentation=augmentation,
        seed=seed,
        class_names=names,
        local=local,
        **options,
    )


def _validation(
    encoder: Encoder,
    kind: type[Method],
    images: Given | None,
    names: tuple[str, ...],
    options: Mapping[str, Any],
) -> TrainingData | None:
    if images is None:
        return None
    if isinstance(images, FeatureSet):
        return FeatureData(images, names, device=encoder.device)
    if kind.needs == "pixels":
        return LiveImages(
            encoder,
            images,
            needs="pixels",
            augmentation=None,
            class_names=names,
            workers=options["workers"],
        )
    return FeatureViews.encode(encoder, images, views=1, class_names=names, **options)


def _unreadable(data: TrainingData, images: Given, names: Sequence[str]) -> list[str]:
    """Say which images were left out; refuse if nothing is left of a class."""
    left = set(data.labels.tolist())
    lost = [name for k, name in enumerate(names) if k not in left]
    if lost:
        raise DataError(
            f"{images.name}: no image of {', '.join(lost[:5])}{', ...' * (len(lost) > 5)} can be "
            "read; replace the files or remove the classes"
        )
    skipped = data.describe().get("skipped")
    if not skipped:
        return []
    path, reason = skipped[0]
    line = (
        f"{images.name}: {len(skipped)} of {len(images)} training images cannot be read and are "
        f"left out (first {path}: {reason})"
    )
    warnings.warn(line, RuntimeWarning, stacklevel=3)
    return [line]


def _refuse_other(folder: Path, built: Method, data: TrainingData, *, trains: bool) -> None:
    """Never replace the adaptation of something else.

    A run with epochs has a state, which ``train`` compares; this is for those without.
    """
    file = folder / ADAPTATION
    if not file.exists() or (trains and (folder / CHECKPOINT).exists()):
        return
    found = read_header(file)
    saved_data = found.training.get("data", {}).get("training", {})
    saved = {
        "method": found.method,
        "settings": _asked(found.settings),
        "class_names": list(found.class_names),
        "encoder": found.encoder["fingerprint"],
        "data": saved_data.get("digest"),
    }
    now = {
        "method": built.name,
        "settings": json.loads(json.dumps(_asked(built.settings()))),
        "class_names": list(built.class_names),
        "encoder": built.encoder.fingerprint,
        "data": data.digest,
    }
    if found.method != built.name:  # the settings of two methods have nothing in common
        saved, now = {"method": found.method}, {"method": built.name}
    changed = differences(saved, now)
    if changed:
        raise DataError(
            f"{path_text(file)}: holds the result of something else ({'; '.join(changed)}); choose "
            "another folder, or start again (fastood train --overwrite)"
        )


def _asked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they were before any was chosen on validation data."""
    found = dict(settings)
    chosen = found.pop("chosen", None)
    if chosen:
        found["alpha"], found["beta"] = chosen["initial"]
    return found


def _all(data: TrainingData) -> torch.Tensor:
    return data.batch(torch.arange(len(data.labels)), 0).image
