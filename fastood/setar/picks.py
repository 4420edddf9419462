"""One pick of a search: which matrix loses how many singular directions; and the authors' names.

Theirs are ``["visual", "W_up", 11, 0.15]``: tower, weight, layer (Swin: ``[stage, block]``), and a
share of the directions, or their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from fastood.models.matrices import KINDS, Matrix
from fastood.setar.lowrank import count_of
from fastood.setar.plan import kinds_of

__all__ = ["Layer", "Pick", "as_pick"]

Layer = int | tuple[int, int] | None

_TOWERS = {"image": "visual", "text": "text"}
_WEIGHTS = {
    "q": "W_q", "k": "W_k", "v": "W_v", "o": "W_o", "up": "W_up", "down": "W_down", "proj": "W_p",
}  # fmt: skip


@dataclass(frozen=True)
class Pick:
    """What one matrix loses.

    Attributes:
        tower: ``"image"`` or ``"text"``.
        kind: of ``fastood.models.matrices.KINDS``.
        layer: number of the block, counted from the input; ``(stage, block)`` of a Swin; None for
            ``"proj"``.
        ratio: a float in [0, 1) is a share of min(m, n), an integer a number; 0 changes nothing.
        count: directions dropped; None as long as no model was there to count them.
        objective: best value of the search behind this pick; None where that is not known.
    Raises:
        ValueError: names, layers and numbers that do not exist.
    """

    tower: str
    kind: str
    layer: Layer
    ratio: float
    count: int | None = None
    objective: float | None = None

    def __post_init__(self) -> None:
        if self.tower not in _TOWERS:
            raise ValueError(f"tower: expected one of {', '.join(_TOWERS)}, got {self.tower!r}")
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        object.__setattr__(self, "layer", _layer(self.layer, self.kind))
        object.__setattr__(self, "ratio", _ratio(self.ratio))
        if self.count is not None and (not _whole(self.count) or self.count < 0):
            raise ValueError(f"count: expected a number of directions, got {self.count!r}")
        value = self.objective
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value)
        ):
            raise ValueError(f"objective: expected a finite number or none, got {value!r}")

    @property
    def address(self) -> str:
        """``image.11.up`` as of a ``Matrix``; ``image.2.17.up`` is block 17 of stage 2."""
        layer = self.layer
        if isinstance(layer, tuple):
            middle = f".{layer[0]}.{layer[1]}"
        else:
            middle = "" if layer is None else f".{layer}"
        return f"{self.tower}{middle}.{self.kind}"

    def counted(self, matrix: Matrix) -> Pick:
        """With the number of directions that ``ratio`` means for ``matrix``.

        Raises:
            ValueError: a number above min(m, n); ``count`` is another one already.
        """
        m, n = matrix.shape
        try:
            count = count_of(self.ratio, min(m, n))
        except ValueError as error:
            raise ValueError(f"{self.address} ({m}, {n}): {error}") from error
        if self.count is not None and self.count != count:
            raise ValueError(
                f"{self.address} ({m}, {n}): a ratio of {self.ratio} means {count} directions, the "
                f"recipe says {self.count}; was one of them edited?"
            )
        return replace(self, count=count)

    def lora_setting(self, stages: Sequence[int] | None = None) -> list[Any]:
        """As the authors write it.

        Args:
            stages: blocks of each stage of a Swin.
        """
        layer: Any = self.layer
        if stages and layer is None:
            layer = [None, None]
        elif stages and not isinstance(layer, tuple):
            layer = list(stage_and_block(layer, stages))
        elif isinstance(layer, tuple):
            layer = list(layer)
        return [_TOWERS[self.tower], _WEIGHTS[self.kind], layer, self.ratio]


def stage_and_block(layer: int, stages: Sequence[int]) -> tuple[int, int]:
    """Stage and block within it of block ``layer``, counted through all stages.

    Raises:
        ValueError: beyond the last block.
    """
    block = layer
    for stage, depth in enumerate(stages):
        if block < depth:
            return stage, block
        block -= depth
    raise ValueError(f"layer: expected one of the {sum(stages)} blocks, got {layer}")


def as_pick(given: Any) -> Pick:
    """``[tower, kind, layer, ratio]`` in our names or the authors', or the fields of a ``Pick``.

    Raises:
        ValueError: what is none of them.
    """
    if isinstance(given, Pick):
        return given
    if isinstance(given, Mapping):
        fields = ("tower", "kind", "layer", "ratio", "count", "objective")
        unknown = [str(name) for name in given if name not in fields]
        missing = [name for name in fields[:4] if name not in given]
        if unknown or missing:
            raise ValueError(
                f"picks: expected {', '.join(fields)}, got one "
                f"{'with ' + ', '.join(unknown) if unknown else 'without ' + ', '.join(missing)}"
            )
        return Pick(**given)
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 4:
        raise ValueError(f"picks: expected [tower, weight, layer, ratio], got {given!r}")
    tower, kind, layer, ratio = given
    towers = {theirs: ours for ours, theirs in _TOWERS.items()}
    if isinstance(tower, str):
        tower = towers.get(tower, tower)
    if isinstance(kind, str):
        (kind,) = kinds_of(kind)
    return Pick(tower, kind, layer, ratio)


def _layer(layer: Any, kind: str) -> Layer:
    several = not isinstance(layer, str) and isinstance(layer, Sequence)
    if kind == "proj":
        if layer is None or (several and list(layer) == [None, None]):
            return None
        raise ValueError(f"layer: a projection has none, got {layer!r}")
    if _whole(layer) and layer >= 0:
        return int(layer)
    if several and len(layer) == 2 and all(_whole(n) and n >= 0 for n in layer):
        return int(layer[0]), int(layer[1])
    raise ValueError(
        f"layer: expected the number of a block, or [stage, block] of a Swin, got {layer!r}"
    )


def _ratio(ratio: Any) -> float:
    """An int stays an int: it is a number of directions."""
    count_of(ratio, 2**63)  # whatever the matrix, these are refused
    return int(ratio) if isinstance(ratio, Integral) else float(ratio)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
