"""Ordinary prompts of many beginnings in one pass: every beginning that pays is run once.

An ensemble is such a list: each template begins in its own way. Prompts are divided into groups
that share a prefix, so that few tokens are left; what happens to each token alone is then done for
all groups at once, and only attention goes group by group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from fastood.prompts.attention import attend, attend_last, causal
from fastood.prompts.layout import fixed
from fastood.prompts.packing import pack, shared_length
from fastood.prompts.tower import TextTower

__all__ = ["common_beginnings", "forest_pass"]

_GROUP_COST = 8
"""Tokens a group has to save: about what the attention of one more group takes."""


def common_beginnings(prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Indices of distinct prompts (token ids up to the end of text) in groups to run together.

    Of all ways to take subtrees out of the tree of prompts, the one that runs fewest tokens, a
    group counting as eight.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    return _divide(prompts, order)[1]


def _divide(prompts: Sequence[tuple[int, ...]], rows: list[int]) -> tuple[int, list[list[int]]]:
    """Cost and groups of sorted prompts."""
    first, last = prompts[rows[0]], prompts[rows[-1]]
    if len(rows) == 1:
        return len(first) + _GROUP_COST, [rows]
    shared = next(i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    cost = 0
    groups: list[list[int]] = []
    here: list[int] = []
    for _, branch in groupby(rows, key=lambda i: prompts[i][shared]):
        some = list(branch)
        inside = sum(len(prompts[i]) - shared for i in some)
        own, found = _divide(prompts, some)
        if own < inside:
            cost, groups = cost + own, groups + found
        else:
            cost, here = cost + inside, here + some
    if here:
        cost, groups = cost + shared + _GROUP_COST, [*groups, here]
    return cost, groups


def forest_pass(tower: TextTower, tokens: Tensor, ends: Tensor, groups: list[list[int]]) -> Tensor:
    """(N, D) features of distinct prompts (N, L) that end at ``ends``, each in one group."""
    tokens, ends = tokens.cpu(), ends.cpu()
    layouts = [fixed(tokens[rows], ends[rows]) for rows in groups]
    trees = [pack(layout, shared_length(layout)) for layout in layouts]
    sizes = [t.prefix for t in trees] + [len(t.ids) for t in trees]
    starts = torch.tensor([0, *sizes]).cumsum(0)[len(trees) : -1].tolist()
    ids = torch.cat([t.prefix_ids for t in trees] + [t.ids for t in trees])
    at = torch.cat([torch.arange(t.prefix) for t in trees] + [t.positions for t in trees])
    last = torch.cat([t.ends + start for t, start in zip(trees, starts, strict=True)])
    whose = [rows[i] for rows, t in zip(groups, trees, strict=True) for i in t.rows.tolist()]
    ids, at, last = (x.to(tower.device) for x in (ids, at, last))

    dtype = tower.dtype
    x = (tower.vectors(ids).to(dtype) + tower.positions().index_select(0, at).to(dtype))[None]
    for block in tower.blocks[:-1]:
        parts = block.project(x).split(sizes, dim=1)
        heads = [[y.transpose(1, 2) for y in p.unbind(2)] for p in parts[: len(trees)]]
        attended = [causal(*h).transpose(1, 2) for h in heads]
        for h, part, tree in zip(heads, parts[len(trees) :], trees, strict=True):
            attended.append(attend(part, (h[1], h[2]) if tree.prefix else None, tree.buckets))
        x = block.finish(x, torch.cat(attended, dim=1))
    query, kv = tower.blocks[-1].project_last(x, last)
    assert query is not None
    found, pairs = [], kv.split(sizes, dim=1)
    queries = query.split([len(t.rows) for t in trees], dim=1)
    for q, head, part, tree in zip(queries, pairs, pairs[len(trees) :], trees, strict=False):
        k, v = (y.transpose(1, 2) for y in head.unbind(2))
        found.append(attend_last(q, part, (k, v) if tree.prefix else None, tree.buckets))
    x = tower.blocks[-1].finish(x.index_select(1, last), torch.cat(found, dim=1))
    back = torch.tensor(whose).argsort().to(tower.device)
    return tower.read(x)[0].index_select(0, back)
