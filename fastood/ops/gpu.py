"""Calls to the GPU kernels, which are imported by the first of them, and what is kept for them.

In eager mode without gradients scores call the launchers through here; the operators do otherwise.
Sizes a kernel does not take go to plain torch in row blocks: more than ``MOST_TOPS`` values of a
row are found by sorting it.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastood.errors import KernelError
from fastood.kernels.precision import Precision, resolve
from fastood.ops.dispatch import fall_back
from fastood.ops.requests import MAX_TAUS, Request, passes

if TYPE_CHECKING:
    from fastood.kernels.operands import Operand

__all__ = [
    "MOST_TOPS",
    "Halves",
    "attempt",
    "feature_scores",
    "fused_pays",
    "halves",
    "kept",
    "kernels",
    "local_scores",
    "local_similarity_scores",
    "product",
    "similarity_scores",
    "within",
]

MOST_TOPS = 8
"""Largest values the kernels hold of a row."""


class _Kernels:
    """``kernels.rows`` is the module ``fastood.kernels.rows``, imported when it is first asked."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for by inspect, copy, doctest: nothing is imported for it
            raise AttributeError(name)
        module = importlib.import_module(f"fastood.kernels.{name}")
        setattr(self, name, module)
        return module


kernels = _Kernels()


def feature_scores(
    requests: tuple[Request, ...],
    image: Tensor,
    text: Operand,
    *,
    normalize: bool,
    classes: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(R, B) scores of ``image (B, D)`` against prepared classes; (B,) nearest classes if asked."""

    def one_pass(some: tuple[Request, ...]) -> tuple[Tensor, Tensor | None]:
        found: tuple[Tensor, Tensor | None] = kernels.rows.scores(
            some, image.detach(), text, normalize=normalize, classes=classes
        )
        return found

    return _in_passes(requests, one_pass)


def similarity_scores(
    requests: tuple[Request, ...],
    similarity: Tensor,
    *,
    classes: bool = False,
    engine: str = "triton",
) -> tuple[Tensor, Tensor | None]:
    """(R, B) scores of given similarities (B, K), and (B,) classes of the largest if asked."""

    def one_pass(some: tuple[Request, ...]) -> tuple[Tensor, Tensor | None]:
        if engine == "cuda":
            call = importlib.import_module("fastood.ops.cuda").similarity_scores  # imports rows
        else:
            call = kernels.rows.similarity_scores
        found: tuple[Tensor, Tensor | None] = call(some, similarity.detach(), classes=classes)
        return found

    return _in_passes(requests, one_pass)


def local_scores(
    taus: tuple[float, ...], local: Tensor, text: Operand, *, normalize: bool
) -> Tensor:
    """(T, B) largest softmax probability of any patch of ``local (B, P, D)``."""
    found: Tensor = kernels.patches.local_scores(taus, local.detach(), text, normalize=normalize)
    return found


def local_similarity_scores(taus: tuple[float, ...], similarity: Tensor) -> Tensor:
    """The same of given similarities (B, P, K)."""
    found: Tensor = kernels.patches.local_similarity_scores(taus, similarity.detach())
    return found


def _in_passes(
    requests: tuple[Request, ...],
    one_pass: Callable[[tuple[Request, ...]], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    if len({r.tau for r in requests}) <= MAX_TAUS:
        return one_pass(requests)
    parts = passes(requests, MOST_TOPS)
    found = [one_pass(tuple(requests[i] for i in of)) for of in parts]
    order = sorted((i, row) for row, i in enumerate(i for of in parts for i in of))
    values = torch.cat([values for values, _ in found])
    return torch.stack([values[row] for _, row in order]), found[0][1]


# ------------------------------------------------------------------------------ library


class Halves(NamedTuple):
    """Rows as the library multiplies them."""

    high: Tensor
    low: Tensor | None


def halves(rows: Tensor, precision: Precision) -> Halves:
    """float32 ``rows`` (of moderate size: unit rows) for products in ``precision``."""
    if precision == "bf16":
        return Halves(rows.bfloat16(), None)
    if precision == "tf32":
        # to nearest even; as float32, which holds their products without further rounding
        bits = rows.view(torch.int32)
        bits = (bits + 0xFFF + ((bits >> 13) & 1)) & -8192
        return Halves(torch.where(rows.isfinite(), bits.view(torch.float32), rows), None)
    if precision == "fp32":
        return Halves(rows, None)
    high = rows.half()
    return Halves(high, ((rows - high) * 2048).half() if precision == "fp16x3" else None)


def product(a: Halves, b: Halves) -> Tensor:
    """(B, K) float32 products of rows with rows, by the library."""
    with torch.autocast(a.high.device.type, enabled=False):
        s = _product(a.high, b.high)
        if a.low is not None and b.low is not None:
            rest = _product(a.high, b.low) + _product(a.low, b.high)
            s = s.add_(rest, alpha=1 / 2048)
        return s


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype != torch.float32 and a.is_cuda and _has_out_dtype():
        return torch.mm(a, b.mT, out_dtype=torch.float32)  # a half result would round again
    return a.float() @ b.float().mT


@cache
def _has_out_dtype() -> bool:
    return "dtype" in torch.ops.aten.mm.overloads()


# ------------------------------------------------------------------------------ crossover

_TABLE = Path(__file__).parents[1] / "kernels" / "crossover.json"


class _Range(NamedTuple):
    """Shapes for which the library's product and a kernel over rows were faster."""

    family: str
    precision: str
    b: tuple[float, float]
    k: tuple[float, float]
    d: tuple[float, float]

    def holds(self, family: str, precision: str, *sizes: int) -> bool:
        return (self.family, self.precision) == (family, precision) and all(
            low <= n <= high for n, (low, high) in zip(sizes, self[2:], strict=True)
        )


@cache
def _library_is_faster() -> tuple[_Range, ...]:
    def bounds(found: list[int | None] | None) -> tuple[float, float]:
        low, high = found or (None, None)
        return (0 if low is None else low, float("inf") if high is None else high)

    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    return tuple(
        _Range(e["family"], e["precision"], *(bounds(e.get(size)) for size in "BKD"))
        for e in table["library"]
    )


def fused_pays(family: str, precision: Precision, b: int, k: int, d: int) -> bool:
    """Whether the fused kernel is the faster one for these sizes: yes, where nobody measured."""
    return not any(r.holds(family, precision, b, k, d) for r in _library_is_faster())


# ------------------------------------------------------------------------------ what is kept


class _Kept(NamedTuple):
    value: Any
    stream: int
    ready: torch.cuda.Event | None


def kept(store: dict[str, _Kept], key: str, device: torch.device, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, made once for ``store``, on whichever stream it is asked for.

    Another stream waits for the one that made it. While a graph is captured nothing is added: what
    a graph makes exists once it is replayed, and at every replay.
    """
    found = store.get(key)
    on_gpu = device.type == "cuda"
    stream = torch._C._cuda_getCurrentRawStream(device.index) if on_gpu else 0
    if found is None:
        with torch.inference_mode(False):  # perhaps saved for a backward later on
            value = make()
        ready = None
        if on_gpu:
            if _capturing():
                return value
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(device))
        store[key] = _Kept(value, stream, ready)
        return value
    if found.ready is not None and found.stream != stream and not _capturing():
        here = torch.cuda.current_stream(device)
        here.wait_event(found.ready)
        for x in _tensors(found.value):  # freed, its memory may not be given away before it is read
            x.record_stream(here)
    return found.value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


# ------------------------------------------------------------------------------ operators


def attempt(
    kernel: Callable[[Precision], tuple[Tensor, ...]],
    default: Callable[[], tuple[Tensor, ...]],
    *features: Tensor,
    precision: str = "",
) -> tuple[Tensor, ...]:
    """An operator on CUDA tensors: by ``kernel`` in the precision that is meant for ``features``.

    What kernels cannot compute (float64, an old GPU) ``default`` does. So it does if the kernel
    does not compile, unless the precision has a name: those who demand a kernel name one.
    """
    if kernels.launch.usable(*features) is not None:
        return default()
    try:
        return kernel(resolve(precision or None, *features))
    except KernelError as error:
        if precision:
            raise
        fall_back(error)
        return default()


def within(labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Labels forced into 0..K-1, and 1.0 if all of them were, else NaN: a factor for the loss.

    Reading the labels to complain would wait for the GPU; indexing with them could end the process.
    """
    inside = labels.clamp(0, k - 1)
    return inside, torch.where((inside == labels).all(), 1.0, math.nan)
