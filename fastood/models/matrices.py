"""Where a CLIP keeps each of its weight matrices.

A matrix is named by tower, layer and kind, whatever library built the model:

    q k v o      attention: queries, keys, values, output
    up down      the two of the MLP (``fc1``/``c_fc`` and ``fc2``/``c_proj``)
    proj         the tower's projection into the joint space (no layer)

and lives in a parameter of some module: all of it, or some of its rows (open_clip and timm keep q,
k and v in one parameter), or transposed (open_clip's projections are multiplied from the right).

A Swin Transformer has its blocks in stages. Layers count through them from the input: with depths
2, 2, 6, 2 the first block of the third stage is layer 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastood.errors import ModelError

__all__ = ["KINDS", "Kind", "Matrix", "find", "list_matrices", "swin_layers"]

Kind = Literal["q", "k", "v", "o", "up", "down", "proj"]
Tower = Literal["image", "text"]

KINDS: tuple[Kind, ...] = get_args(Kind)

_BLOCKS = {
    "image": (
        "visual.transformer.resblocks",
        "visual.trunk.blocks",
        "vision_model.encoder.layers",
        "vision_model.vision_model.encoder.layers",
    ),
    "text": (
        "transformer.resblocks",
        "text.transformer.resblocks",
        "text_model.encoder.layers",
        "text_model.text_model.encoder.layers",
    ),
}

# of Swin classifiers: stages, each with blocks of its own; timm, then Hugging Face
_STAGES = ("layers", "swin.encoder.layers", "swinv2.encoder.layers")

_PROJECTIONS = {
    "image": ("visual.proj", "visual_projection.weight"),
    "text": (
        "text_projection",
        "text.text_projection",
        "text_projection.weight",
        "text.text_projection.weight",
        "text_model.head.weight",
    ),
}

_KINDS: dict[Kind, tuple[str, ...]] = {
    "q": ("self_attn.q_proj.weight", "attention.self.query.weight", "attention.q_proj.weight"),
    "k": ("self_attn.k_proj.weight", "attention.self.key.weight", "attention.k_proj.weight"),
    "v": ("self_attn.v_proj.weight", "attention.self.value.weight", "attention.v_proj.weight"),
    "o": (
        "attn.out_proj.weight",
        "self_attn.out_proj.weight",
        "attn.proj.weight",
        "attention.output.dense.weight",
        "attention.o_proj.weight",
    ),
    "up": ("mlp.c_fc.weight", "mlp.fc1.weight", "intermediate.dense.weight"),
    "down": ("mlp.c_proj.weight", "mlp.fc2.weight", "output.dense.weight"),
}

_STACKED = ("attn.in_proj_weight", "attn.qkv.weight")


@dataclass(frozen=True)
class Matrix:
    """One weight matrix W (out, in), y = W x, and where it is kept.

    Attributes:
        tower, layer, kind: its name; ``layer`` counts from the input, None for projections.
        module: dotted path of the module that owns the parameter; ``""`` is the model itself.
        parameter: name of the parameter there.
        rows: of the parameter that are this matrix, or None for all.
        transposed: the parameter is Wᵀ.
        shape: (out, in).
    """

    tower: Tower
    layer: int | None
    kind: Kind
    module: str
    parameter: str
    rows: tuple[int, int] | None
    transposed: bool
    shape: tuple[int, int]

    @property
    def address(self) -> str:
        """``image.3.up``, ``text.proj``."""
        middle = "" if self.layer is None else f".{self.layer}"
        return f"{self.tower}{middle}.{self.kind}"

    @property
    def key(self) -> str:
        """Of the parameter in a state dict."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    def weight(self, model: nn.Module) -> Tensor:
        """(out, in) as it is in ``model`` now: a view of the parameter."""
        return self.of(getattr(model.get_submodule(self.module), self.parameter))

    def stored(self, model: nn.Module) -> nn.Parameter:
        """The parameter it is kept in, for whoever changes the matrix.

        Raises:
            ModelError: if the weight is computed from other parameters at every call (a
                parametrisation), so that what is written to it would be lost.
        """
        found = model.get_submodule(self.module)._parameters.get(self.parameter)
        if not isinstance(found, nn.Parameter):
            raise ModelError(
                f"{self.address}: {self.key} of {type(model).__name__} is computed from other "
                "parameters, so it cannot be changed; merge or remove the parametrisation first"
            )
        return found

    def write(self, model: nn.Module, weight: Tensor) -> None:
        """Put ``weight`` (out, in) in its place.

        Raises:
            ModelError: as ``stored``.
        """
        with torch.no_grad():
            self.of(self.stored(model)).copy_(weight)

    def of(self, parameter: Tensor) -> Tensor:
        """(out, in) part of a parameter laid out as this one's."""
        if self.rows is not None:
            parameter = parameter[slice(*self.rows)]
        return parameter.mT if self.transposed else parameter


def list_matrices(model: nn.Module) -> tuple[Matrix, ...]:
    """Every addressable matrix: image tower first, layers from the input, kinds as in ``KINDS``.

    Reads open_clip's ViTs (also through timm) and text transformers, Hugging Face's CLIP and
    SigLIP, and the Swin classifiers of timm and Hugging Face, which only have an image tower.
    Towers it does not know (ResNets, a Swin within a CLIP) have none.
    """
    return tuple(_walk(model))


