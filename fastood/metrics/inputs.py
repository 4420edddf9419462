"""Reading scores: arrays, tensors, lists and ``Scores`` become plain float arrays, higher = ID.

Nothing here changes an order: half precision is widened, float32 stays float32, float64 stays
float64, integers are accepted as long as float64 holds them exactly. Infinite scores are refused
along with NaN: no score of finite features is infinite, so one is an overflow, and ranking it
would hide that (scikit-learn refuses them for the same reason).
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from fastood.scores.result import Orientation, ScoreKey

__all__ = [
    "Pair",
    "is_scores",
    "key_differences",
    "key_of",
    "orientation",
    "read_pair",
    "values",
    "warn_if_tied",
]

_SHOWN = 5
# Float16 leaves 214 distinct values of 48,443 on published MCM scores and moves FPR95 by 0.3
# points. Fewer than one distinct value in five is far beyond what duplicate images cause.
_DISTINCT_SHARE = 0.2
_DISTINCT_MIN_N = 100


class Pair(NamedTuple):
    """ID and OOD scores of one evaluation, both oriented so that higher means ID."""

    id: np.ndarray
    ood: np.ndarray


def is_scores(scores: Any) -> bool:
    """Whether these are ``Scores``, without importing torch through that package."""
    # Without that module loaded nothing can be an instance of its class.
    module = sys.modules.get("fastood.scores.result")
    return module is not None and isinstance(scores, module.Scores)


def key_of(scores: Any) -> ScoreKey | None:
    """The ``ScoreKey`` that the scores carry, None for raw arrays."""
    return scores.key if is_scores(scores) else None


def check_higher(higher: object, name: str = "higher") -> None:
    """Refuse anything but the two orientations (and None, meaning "as the scores say")."""
    if higher not in (None, "id", "ood"):
        raise ValueError(f'{name}: expected "id" or "ood", got {higher!r}')


def orientation(scores: Any, higher: Orientation | None, name: str = "scores") -> Orientation:
    """Which way is up: what ``Scores`` carry, else ``higher``, else ``"id"``.

    Raises:
        ValueError: if ``higher`` is given and contradicts the scores.
    """
    check_higher(higher)
    if not is_scores(scores):
        return higher or "id"
    if higher is not None and higher != scores.higher:
        raise ValueError(
            f"{name}: higher means {scores.higher} in these scores, but higher={higher!r} was "
            f"given; leave higher out, Scores know their orientation"
        )
    own: Orientation = scores.higher
    return own


def values(scores: Any, name: str = "scores", *, allow_empty: bool = False) -> np.ndarray:
    """Scores as a one-dimensional float32 or float64 array, as they are (no sign change).

    Args:
        scores: numpy array, torch tensor (any device, float16 and bfloat16 included), sequence of
            numbers, or ``Scores``; one number per image.
        name: what error messages call it.
        allow_empty: return an empty array instead of raising.

    Raises:
        TypeError: for booleans (decisions, not scores), complex numbers, text or objects.
        ValueError: for another shape, no scores at all, NaN or infinite scores (with the rows), or
            numbers that float64 cannot hold exactly.
    """
    if is_scores(scores):
        scores = scores.values
    if hasattr(scores, "detach"):
        scores = scores.detach()
        if scores.is_floating_point() and scores.element_size() < 4:
            scores = scores.float()  # numpy knows no bfloat16
        scores = scores.cpu().numpy()
    array = np.asarray(scores)
    if array.ndim != 1:
        raise ValueError(
            f"{name}: expected one number per image, shape (n,), got {array.shape}; "
            f"are these logits or features instead of scores?"
        )
    if array.size == 0:
        if allow_empty:
            return np.empty(0, dtype=np.float64)
        raise ValueError(f"{name}: expected at least one score, got none; is the folder empty?")
    if array.dtype.kind == "b":
        raise TypeError(f"{name}: expected scores, got booleans; are these decisions (is_ood)?")
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    if array.dtype in (np.float32, np.float64):
        converted = array
    elif array.dtype == np.float16:
        converted = array.astype(np.float32)
    else:
        converted = array.astype(np.float64)
        if array.dtype.kind == "f":  # long double
            exact = (converted.astype(array.dtype) == array) | (array != array)
        else:
            exact = np.abs(converted) < 2.0**53
        if not exact.all():
            raise ValueError(
                f"{name}: {array.dtype} values beyond float64 precision at rows "
                f"{_rows(~exact)}; ranking them would create ties"
            )
    finite = np.isfinite(converted)
    if not finite.all():
        raise ValueError(
            f"{name}: {int((~finite).sum())} of {array.size} scores are NaN or infinite, at rows "
            f"{_rows(~finite)}; usual causes: a zero or overflowed feature vector, half precision"
        )
    return converted


def _rows(bad: np.ndarray) -> str:
    rows = np.flatnonzero(bad)
    shown = ", ".join(str(row) for row in rows[:_SHOWN])
    return shown if rows.size <= _SHOWN else f"{shown}, ..."


def key_differences(a: ScoreKey, b: ScoreKey, *, unknown_agrees: bool) -> list[str]:
    """Which parts of two keys disagree, in words; ``a`` is quoted first.

    Args:
        a: one key.
        b: the other.
        unknown_agrees: whether a model or prompt set that only one side knows counts as equal.
    """
    found = []
    if a.score != b.score:
        found.append(f"score {a.score!r} against {b.score!r}")
    options_a, options_b = dict(a.options), dict(b.options)
    for option in sorted(options_a.keys() | options_b.keys()):
        one, other = options_a.get(option, "unset"), options_b.get(option, "unset")
        if one != other:
            found.append(f"option {option} {one!r} against {other!r}")
    for part, one, other in (
        ("model", a.model, b.model),
        ("prompts", a.prompts, b.prompts),
    ):
        if one != other and not (unknown_agrees and (one is None or other is None)):
            found.append(f"{part} {one!r} against {other!r}")
    return found


def read_pair(id_scores: Any, ood_scores: Any, higher: Orientation | None) -> Pair:
    """Both sides of an evaluation, checked to belong together, oriented so that higher = ID.

    Raises:
        TypeError, ValueError: as :func:`values`; ValueError also for conflicting orientations or
            different score keys.
    """
    id_values = values(id_scores, "id_scores")
    ood_values = values(ood_scores, "ood_scores")
    up = orientation(id_scores, higher, "id_scores")
    other = orientation(ood_scores, higher, "ood_scores")
    if up != other:
        raise ValueError(
            f"id_scores and ood_scores disagree on what a higher score means: {up!r} against "
            f"{other!r} (raw arrays are read as higher='id' unless told)"
        )
    id_key, ood_key = key_of(id_scores), key_of(ood_scores)
    if id_key is not None and ood_key is not None:
        found = key_differences(id_key, ood_key, unknown_agrees=True)
        if found:
            raise ValueError(
                f"id_scores and ood_scores are not the same score: {'; '.join(found)}; only "
                f"scores of one method, model and prompt set can be compared"
            )
    if id_values.dtype != ood_values.dtype:  # compare exactly, in the wider type
        id_values, ood_values = id_values.astype(np.float64), ood_values.astype(np.float64)
    return Pair(id_values, ood_values) if up == "id" else Pair(-id_values, -ood_values)


def warn_if_tied(distinct: int, n: int, *, stacklevel: int) -> None:
    """Warn once if the scores are constant or have collapsed onto few values."""
    if distinct == 1 and n > 1:
        message = (
            f"all {n} scores are equal: AUROC is 0.5 and FPR 1 by definition; usual causes: a "
            f"saturated softmax (raise tau), half-precision scores (compute them in float32), or "
            f"one class only"
        )
    elif n >= _DISTINCT_MIN_N and distinct < _DISTINCT_SHARE * n:
        message = (
            f"only {distinct} distinct values among {n} scores: ties blur every metric; usual "
            f"cause: scores kept in half precision, compute and store them in float32"
        )
    else:
        return
    warnings.warn(message, UserWarning, stacklevel=stacklevel + 1)
