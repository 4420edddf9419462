"""Fixed class prompts through CLIP's causal text tower, block by block, nothing computed twice.

Prompts that begin alike share the tokens they begin with (their keys and values are the same), and
none is run behind its end of text. All tokens that are left lie in one row of packed tokens: what
happens to each token alone is done for all at once, attention goes by groups of prompts. In the
last block only the ends of text ask, as their features alone are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastood.errors import ModelError
from fastood.models.base import Encoder
from fastood.models.blocks import layer_norm, linear
from fastood.models.matrices import Matrix
from fastood.prompts.attention import attend, attend_last, causal
from fastood.prompts.forest import common_beginnings
from fastood.prompts.layout import fixed
from fastood.prompts.packing import Packing, pack, shared_length
from fastood.prompts.tower import text_tower
from fastood.setar.tails import Tails
from fastood.setar.towers.base import check_matrix, check_precision, compare
from fastood.setar.towers.steps import Attention, Heads, step, steps

__all__ = ["State", "TextParts"]


State = Tensor
"""What enters a block: all packed tokens (1, N, W)."""


class TextParts:
    """Text features of K classes, from one or several prompts for each.

    T_k = unit(mean over templates of unit(text(prompt))), as everywhere in fastood

    Weights are read from the modules at every call. Nothing is differentiated. A state holds the
    distinct tokens that are left, which a search over images and texts can keep for every block:
    1000 classes of one template are about 5000 tokens, 10 MB at width 512.

    Args:
        encoder: an encoder with a causal text tower whose blocks are known.
        prompts: templates x K texts, filled in.
    Attributes:
        depth: L, its number of blocks.
        tokens: N, what is run of all prompts.

    Raises:
        ValueError: if there are no prompts, or templates of unequal numbers of classes.
        ModelError: for other towers, half precision, or if the parts do not give the model's own
            features; with the reason.
    """

    def __init__(self, encoder: Encoder, prompts: Sequence[Sequence[str]]) -> None:
        sizes = sorted({len(row) for row in prompts})
        if len(sizes) != 1 or sizes[0] < 1 or any(isinstance(row, str) for row in prompts):
            raise ValueError(
                f"prompts: expected a list for each template, each with a text for each class, got "
                f"lists of {sizes or 'no'} texts"
            )
        check_precision(encoder)
        model = encoder.text_module()
        tower = "it has none" if model is None else text_tower(model)
        texts = [text for row in prompts for text in row]
        tokens = encoder.tokenize(texts)
        if isinstance(tower, str) or tokens is None:
            raise ModelError(f"{encoder.name}: the text tower cannot be taken apart: {tower}")
        self.name, self._tower, self._templates = encoder.name, tower, len(prompts)
        self.depth = len(tower.blocks)
        tokens = tokens.cpu().long()
        ends = tower.ends(tokens.to(tower.device)).cpu()
        extremes = torch.stack([ends.argmin(), ends.argmax()])
        self._check(encoder, tokens[extremes], ends[extremes])
        self._lay_out(tokens, ends)

    def _lay_out(self, tokens: Tensor, ends: Tensor) -> None:
        rows = zip(tokens.tolist(), ends.tolist(), strict=True)
        prompts = [tuple(row[: end + 1]) for row, end in rows]
        index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        first = {prompt: i for i, prompt in reversed(list(enumerate(prompts)))}
        distinct = torch.tensor([first[p] for p in index])
        tokens, ends = tokens[distinct], ends[distinct]
        groups = common_beginnings(list(index))
        layouts = [fixed(tokens[some], ends[some]) for some in groups]
        trees = [pack(layout, shared_length(layout)) for layout in layouts]

        self._sizes = [t.prefix for t in trees] + [len(t.ids) for t in trees]
        starts = torch.tensor([0, *self._sizes]).cumsum(0)[len(trees) : -1].tolist()
        ids = torch.cat([t.prefix_ids for t in trees] + [t.ids for t in trees])
        at = torch.cat([torch.arange(t.prefix) for t in trees] + [t.positions for t in trees])
        last = torch.cat([t.ends + start for t, start in zip(trees, starts, strict=True)])
        whose = [rows[i] for rows, t in zip(groups, trees, strict=True) for i in t.rows.tolist()]
        back = torch.tensor(whose).argsort()[torch.tensor([index[p] for p in prompts])]

        device = self._tower.device
        self._trees: list[Packing] = trees
        self.tokens = len(ids)
        self._ids, self._at, self._back = (x.to(device) for x in (ids, at, back))
        ends = last.to(device)
        self._every = Attention(self._attend)
        self._ends = Attention(
            self._attend_last, lambda x: x.index_select(1, ends), lambda x: x.index_select(1, ends)
        )

    @torch.no_grad()
    def start(self) -> State:
        """What enters block 0."""
        tower = self._tower
        positions = tower.positions().index_select(0, self._at)
        return (tower.vectors(self._ids) + positions)[None].to(tower.dtype)

    def block(self, index: int, state: State) -> State:
        """What enters block index + 1, 0 <= index < L - 1; ``state`` is left as it is."""
        return step(self._tower.blocks[:-1][index], state, self._every)

    def variants(self, matrix: Matrix, tails: Tails, state: State) -> Iterator[State]:
        """What enters block i + 1, with each candidate's weight for a matrix of block i < L - 1.

        In the order of ``tails.counts``. A state is valid until the next one is asked for.
        """
        check_matrix(matrix, "text", range(self.depth - 1))
        assert matrix.layer is not None
        block = self._tower.blocks[matrix.layer]
        return steps(block, matrix.kind, tails, state, self._every)

    @torch.no_grad()
    def features(self, state: State) -> Tensor:
        """(K, D) unit rows, from what enters the last block."""
        return self._rows(self._tower.read(self._last(state)))

    def feature_variants(self, matrix: Matrix, tails: Tails, state: State) -> Iterator[Tensor]:
        """The same with each candidate's weight for a matrix of the last block, or ``proj``."""
        check_matrix(matrix, "text", range(self.depth - 1, self.depth), proj=True)
        return self._feature_variants(matrix, tails, state)

    @torch.no_grad()
    def _feature_variants(self, matrix: Matrix, tails: Tails, state: State) -> Iterator[Tensor]:
        tower = self._tower
        if matrix.kind == "proj":
            before = layer_norm(tower.norm, self._last(state))
            for y in tails.results(before, _project(tower.projection(), before)):
                yield self._rows(y)
            return
        for x in steps(tower.blocks[-1], matrix.kind, tails, state, self._ends):
            yield self._rows(tower.read(x))

    def _last(self, state: State) -> Tensor:
        """(1, U, W) of the ends of text after the last block."""
        return step(self._tower.blocks[-1], state, self._ends)

    def _rows(self, found: Tensor) -> Tensor:
        """(K, D) from features (1, U, D) of the distinct prompts."""
        each = F.normalize(found[0], dim=-1).index_select(0, self._back)
        if self._templates == 1:
            return each
        return F.normalize(each.unflatten(0, (self._templates, -1)).mean(dim=0), dim=-1)

    def _attend(self, given: Heads) -> Tensor:
        together = given.together
        if together is None:
            together = torch.stack(given[:3], dim=2)
        parts = together.split(self._sizes, dim=1)
        count = len(self._trees)
        heads = [[y.transpose(1, 2) for y in p.unbind(2)] for p in parts[:count]]
        found = [causal(*h).transpose(1, 2) for h in heads]
        for h, part, tree in zip(heads, parts[count:], self._trees, strict=True):
            found.append(attend(part, (h[1], h[2]) if tree.prefix else None, tree.buckets))
        return torch.cat(found, dim=1)

    def _attend_last(self, given: Heads) -> Tensor:
        together = given.together
        if together is None:
            together = torch.stack(given[1:3], dim=2)
        parts = together.split(self._sizes, dim=1)
        count = len(self._trees)
        asked = given.q.split([len(t.rows) for t in self._trees], dim=1)
        found = []
        for own, head, part, tree in zip(
            asked, parts[:count], parts[count:], self._trees, strict=True
        ):
            shared = tuple(y.transpose(1, 2) for y in head.unbind(2)) if tree.prefix else None
            found.append(attend_last(own, part, shared, tree.buckets))
        return torch.cat(found, dim=1)

    @torch.no_grad()
    def _check(self, encoder: Encoder, tokens: Tensor, ends: Tensor) -> None:
        """Two prompts in parts and by the model itself."""
        self._lay_out(tokens, ends)
        state = self.start()
        for i in range(self.depth - 1):
            state = self.block(i, state)
        parts = self._tower.read(self._last(state))[0].index_select(0, self._back)
        whole = encoder.encode_tokens(tokens.to(self._tower.device))
        compare(self.name, "text features", parts, whole)


def _project(projection: Tensor | torch.nn.Module | None, x: Tensor) -> Tensor:
    if projection is None:
        return x
    if isinstance(projection, torch.nn.Linear):
        return linear(x, projection.weight, projection.bias)
    assert isinstance(projection, Tensor)
    return x @ projection