def swin_layers(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """(stage, block) of every layer of a Swin classifier, in the order of ``Matrix.layer``.

    The authors of SeTAR name a layer by its stage and its number there. Models without stages have
    none: ``()``.
    """
    return tuple((stage, block) for stage, block, _ in _staged(model))


def find(
    model: nn.Module,
    *,
    towers: Iterable[Tower] | str = ("image", "text"),
    kinds: Iterable[Kind] | str = KINDS,
    layers: Iterable[int] | None = None,
) -> tuple[Matrix, ...]:
    """The matrices of some towers, kinds and layers.

    Args:
        towers: ``"image"``, ``"text"`` or both.
        kinds: of ``KINDS``.
        layers: numbers; negative ones count from the last layer of each tower. None takes all.
            Projections have no layer: they come whenever their kind is asked for.
    Raises:
        ValueError: unknown towers, kinds or layers.
        ModelError: if a tower has no such matrix; lists what it has.
    """
    wanted_towers = _chosen("towers", towers, ("image", "text"))
    wanted = _chosen("kinds", kinds, KINDS)
    everything = list_matrices(model)
    found: list[Matrix] = []
    for tower in wanted_towers:
        own = [m for m in everything if m.tower == tower]
        present = [k for k in KINDS if any(m.kind == k for m in own)]
        missing = [k for k in wanted if k not in present]
        if missing:
            if present:
                has = f"it has {', '.join(present)}"
            else:
                has = f"only transformers' matrices can be addressed; leave towers={tower!r} out"
            raise ModelError(
                f"the {tower} tower of {type(model).__name__} has no {', '.join(missing)}; {has}"
            )
        depth = 1 + max((m.layer for m in own if m.layer is not None), default=-1)
        chosen = None if layers is None else _layers(layers, tower, depth)
        found += [
            m
            for m in own
            if m.kind in wanted and (m.layer is None or chosen is None or m.layer in chosen)
        ]
    if not found:
        raise ValueError("layers: expected at least one, got none")
    return tuple(found)


def _chosen(name: str, given: Iterable[str] | str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    given = (given,) if isinstance(given, str) else tuple(given)
    unknown = [g for g in given if g not in allowed]
    if unknown or not given:
        raise ValueError(
            f"{name}: expected some of {', '.join(allowed)}, got "
            f"{', '.join(map(repr, unknown)) if unknown else 'none'}"
        )
    return given


def _layers(layers: Iterable[int], tower: str, depth: int) -> set[int]:
    found = set()
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -depth <= layer < depth:
            raise ValueError(
                f"layers: expected numbers in {-depth}..{depth - 1} for the {depth} layers of the "
                f"{tower} tower, got {layer!r}"
            )
        found.add(layer % depth)
    return found


def _walk(model: nn.Module) -> Iterator[Matrix]:
    tower: Tower
    for tower in ("image", "text"):
        for path in _BLOCKS[tower]:
            blocks: Any = _at(model, path)
            if not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
                continue
            for layer in range(len(blocks)):
                yield from _of_block(model, tower, layer, f"{path}.{layer}")
            break
        if tower == "image":
            for layer, (_, _, path) in enumerate(_staged(model)):
                yield from _of_block(model, tower, layer, path)
        for path in _PROJECTIONS[tower]:
            weight = _at(model, path)
            if isinstance(weight, Tensor) and weight.ndim == 2:
                bare = not path.endswith(".weight")
                yield _matrix(tower, None, "proj", path, weight, None, transposed=bare)
                break


def _staged(model: nn.Module) -> Iterator[tuple[int, int, str]]:
    """Stage, number in it and path of each block of a Swin classifier, from the input."""
    for path in _STAGES:
        stages: Any = _at(model, path)
        if not isinstance(stages, (nn.ModuleList, nn.Sequential)):
            continue
        blocks = [getattr(stage, "blocks", None) for stage in stages]
        if not all(isinstance(b, (nn.ModuleList, nn.Sequential)) for b in blocks):
            continue
        for stage, own in enumerate(blocks):
            for block in range(len(own)):  # type: ignore[arg-type]
                yield stage, block, f"{path}.{stage}.blocks.{block}"
        return


def _of_block(model: nn.Module, tower: Tower, layer: int, prefix: str) -> Iterator[Matrix]:
    for kind in KINDS[:-1]:
        for name in _KINDS[kind]:
            weight = _at(model, f"{prefix}.{name}")
            if isinstance(weight, Tensor) and weight.ndim == 2:
                yield _matrix(tower, layer, kind, f"{prefix}.{name}", weight, None)
                break
        if kind not in ("q", "k", "v"):
            continue
        for name in _STACKED:
            weight = _at(model, f"{prefix}.{name}")
            if isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) % 3 == 0:
                third = len(weight) // 3
                first = "qkv".index(kind) * third
                path = f"{prefix}.{name}"
                yield _matrix(tower, layer, kind, path, weight, (first, first + third))
                break


def _matrix(
    tower: Tower,
    layer: int | None,
    kind: Kind,
    path: str,
    weight: Tensor,
    rows: tuple[int, int] | None,
    *,
    transposed: bool = False,
) -> Matrix:
    module, _, parameter = path.rpartition(".")
    out, width = weight.shape
    if rows is not None:
        out = rows[1] - rows[0]
    shape = (width, out) if transposed else (out, width)
    return Matrix(tower, layer, kind, module, parameter, rows, transposed, shape)


def _at(model: nn.Module, path: str) -> Any:
    found: Any = model
    for name in path.split("."):
        if isinstance(found, (nn.ModuleList, nn.Sequential)) and name.isdigit():
            found = found[int(name)]
            continue
        found = getattr(found, name, None)
        if found is None:
            return None
    return found
