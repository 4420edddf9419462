"""Prompt layouts: where the context stands, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fastood.prompts import PromptLayout, fixed, learned
from fastood.prompts.layout import start_of
from fastood.prompts.packing import pack, shared_length
from tests.models.tiny import TOKENIZER

NAMES = ["cat", "ice cream", "hen"]
SOT, EOT = 49406, 49407


def words(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def row(layout: PromptLayout, k: int) -> list[int | str]:
    """Prompt k up to its end: token ids, and c0, c1, ... for the context."""
    found: list[int | str] = []
    for token, at in zip(layout.tokens[k].tolist(), layout.context[k].tolist(), strict=True):
        found.append(token if at < 0 else f"c{at}")
    return found[: int(layout.ends[k]) + 1]


@pytest.mark.parametrize("class_specific", [False, True])
def test_where_the_name_stands(class_specific):
    stop, (ice, cream) = words("."), words("ice cream")
    wanted = {
        "end": [SOT, "c0", "c1", "c2", "c3", "c4", ice, cream, *stop, EOT],
        "middle": [SOT, "c0", "c1", ice, cream, "c2", "c3", "c4", *stop, EOT],
        "front": [SOT, ice, cream, "c0", "c1", "c2", "c3", "c4", *stop, EOT],
    }
    for position, expected in wanted.items():
        layout = learned(
            TOKENIZER, NAMES, n_ctx=5, position=position, class_specific=class_specific
        )
        assert row(layout, 1) == expected, position
        assert len(layout) == 3 and layout.class_specific is class_specific
        assert layout.ends.tolist() == [8, 9, 8]


def test_tokens_are_those_of_the_placeholder_prompt():
    layout = learned(TOKENIZER, NAMES, n_ctx=4)
    assert torch.equal(layout.tokens, TOKENIZER([f"X X X X {n}." for n in NAMES]))
    assert torch.equal(layout.ends, layout.tokens.argmax(-1))
    assert bool((layout.context[:, 5:] == -1).all())


def test_a_full_stop_that_merges_with_the_name_is_kept():
    """'st..' ends in one token of two stops; nothing is lost or run twice."""
    for position in ("end", "middle", "front"):
        layout = learned(TOKENIZER, ["st."], n_ctx=2, position=position)
        plain = [t for t in row(layout, 0) if not isinstance(t, str)]
        assert plain == [SOT, *words("st.."), EOT]


def test_what_does_not_fit_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"window of 77 .* got 75"):
        learned(TOKENIZER, NAMES, n_ctx=75)
    with pytest.raises(ValueError, match=r"at least 1 context token, got 0"):
        learned(TOKENIZER, NAMES, n_ctx=0)
    with pytest.raises(ValueError, match=r"1 do not fit .* 77 .* 16 context tokens: 'very very"):
        learned(TOKENIZER, ["cat", "very " * 70 + "big"], n_ctx=16)
    # 77 = start + 72 + "ice cream" + "." + end: the longest that fits
    assert learned(TOKENIZER, NAMES, n_ctx=72).ends.tolist() == [75, 76, 75]
    with pytest.raises(ValueError, match=r"1 do not fit .* 'ice cream'"):
        learned(TOKENIZER, NAMES, n_ctx=73)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": "back"}, "'end', 'middle' or 'front', got 'back'"),
        ({"n_ctx": 2.0}, "n_ctx: expected at least 1"),
        ({"names": []}, "at least one class name"),
        ({"names": "cat"}, "expected a list"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        learned(TOKENIZER, options.pop("names", NAMES), **{"n_ctx": 4, **options})


def test_a_tokenizer_of_letters_is_refused():
    def letters(prompts):
        rows = [[1, *(3 + ord(c) for c in p)][:60] for p in prompts]
        return torch.tensor([r + [999] + [0] * (63 - len(r)) for r in rows])

    with pytest.raises(ValueError, match="one token for each placeholder"):
        learned(letters, NAMES, n_ctx=4)


def test_start_token_or_none():
    assert start_of(TOKENIZER) == 1

    def without(prompts):
        rows = [[2 + sum(map(ord, w)) % 90 for w in p.split()] for p in prompts]
        return torch.tensor([r + [99] + [1] * (20 - len(r)) for r in rows])

    assert start_of(without) == 0
    layout = learned(without, NAMES, n_ctx=2, position="front")
    assert layout.context[0].tolist()[:4] == [-1, 0, 1, -1]


def test_layouts_that_contradict_themselves():
    tokens = TOKENIZER(["a cat"])
    ends = tokens.argmax(-1)
    none = torch.full_like(tokens, -1)
    with pytest.raises(ValueError, match=r"rows 0\.\.1 once in every prompt"):
        at = none.clone()
        at[0, 1] = 0
        PromptLayout(tokens, ends, at, 2)
    with pytest.raises(ValueError, match="before the end of text"):
        at = none.clone()
        at[0, 10] = 0
        PromptLayout(tokens, ends, at, 1)
    with pytest.raises(ValueError, match="to match tokens"):
        PromptLayout(tokens, ends, none[:, :5], 0)
    with pytest.raises(ValueError, match="expected positions below 77"):
        PromptLayout(tokens, ends + 77, none, 0)
    with pytest.raises(ValueError, match=r"expected \(K, L\) int64"):
        PromptLayout(tokens.float(), ends, none, 0)


def test_packing_shares_what_is_common_and_repeats_nothing():
    layout = learned(TOKENIZER, ["cat", "ice cream", "cat", "hen"], n_ctx=4)
    assert shared_length(layout) == 5
    packing = pack(layout, 5)
    assert [tuple(b) for b in packing.buckets] == [(2, 3), (1, 4)]  # name . end
    assert packing.back.tolist() == [0, 2, 0, 1] and packing.rows.tolist() == [0, 3, 1]
    assert packing.prefix_slots.tolist() == [1, 2, 3, 4] and not len(packing.slots)
    assert packing.ends.tolist() == [2, 5, 9]
    assert packing.positions.tolist() == [5, 6, 7, 5, 6, 7, 5, 6, 7, 8]
    own = learned(TOKENIZER, ["cat", "ice cream", "cat"], n_ctx=4, class_specific=True)
    assert shared_length(own) == 1
    assert [tuple(b) for b in pack(own, 1).buckets] == [(2, 7), (1, 8)]


def test_parts_of_a_packing_hold_the_same_tokens():
    layout = learned(TOKENIZER, NAMES, n_ctx=4, position="front")
    packing = pack(layout, 1)
    ids, slots, first = [], [], 0
    for start, stop in ((0, 1), (1, 3)):
        part = packing.part(start, stop)
        ids.append(part.ids)
        slots.append(part.slots + first)
        assert torch.equal(part.ids[part.ends], torch.full((stop - start,), EOT))
        first += len(part.ids)
    assert torch.equal(torch.cat(ids), packing.ids)
    assert torch.equal(torch.cat(slots), packing.slots)


def test_fixed_prompts_share_their_beginning():
    tokens = TOKENIZER([f"a photo of a {n}." for n in NAMES])
    layout = fixed(tokens, tokens.argmax(-1))
    assert shared_length(layout) == 5 and layout.n_ctx == 0
    assert shared_length(fixed(tokens[:1], tokens[:1].argmax(-1))) == 7  # all but its end
