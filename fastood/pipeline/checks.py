"""Mistakes found before the first image is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastood.data.classes import plain_name
from fastood.data.imageset import ImageSet
from fastood.errors import DataError, ModelError
from fastood.features.featureset import FeatureSet

if TYPE_CHECKING:
    from fastood.models.base import Encoder

__all__ = [
    "check_labels",
    "check_same_classes",
    "check_set",
    "check_set_names",
    "check_settings",
    "check_training",
]

_TAKEN = ("set", "role", "path", "label", "class_name", "predicted", "decision", "path_bytes")


def check_labels(labels: Iterable[Any]) -> None:
    """Labels of scores become columns of tables, beside those every table has."""
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"methods: expected a label of text for every score, got {label!r}")
        if label in _TAKEN:
            raise ValueError(
                f"methods: a score cannot be called {label!r}, tables have a column of that name; "
                f"expected a label other than {', '.join(_TAKEN)}"
            )


def check_same_classes(given: Sequence[str], own: Sequence[str], source: str) -> None:
    """The classes asked for must be those of an adaptation; their order may differ.

    Raises:
        ValueError: with what each side has and the other lacks.
    """
    ours, theirs = ({plain_name(n): n for n in names} for names in (own, given))
    if ours.keys() == theirs.keys():
        return
    only = [sorted(a[n] for n in a.keys() - b.keys()) for a, b in ((theirs, ours), (ours, theirs))]
    shown = [", ".join(names[:5]) + (", ..." if names[5:] else "") or "none" for names in only]
    raise ValueError(
        f"class_names: expected the {len(ours)} classes that {source} was trained on, got "
        f"{len(theirs)}; only asked for: {shown[0]}; only trained: {shown[1]}"
    )


def check_settings(*, tpr: float, aupr: str, resamples: int, seed: int) -> float:
    """The settings of an evaluation; returns ``tpr`` as a float."""
    from fastood.metrics.bootstrap import check_resamples
    from fastood.metrics.ranks import check_choice, check_tpr

    tpr = check_tpr(tpr)
    if tpr == 1.0:
        raise ValueError("tpr: expected a fraction in (0, 1), got 1.0: no threshold accepts all")
    check_choice("aupr", aupr, ("ap", "trapezoid"))
    if isinstance(resamples, bool) or resamples != 0:
        check_resamples(resamples)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed!r}")
    return tpr


def check_set_names(
    id_set: ImageSet | FeatureSet, ood_sets: Sequence[ImageSet | FeatureSet]
) -> None:
    """Sets are told apart by name, in the metrics and in the table."""
    if not ood_sets:
        raise ValueError("ood_sets: expected at least one OOD set, got none")
    for given in (id_set, *ood_sets):
        if not isinstance(given, (ImageSet, FeatureSet)):
            raise TypeError(
                f"expected an ImageSet (load_images) or a FeatureSet (load_features), got "
                f"{type(given).__name__}"
            )
    names = [id_set.name, *(s.name for s in ood_sets)]
    for name in names:
        if name == "average":
            raise ValueError("a set cannot be called 'average', the mean over OOD sets is")
        if names.count(name) > 1:
            raise ValueError(
                f"expected every set under its own name, got {name!r} {names.count(name)} times "
                f"among {', '.join(names)}; rename one"
            )


def check_set(
    given: ImageSet | FeatureSet, *, encoder: Encoder | None, width: int | None, local: bool
) -> None:
    """Whether a set can be scored at all: images need a model, features must fit the classes."""
    if isinstance(given, ImageSet):
        if encoder is None:
            raise ModelError(f"{given.name}: images need a model; without one, give features")
        if not len(given):
            raise DataError(f"{given.name}: expected at least one image, the set is empty")
        return
    if not len(given) or not given.chunks:
        raise DataError(f"{given.name}: expected at least one image, the set is empty")
    if local and not given.has_local:
        raise DataError(f"{given.name}: patch scores need an array 'local' (n, P, D)")
    found = given.chunks[0].image.shape[-1]
    if width is not None and found != width:
        raise ValueError(
            f"{given.name}: expected features of width {width} as the classes have, got {found}; "
            "are they from another model?"
        )


def check_training(
    asked: Mapping[str, tuple[str, Mapping[str, Any]]], train: ImageSet | FeatureSet | None
) -> None:
    """Neighbours and labels that ``knn`` and ``mahalanobis`` cannot do without."""
    if train is None:
        return
    for name, options in asked.values():
        if options.get("fit") is not None:
            continue
        if name == "knn":
            k, n = options.get("k", 50), len(train)
            if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
                raise ValueError(
                    f"knn: k: expected an integer with 1 <= k <= {n}, the images in {train.name}, "
                    f"got {k!r}"
                )
        elif name == "mahalanobis":
            eps, shrinkage = options.get("eps", 0.0), options.get("shrinkage", 0.0)
            for key, value, top in (("eps", eps, float("inf")), ("shrinkage", shrinkage, 1.0)):
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise ValueError(f"mahalanobis: {key}: expected a number, got {value!r}")
                if not 0 <= value <= top:
                    raise ValueError(f"mahalanobis: {key}: expected 0 to {top:g}, got {value!r}")
            if isinstance(train, ImageSet):
                labelled = all(item.label is not None for item in train)
            else:
                labelled = train.labels is not None and bool((train.labels >= 0).all())
            if not labelled:
                raise DataError(
                    f"{train.name}: mahalanobis needs a class for every training image; give a "
                    "folder with class subfolders or features with labels"
                )
