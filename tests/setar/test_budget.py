"""What is kept within a memory: never more, and everything where there is room."""

from __future__ import annotations

import random

import pytest

from fastood.setar.budget import Kept, Sizes, notes, share
from fastood.setar.plan import Plan, make_plan
from tests.tuning.towers import open_clip_encoder

ORDERS = ("image_text", "text_image", "image", "text", "interleaved", "exhaustive", "single")


def plan_of(order: str) -> Plan:
    return make_plan(open_clip_encoder().model, order=order)


def held(sizes: Sizes, kept: Kept) -> int:
    inputs = sizes.inputs[:: kept.every] if kept.every else ()
    texts = sizes.texts[:: kept.texts] if kept.texts else ()
    return sum(inputs) + sum(texts) + sizes.features * kept.features


@pytest.mark.parametrize("order", ORDERS)
def test_never_more_than_the_budget(order):
    plan, draw = plan_of(order), random.Random(0)
    for _ in range(300):
        sizes = Sizes(
            (draw.randint(1, 50),) * draw.randint(1, 12),
            draw.randint(1, 50),
            (draw.randint(1, 50),) * draw.randint(0, 12),
        )
        budget = draw.choice([0, draw.randint(1, 100), draw.randint(1, 1500)])
        for tower in plan.towers:
            assert held(sizes, share(plan, tower, sizes, budget)) <= budget
        assert not notes(plan, sizes, 10_000)


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_phase_needs_is_kept_where_there_is_room(order):
    plan, sizes = plan_of(order), Sizes((10,) * 4, 8, (3,) * 2)
    for tower in plan.towers:
        kept = share(plan, tower, sizes, 1000)
        if plan.mixed:
            assert kept == Kept(1, True, 1)
        elif tower == "image":
            assert kept == Kept(1, False, 0)
        else:  # where images are searched later, they are decoded once
            assert kept == Kept(4 if order == "text_image" else 0, True, 1)


def test_notes_name_what_is_run_again():
    sizes = Sizes((10,) * 4, 8, (3,) * 2)
    for order in ("image_text", "single"):
        images, texts = notes(plan_of(order), sizes, 0)
        assert "images are decoded and run again" in images
        assert "do not hold what enters the 2 text blocks too" in texts
    (line,) = notes(plan_of("image_text"), sizes, 20)
    assert "hold the inputs of 2 of 4 blocks" in line
    (line,) = notes(plan_of("text"), sizes, 10)
    assert "text blocks" in line
    assert not notes(plan_of("text"), sizes, 14)
