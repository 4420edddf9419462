"""The objective of candidates, computed from what the model accepted so far makes known.

Exact to rounding, and when each shortcut holds:

    the other tower's features once     while its weights stay; made anew after it accepts a change
    inputs of blocks kept               a candidate in block l starts from that block's input, which
                                        only weights below l decide (``prefix.py``)
    all ratios of a matrix together     what they share (attention below an MLP, the product with
                                        the whole matrix) is run once, nested parts are subtracted
                                        one after the other (``tails.py``)
    no ratio 0                          it is the model as accepted, whose value is known
    last block                          queries, MLP and projection of the class token only; patches
                                        take the value path, which shares its values (``towers``)
    texts                               shared beginnings once, no padding (causal towers)
    images decoded once                 what enters the first block is kept, if memory allows

Chunks of images decide about memory only: means are taken over the batches of the objective.
float32 products are taken in float32, never in TF32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastood.models.base import Encoder
from fastood.models.copies import copy_encoder, network_of
from fastood.models.matrices import Matrix
from fastood.scores.inputs import unit_rows
from fastood.setar.budget import Sizes, notes, share
from fastood.setar.exact import exact
from fastood.setar.lowrank import LowRankBasis, Part
from fastood.setar.objective import Objective, Tally, Value
from fastood.setar.plan import Candidate, Plan
from fastood.setar.prefix import Prefix, bytes_of, default_memory
from fastood.setar.tails import Tails
from fastood.setar.towers.base import ImageTower, Seen, check_precision, image_tower
from fastood.setar.towers.text import TextParts

__all__ = ["Evaluator"]

_CHUNK = {"cpu": 16, "cuda": 128}
"""Images run together."""


class Evaluator:
    """A copy of a model whose matrices are changed one after the other.

    Args:
        encoder: a ViT CLIP or a Swin in float32 or float64; it is copied.
        pixels: positions of some images → (b, 3, H, W).
        labels: (N,) int64.
        prompts: templates x K prompts, empty for a classifier.
        objective: what is computed.
        batches: sizes of the objective's batches, N together.
        plan: what will be visited.
        part, seed: which directions are dropped, see ``low_rank``.
        memory: bytes to keep between candidates; None takes ``default_memory``.
        chunk: images run together; None takes 16 on a CPU, 128 on a GPU.
    Attributes:
        encoder: the model as accepted so far.
        notes: what a user should know of the memory.
    Raises:
        ModelError: towers that cannot be taken apart; a dtype below float32.
    """

    def __init__(
        self,
        encoder: Encoder,
        pixels: Callable[[Tensor], Tensor],
        labels: Tensor,
        prompts: Sequence[Sequence[str]],
        objective: Objective,
        *,
        batches: Sequence[int],
        plan: Plan,
        part: Part = "minor",
        seed: int = 0,
        memory: int | None = None,
        chunk: int | None = None,
    ) -> None:
        check_precision(encoder)
        self.encoder = copy_encoder(encoder)
        self.objective = objective
        self._plan, self._part, self._seed = plan, part, seed
        self._batches, self._labels = tuple(batches), labels.to(self.encoder.device)
        self._pixels = pixels
        device = self.encoder.device
        with exact():  # what is taken apart is compared with the whole
            self._image: ImageTower = image_tower(self.encoder)
            classifier = self._image.head() is not None
            self._text = None if classifier else TextParts(self.encoder, prompts)
        size = chunk if chunk is not None else _CHUNK.get(device.type, 16)
        positions = torch.arange(len(labels))
        self._chunks = positions.split(size)
        self._text_prefix = (
            None if self._text is None else Prefix(self._text, lambda _: self._text_start(), 0)
        )
        self._bank: Tensor | None = None
        self._features: dict[int, Seen] = {}
        self._tails: dict[str, tuple[LowRankBasis, Tails]] = {}
        self._phase: str | None = None
        self._keeps_features = False
        self._first: tuple[int, Tensor] | None = None
        self._budget = default_memory(device) if memory is None else memory
        self._prefix = Prefix(self._image, self._start, 0)
        self._sizes, self._units = self._measure()
        self.notes = list(notes(plan, self._sizes, self._budget))
        for line in self.notes:  # before the work
            warnings.warn(line, RuntimeWarning, stacklevel=2)
        self._arrange(plan.matrices[0].tower)

    # ---------------------------------------------------------------- what the search asks for

    def baseline(self, done: Callable[[float], None] | None = None) -> Value:
        """The objective of the model as accepted."""
        with exact():
            tally, classes = self._tally(), self._classes()
            for c in range(len(self._chunks)):
                self._add(tally, c, self._seen(c), classes)
                _report(done, self.cost_of_baseline / len(self._chunks))
            return tally.value()

    def candidates(
        self, candidates: Sequence[Candidate], done: Callable[[float], None] | None = None
    ) -> list[Value]:
        """The objective of each candidate of one matrix, on top of what is accepted.

        Args:
            candidates: in ascending order of ``count``.
            done: told how much of the work has been done, in units of ``cost``.
        """
        matrix = candidates[0].matrix
        with exact():
            self._arrange(matrix.tower)
            _, tails = self._tails_of(matrix, tuple(c.count for c in candidates))
            tallies = [self._tally() for _ in candidates]
            share = sum(self.cost(c) for c in candidates) / len(self._chunks)
            if matrix.tower == "image":
                classes = self._classes()
                for c in range(len(self._chunks)):
                    for tally, seen in zip(tallies, self._seen_with(matrix, tails, c), strict=True):
                        self._add(tally, c, seen, classes)
                    _report(done, share)
            else:
                # one tensor each for all chunks: packed forms are kept by tensor
                banks = [self._scaled(bank) for bank in self._banks_with(matrix, tails)]
                for c in range(len(self._chunks)):
                    seen = self._seen(c)
                    for tally, bank in zip(tallies, banks, strict=True):
                        self._add(tally, c, seen, (bank, None))
                    _report(done, share)
            return [tally.value() for tally in tallies]

    def cannot_matter(self, matrix: Matrix) -> bool:
        """Whether no candidate of ``matrix`` changes the objective.

        Queries and keys of the last image block reach the class token alone; rounding must not
        make a gain of them.
        """
        last = matrix.tower == "image" and matrix.layer == self._image.depth - 1
        return last and matrix.kind in ("q", "k") and self.objective.of_patches_alone

    def drops_nothing(self, candidate: Candidate) -> bool:
        """Whether the weights stay what they are to rounding, as where a search before this one
        dropped the same directions. Rounding must not make a gain of that either.
        """
        basis, _ = self._tails_of(candidate.matrix, (candidate.count,), known=True)
        return bool(basis.negligible(candidate.count, part=self._part, seed=self._seed))

    def accept(self, candidate: Candidate) -> None:
        """Change the model."""
        matrix = candidate.matrix
        with exact():
            basis, _ = self._tails_of(matrix, (candidate.count,), known=True)
            new = basis.drop(candidate.count, part=self._part, seed=self._seed)
            matrix.write(network_of(self.encoder), new)
        self._tails.pop(matrix.address, None)
        if matrix.tower == "text":
            self._bank = None
            if self._text_prefix is not None and matrix.layer is not None:
                self._text_prefix.changed(matrix.layer)
        else:
            self._features.clear()
            if matrix.layer is not None:
                self._prefix.changed(matrix.layer)

    # ---------------------------------------------------------------- what it costs

    def cost(self, candidate: Candidate) -> float:
        """Of a candidate, in units of a pass of all images through one block."""
        image, text, patches = self._units
        matrix = candidate.matrix
        tower: Any = self._image if matrix.tower == "image" else self._text
        blocks = 1 if matrix.layer is None else tower.depth - matrix.layer
        return patches + (image if matrix.tower == "image" else text) * blocks

    @property
    def cost_of_baseline(self) -> float:
        image, _, patches = self._units
        return image * self._image.depth + patches

    def describe(self) -> dict[str, Any]:
        """What is kept in memory."""
        return {
            "memory": self._budget,
            "every": self._prefix.every,
            "input_bytes": list(self._sizes.inputs),
            "feature_bytes": self._sizes.features,
            "keeps_features": self._keeps_features,
            "text_bytes": list(self._sizes.texts),
            "text_every": 0 if self._text_prefix is None else self._text_prefix.every,
            "chunk": len(self._chunks[0]),
        }

    # ---------------------------------------------------------------- images

    def _start(self, chunk: int) -> Tensor:
        if self._first is not None and self._first[0] == chunk:  # run to measure it
            x, self._first = self._first[1], None
            return x
        pixels = self._pixels(self._chunks[chunk]).to(self.encoder.device, self.encoder.dtype)
        return self._image.start(pixels)

    def _seen(self, chunk: int) -> Seen:
        """Features of a chunk by the accepted model, unit rows for a CLIP."""
        found = self._features.get(chunk)
        if found is None:
            found = self._unit(self._image.seen(self._prefix.input(self._image.depth - 1, chunk)))
            if self._keeps_features:
                self._features[chunk] = found
        return found

    def _seen_with(self, matrix: Matrix, tails: Tails, chunk: int) -> Iterator[Seen]:
        """The same with each candidate."""
        tower, last = self._image, self._image.depth - 1
        layer = last if matrix.layer is None else matrix.layer
        x = self._prefix.input(layer, chunk)
        if layer == last:
            yield from map(self._unit, tower.seen_variants(matrix, tails, x))
            return
        for y in tower.variants(matrix, tails, x):
            for i in range(layer + 1, last):
                y = tower.block(i, y)
            yield self._unit(tower.seen(y))

    def _unit(self, seen: Seen) -> Seen:
        if self._text is None:
            return seen
        return Seen(unit_rows(seen.image), unit_rows(seen.local))

    # ---------------------------------------------------------------- classes

    def _classes(self) -> tuple[Tensor, Tensor | None]:
        """Weight (K, D) and bias of the logits by the accepted model."""
        head = self._image.head()
        if head is not None:
            return head
        if self._bank is None:
            assert self._text is not None and self._text_prefix is not None
            self._bank = self._text.features(self._text_prefix.input(self._text.depth - 1, 0))
        return self._scaled(self._bank), None

    def _banks_with(self, matrix: Matrix, tails: Tails) -> Iterator[Tensor]:
        text = self._text
        assert text is not None and self._text_prefix is not None
        last = text.depth - 1
        layer = last if matrix.layer is None else matrix.layer
        state = self._text_prefix.input(layer, 0)
        if layer == last:
            yield from text.feature_variants(matrix, tails, state)
            return
        for changed in text.variants(matrix, tails, state):
            for i in range(layer + 1, last):
                changed = text.block(i, changed)
            yield text.features(changed)

    def _scaled(self, bank: Tensor) -> Tensor:
        return bank * self.encoder.logit_scale

    def _text_start(self) -> Any:
        assert self._text is not None
        return self._text.start()

    # ---------------------------------------------------------------- objective

    def _tally(self) -> Tally:
        return self.objective.tally(self._labels, self._batches)

    def _add(
        self, tally: Tally, chunk: int, seen: Seen, classes: tuple[Tensor, Tensor | None]
    ) -> None:
        weight, bias = classes
        logits = torch.nn.functional.linear(seen.image, weight, bias)
        tally.add(int(self._chunks[chunk][0]), logits, seen.local, weight, bias)

    # ---------------------------------------------------------------- matrices and memory

    def _tails_of(
        self, matrix: Matrix, counts: tuple[int, ...], *, known: bool = False
    ) -> tuple[LowRankBasis, Tails]:
        """Of the original weights: a matrix is changed once at most."""
        found = self._tails.get(matrix.address)
        if found is not None and (known or found[1].counts == counts):
            return found
        if not self._plan.revisits:
            self._tails.clear()
        basis = LowRankBasis(matrix.weight(network_of(self.encoder)))
        make = partial(Tails.of, basis, counts, part=self._part, seed=self._seed)
        tails = make(dtype=self.encoder.dtype, device=self.encoder.device)
        self._tails[matrix.address] = basis, tails
        return basis, tails

    def _measure(self) -> tuple[Sizes, tuple[float, float, float]]:
        """Bytes of what may be kept; cost of an image block, a text block and the patch logits."""
        with exact():
            x = self._start(0)
            self._first = (0, x)
            n, size = len(self._labels), x.element_size()
            y, inputs = x[:1], [x[:1].numel()]
            for i in range(self._image.depth - 1):  # of a Swin they shrink
                y = self._image.block(i, y)
                inputs.append(y.numel())
            k, d = self._classes()[0].shape
            patches = self._image.seen(y).local.shape[1]
            of_block = inputs[0] * x.shape[-1]  # a twelfth of the multiply-adds of an image
            texts: tuple[int, ...] = ()
            if self._text is not None:
                texts = (bytes_of(self._text_start()),) * self._text.depth
            text = texts[0] / size * d / (n * of_block) if texts else 0.0
            sizes = Sizes(
                tuple(n * one * size for one in inputs), n * (patches + 1) * d * size, texts
            )
            return sizes, (1.0, text, patches * k * d / 12 / of_block)

    def _arrange(self, tower: str) -> None:
        """Give the memory to what the coming visits need."""
        if self._phase == tower or (self._plan.mixed and self._phase is not None):
            return
        before, self._phase = self._phase, tower
        kept = share(self._plan, tower, self._sizes, self._budget)
        self._keeps_features = kept.features
        if before == "image" and kept.features:  # from what is kept of the images
            for c in range(len(self._chunks)):
                self._seen(c)
                self._prefix.drop(c)
        if not kept.features:
            self._features.clear()
        self._prefix.space(kept.every)
        if self._text_prefix is not None:
            self._text_prefix.space(kept.texts)


def _report(done: Callable[[float], None] | None, units: float) -> None:
    if done is not None:
        done(units)
