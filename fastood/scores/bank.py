"""Per-class work done once: a prepared set of class features, with negatives if there are any."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastood.errors import KernelError
from fastood.kernels.precision import Precision, check_precision
from fastood.ops import fused
from fastood.ops.dispatch import choose, fall_back
from fastood.ops.gpu import kept, kernels
from fastood.scores.inputs import (
    check_count,
    check_features,
    check_tensor,
    check_width,
    matmul_classes,
    unit_rows,
    working,
)

if TYPE_CHECKING:
    from fastood.kernels.grouped import Columns
    from fastood.kernels.operands import Operand

__all__ = ["ClassBank", "Head", "Similarities"]


_PACKED = ("_panels", "_split", "_negative_panels", "_negative_split")


class Similarities(NamedTuple):
    """What every score is computed from, in cosine units."""

    image: Tensor
    """(B, K) image to class."""
    local: Tensor | None = None
    """(B, P, K) patch to class."""
    negatives: Tensor | None = None
    """(B, G, m) image to negative labels, G groups of up to m, padded with ``-inf``."""


@runtime_checkable
class Head(Protocol):
    """Anything that turns features into similarities: a bank of prompts, an adapter, a classifier.

    Detectors, evaluation and report know models through this alone.
    """

    def similarities(self, features: Tensor, local: Tensor | None = None) -> Similarities:
        """Similarities of ``features (B, D)`` and, if given, ``local (B, P, D)``."""
        ...


class ClassBank:
    """Class features normalised, packed, and negatives grouped, once for any number of batches.

    Accepted wherever a score takes ``text``. Being the zero-shot ``Head``, it also is what
    detectors use when nothing has been fine-tuned.

    Args:
        text: (K, D) float class features, any norm.
        negatives: (M, D) float features of negative labels, or None.
        groups: G. Negatives are split into G groups whose sigmoids are averaged (NegLabel: 100).
        seed: seed of the private CPU generator that permutes the negatives before grouping; the
            permutation is drawn once and kept in ``permutation``. None keeps their order.
        remainder: ``"drop"`` leaves out the M mod G last negatives, as the authors' code does;
            ``"spread"`` gives the first M mod G groups one more.
        normalize: False if the rows, and the features to come, already have unit norm (or are
            to be multiplied as they are; on a GPU within float16's range, see ``fastood.scores``).
        impl: who normalises, as for the scores: ``"reference"``, ``"cpu"`` or ``"triton"`` force
            one.

    Attributes:
        text: (K, D), unit rows, float32 (float64 if given so); a copy of what was given.
        negatives: (G, m, D) or None.
        permutation: (M') int64 row numbers of ``negatives`` in group order, or None.
        full_groups: groups of m; the last row of the others is padding.

    Raises:
        ValueError: on K = 0, mismatched D, NaN, Inf or zero rows, G > M.

    Example:
        >>> bank = ClassBank(torch.eye(3))
        >>> bank.similarities(torch.tensor([[0.0, 2.0, 0.0]])).image
        tensor([[0., 1., 0.]])
    """

    def __init__(
        self,
        text: Tensor,
        *,
        negatives: Tensor | None = None,
        groups: int = 100,
        seed: int | None = 0,
        remainder: Literal["drop", "spread"] = "drop",
        normalize: bool = True,
        impl: str | None = None,
    ) -> None:
        self.text = _prepare("text", text, normalize, impl)
        self.normalize = normalize
        self._panels: Tensor | None = None
        self._split: Tensor | None = None
        self._negative_panels: Tensor | None = None
        self._negative_split: Tensor | None = None
        self._kept: dict[str, Any] = {}
        self.negatives: Tensor | None = None
        self.permutation: Tensor | None = None
        self._padding: Tensor | None = None
        self.full_groups = 0
        if negatives is not None:
            rows = _prepare("negatives", negatives, normalize, impl)
            check_width(self.text, rows, ("text", "negatives"))
            index, padding = group_negatives(len(rows), groups, seed=seed, remainder=remainder)
            self.permutation = index[~padding]
            self._padding = padding.to(rows.device) if bool(padding.any()) else None
            self.full_groups = int((~padding).all(dim=1).sum())
            self.negatives = rows[index.to(rows.device)]

    def __len__(self) -> int:
        return self.text.shape[0]

    @property
    def dim(self) -> int:
        return self.text.shape[1]

    @property
    def device(self) -> torch.device:
        return self.text.device

    @property
    def panels(self) -> Tensor:
        """The classes packed for the fused CPU kernels, at first use (as large as ``text``)."""
        if self._panels is None:
            self._panels = _packed(fused.pack_text, "text", self.text)
        return self._panels

    @property
    def score_panels(self) -> Tensor:
        """The classes as scores take them on this machine: ``panels``, or for its matrix unit."""
        if not fused.splits_text():
            return self.panels
        if self._split is None:
            self._split = _packed(fused.score_panels, "text", self.text)
        return self._split

    @property
    def negative_score_panels(self) -> Tensor:
        """The rows of the groups likewise."""
        if not fused.splits_text():
            return self.negative_panels
        if self._negative_split is None:
            rows = self._negative_rows()
            self._negative_split = _packed(fused.score_panels, "negatives", rows)
        return self._negative_split

    @property
    def negative_panels(self) -> Tensor:
        """The (G m, D) rows of the groups packed likewise, padding included."""
        if self._negative_panels is None:
            rows = self._negative_rows()
            self._negative_panels = _packed(fused.pack_text, "negatives", rows)
        return self._negative_panels

    def _negative_rows(self) -> Tensor:
        return self._grouped_negatives().flatten(0, 1)

    def _grouped_negatives(self) -> Tensor:
        if self.negatives is None:
            raise ValueError("negatives: this ClassBank holds none; build it with negatives=...")
        return self.negatives

    def operand(self, precision: Precision) -> Operand:
        """The classes as the GPU kernels multiply them, made at first use for each precision.

        Raises:
            ValueError: on an unknown precision.
            KernelError: if the kernel that casts them does not compile.
        """
        check_precision(precision)

        def make() -> Operand:
            made: Operand = kernels.operands.prepare(self.text, precision, normalize=False)
            return made

        found: Operand = kept(self._kept, f"classes, {precision}", self.device, make)
        return found

    def columns(self, precision: Precision) -> Columns:
        """Classes and negatives likewise, for NegLabel."""
        check_precision(precision)

        def make() -> Columns:
            made: Columns = kernels.grouped.columns(
                self.text, self._grouped_negatives(), self.full_groups, precision
            )
            return made

        found: Columns = kept(self._kept, f"columns, {precision}", self.device, make)
        return found

    @property
    def packed_negatives(self) -> Tensor | None:
        """``negative_panels`` if there already are any."""
        return self._negative_panels

    @property
    def packed(self) -> Tensor | None:
        """``panels`` if there already are any: a compiled graph cannot make them."""
        return self._panels

    def __getstate__(self) -> dict[str, Any]:
        """All but what is packed: that is larger, and of this machine and version."""
        return self.__dict__ | dict.fromkeys(_PACKED) | {"_kept": {}}

    def to(self, *args: Any, **kwargs: Any) -> ClassBank:
        """A bank on another device or in another float dtype; the permutation stays."""
        moved = object.__new__(ClassBank)
        moved.__dict__.update(self.__getstate__())
        moved.text = self.text.to(*args, **kwargs)
        if self.negatives is not None:
            moved.negatives = self.negatives.to(*args, **kwargs)
        if self._padding is not None:
            moved._padding = self._padding.to(moved.text.device)
        return moved

    def as_is(self) -> ClassBank:
        """The same bank, taking features as they come: what ``normalize=False`` means with it."""
        bank = object.__new__(ClassBank)
        bank.__dict__.update(self.__dict__)
        bank.normalize = False
        return bank

    def to_classes(self, features: Tensor) -> Tensor:
        """(B, K): the cosines of ``features (B, D)`` with the classes alone."""
        z = _rows_of("image", features, (2,), "(B, D)", self.text, self.normalize)
        return matmul_classes(z, self.text.to(z.dtype))

    def similarities(self, features: Tensor, local: Tensor | None = None) -> Similarities:
        """Cosines of ``features (B, D)`` and ``local (B, P, D)`` with classes and negatives.

        Raises:
            ValueError: on mismatched D or device, NaN, Inf or zero rows.
        """
        z = _rows_of("image", features, (2,), "(B, D)", self.text, self.normalize)
        sl = None
        if local is not None:
            zl = _rows_of("local", local, (3,), "(B, P, D)", self.text, self.normalize)
            if len(zl) != len(z):
                raise ValueError(f"local: expected patches of {len(z)} images, got {len(zl)}")
            sl = matmul_classes(zl, self.text.to(zl.dtype))
        sn = None
        if self.negatives is not None:
            flat = self.negatives.flatten(0, 1).to(z.dtype)
            sn = matmul_classes(z, flat).unflatten(-1, self.negatives.shape[:2])
            if self._padding is not None:
                sn = sn.masked_fill(self._padding, -math.inf)
        return Similarities(matmul_classes(z, self.text.to(z.dtype)), sl, sn)


def _prepare(name: str, x: Tensor, normalize: bool, impl: str | None) -> Tensor:
    x = check_tensor(name, x, (2,), "(K, D)" if name == "text" else "(M, D)")
    if x.shape[0] == 0:
        raise ValueError(f"{name}: expected at least one row, got {tuple(x.shape)}")
    if normalize and not fused.differentiable(x):
        # in the kernels' own arithmetic: prepared or not, a score is the same
        implementation = choose(impl, x)
        if implementation == "cpu":
            return fused.unit_rows(x, name=name)
        if implementation == "triton":
            check_features(name, x, (2,), "")
            try:
                rows: Tensor = kernels.operands.prepare(x, "fp32", normalize=True).high
                return rows
            except KernelError as error:
                fall_back(error, impl)
    x = working(check_features(name, x, (2,), ""))
    if normalize:
        return unit_rows(x).contiguous()
    # a copy: what is packed once must not change with the caller's tensor
    return x.clone(memory_format=torch.contiguous_format)


def _packed(pack: Callable[..., Tensor], name: str, rows: Tensor) -> Tensor:
    with torch.inference_mode(False):  # kept, and perhaps saved for a backward later on
        return pack(rows, normalize=False, name=name)


def _rows_of(
    name: str, x: Any, dims: tuple[int, ...], shape: str, text: Tensor, normalize: bool
) -> Tensor:
    x = check_features(name, x, dims, shape)
    check_width(x, text, (name, "text"))
    x = working(x)
    return unit_rows(x) if normalize else x


def group_negatives(
    m: int, groups: int, *, seed: int | None, remainder: str
) -> tuple[Tensor, Tensor]:
    """Row numbers ``(G, m')`` of the grouped negatives and which of them are padding."""
    groups = check_count("groups", groups, 1, m, high_name="M = ")
    if remainder not in ("drop", "spread"):
        raise ValueError(f'remainder: expected "drop" or "spread", got {remainder!r}')
    extra = m % groups
    kept = m - extra if remainder == "drop" else m
    if seed is None:
        order = torch.arange(kept)
    else:
        order = torch.randperm(kept, generator=torch.Generator().manual_seed(seed))
    sizes = [kept // groups + (g < kept % groups) for g in range(groups)]
    index = torch.zeros(groups, max(sizes), dtype=torch.int64)
    padding = torch.ones(groups, max(sizes), dtype=torch.bool)
    for g, part in enumerate(order.split(sizes)):
        index[g, : len(part)] = part
        padding[g, : len(part)] = False
    return index, padding
