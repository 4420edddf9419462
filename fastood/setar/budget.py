"""What a search keeps between candidates, within the memory it was given.

While one tower is searched, the other one's features are kept; of the searched tower what enters
its blocks. Orders that go to and fro between the towers need both all the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastood.room import size_text
from fastood.setar.plan import Plan
from fastood.setar.prefix import spacing

__all__ = ["Kept", "Sizes", "notes", "share"]


@dataclass(frozen=True)
class Sizes:
    """Bytes of what may be kept."""

    inputs: tuple[int, ...]
    """What enters each image block, of all images."""
    features: int
    """Of all images and patches."""
    texts: tuple[int, ...]
    """What enters each text block; empty for a classifier."""


@dataclass(frozen=True)
class Kept:
    """``every`` and ``texts``: inputs of every s-th block, 0 for none, see ``spacing``."""

    every: int
    features: bool
    texts: int


def share(plan: Plan, tower: str, sizes: Sizes, budget: int) -> Kept:
    """What to keep in ``budget`` bytes while matrices of ``tower`` are visited."""
    if tower == "image" and not plan.mixed:  # class features alone are needed of the texts
        return Kept(spacing(sizes.inputs, budget), False, 0)
    if plan.mixed or sizes.features > budget:  # visits run the images again
        texts = spacing(sizes.texts, budget // 4)
        left = budget - sum(_held(sizes.texts, texts))
        features = 2 * sizes.features <= left
        return Kept(spacing(sizes.inputs, left - sizes.features * features), features, texts)
    left = budget - sizes.features
    texts = spacing(sizes.texts, left)
    left -= sum(_held(sizes.texts, texts))
    # searched later, images need not be decoded again
    later = plan.order == "text_image" and sizes.inputs[0] <= left
    return Kept(len(sizes.inputs) if later else 0, True, texts)


def notes(plan: Plan, sizes: Sizes, budget: int) -> tuple[str, ...]:
    """What too little memory will cost in the whole search, to be told before it begins."""
    found: dict[str, None] = {}  # in the order of the phases, each once
    for tower in plan.towers[:1] if plan.mixed else plan.towers:
        found |= dict.fromkeys(_of_phase(plan, tower, sizes, budget))
    return tuple(found)


def _of_phase(plan: Plan, tower: str, sizes: Sizes, budget: int) -> Iterator[str]:
    kept, room = share(plan, tower, sizes, budget), size_text(budget)
    if kept.every != 1 and (plan.mixed or not kept.features):
        need, depth = size_text(sizes.inputs[0]), len(sizes.inputs)
        if kept.every:
            held = len(_held(sizes.inputs, kept.every))
            yield (
                f"memory: {room} hold the inputs of {held} of {depth} blocks ({need} each); the "
                "blocks between are run once more at every visit"
            )
        else:
            yield (
                f"memory: {room} do not hold what enters one block ({need}); images are decoded "
                "and run again at every visit"
            )
    if sizes.texts and kept.texts != 1 and (plan.mixed or tower == "text"):
        need = size_text(sizes.texts[0])
        yield (
            f"memory: {room} do not hold what enters the {len(sizes.texts)} text blocks too "
            f"({need} each); texts are run again at every visit"
        )


def _held(sizes: tuple[int, ...], every: int) -> tuple[int, ...]:
    """The sizes that are kept."""
    return sizes[::every] if every else ()
