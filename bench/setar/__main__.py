"""A whole SeTAR search of a ViT-B/16, and what evaluating its candidates costs otherwise.

    python -m bench.setar

Random weights of ViT-B/16's shape, as many images as classes as on ImageNet, where there are 1000
of each; here fewer, which scales every term but the patch logits (half a percent of the whole
search) alike. The search runs whole. Candidates of it, drawn at random, are also evaluated plainly
(weights resident, patches once, both towers in full, prompts padded to the longest) and in the
authors' structure (weights read again, a full SVD of every accepted matrix, patches in every
block), between the visits of the search so that the machine is the same; their medians are scaled
to the 216 evaluations their search makes. The loss of each is compared first.

The text phase is measured on its own, with 1000 images and 1000 classes: there it is dominated by
the patch logits. Multiply-adds are counted by ``torch.utils.flop_counter`` as they are executed
(decompositions are not counted). Writes ``results/setar.md``.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.machine import describe
from bench.setar.peers import Authors, Plain
from bench.shapes import SMOKE
from fastood.models import OpenClipEncoder
from fastood.setar import LowRankBasis, Objective, make_plan
from fastood.setar.evaluate import Evaluator
from fastood.setar.plan import Candidate, Plan
from fastood.setar.table import Table
from fastood.setar.towers.base import Seen
from fastood.setar.walk import Walk

OUT = Path(__file__).parents[1] / "results" / "setar.md"
IMAGE = (
    {"layers": 3, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
    if SMOKE
    else {"layers": 12, "width": 768, "head_width": 64, "patch_size": 16, "image_size": 224}
)
TEXT = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 64 if SMOKE else 512,
    "heads": 2 if SMOKE else 8,
    "layers": 3 if SMOKE else 12,
}
DIM = 32 if SMOKE else 512
WHOLE = 4 if SMOKE else 24
"""Images and classes of the whole search."""
FULL = 20 if SMOKE else 1000
"""Images and classes of the text phase."""
PLAIN, AUTHORS = (4, 2) if SMOKE else (24, 6)
"""Candidates evaluated otherwise."""
WEIGHT = 0.1


def _product(a: Tensor, b: Tensor) -> int:
    """Flops of a b."""
    return 2 * a.numel() * b.shape[-1]


def _of_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    b, h, n, e = query.shape
    return 2 * b * h * n * key.shape[-2] * (e + value.shape[-1])


def _of_module(query: Tensor, *_: Any, **__: Any) -> int:
    """``nn.MultiheadAttention`` in one piece: four layers and two products."""
    b, n, w = query.shape
    return 2 * b * n * w * (4 * w + 2 * n)


def _in_place(_: Tensor, a: Tensor, b: Tensor, **__: Any) -> int:
    return _product(a, b)


def _of_patches(local: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return _product(local, weight.mT)


COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_attention,
    torch.ops.aten._native_multi_head_attention: _of_module,
    torch.ops.aten.addmm_: _in_place,
    torch.ops.fastood.patch_terms: _of_patches,
}
"""What the counter does not know: it would be left out without a word."""
for _formula in COUNTED.values():
    _formula._get_raw = True  # type: ignore[attr-defined]  # called with tensors, not shapes


def counted(call: Callable[[], Any]) -> tuple[Any, float]:
    """What ``call`` returns, and the multiply-adds it made."""
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        found = call()
    return found, counter.get_total_flops() / 2


def encoder() -> OpenClipEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(DIM, IMAGE, TEXT, quick_gelu=True)
    model.eval().requires_grad_(False)
    return OpenClipEncoder(model, lambda image: image, open_clip.SimpleTokenizer())


def prompts_of(count: int) -> list[str]:
    names = open_clip.IMAGENET_CLASSNAMES
    chosen = names[:: max(1, len(names) // count)][:count]
    return [f"a photo of a {name.replace('_', ' ')}" for name in chosen]


@dataclass
class Spent:
    """Seconds and multiply-adds."""

    seconds: list[float] = field(default_factory=list)
    macs: list[float] = field(default_factory=list)

    def add(self, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        found, macs = counted(call)
        self.seconds.append(time.perf_counter() - begin)
        self.macs.append(macs)
        return found

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Watched(Evaluator):
    """An evaluator that is timed by tower, and lets others have a turn between visits."""

    spent: dict[str, Spent]
    between: Callable[[], None]

    def baseline(self, done: Any = None) -> Any:
        return self.spent["baseline"].add(lambda: Evaluator.baseline(self, done))

    def candidates(self, candidates: Any, done: Any = None) -> Any:
        tower = candidates[0].matrix.tower
        found = self.spent[tower].add(lambda: Evaluator.candidates(self, candidates, done))
        self.between()
        return found


def whole_search() -> dict[str, Any]:
    """The search, and candidates of it plainly and in the authors' way."""
    clip = encoder()
    n = k = WHOLE
    size = IMAGE["image_size"]
    pixels = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % k
    prompts = prompts_of(k)
    top_k = max(1, round(0.3 * k))
    plan = make_plan(clip.model)
    objective = Objective(top_k=top_k, weight=WEIGHT)
    watched = Watched(
        clip, lambda i: pixels[i], labels, [prompts], objective, batches=[n], plan=plan
    )
    watched.spent = {name: Spent() for name in ("baseline", "image", "text")}
    plainly, theirs = Spent(), Spent()
    other = encoder()
    settings: dict[str, Any] = {"top_k": top_k, "weight": WEIGHT}
    tokens = clip.tokenize(prompts)
    plain = Plain(other.model, pixels, tokens, labels, **settings)
    state = {key: value.clone() for key, value in other.model.state_dict().items()}
    authors = Authors(other.model, pixels, tokens, labels, state=state, **settings)
    draw = random.Random(0)
    visits = plan.visits
    turns = {"plain": share(PLAIN, visits), "authors": share(AUTHORS, visits)}
    worst = 0.0
    at = 0
    walk: Walk

    def between() -> None:
        """A turn of the others: the candidate is one of this visit, on top of what is accepted."""
        nonlocal at, worst
        matrix = plan.visit(walk._decided)[0]
        accepted = list(walk._accepted)
        for kind, spent in (("plain", plainly), ("authors", theirs)):
            for _ in range(turns[kind][at]):
                candidate = draw.choice(list(plan.candidates(matrix)))
                if kind == "plain":
                    changed = [*accepted, candidate]
                    made = [(c.matrix, weight_of(state, c)) for c in changed]  # resident
                    loss = spent.add(partial(plain, made))
                else:
                    chosen = [(c.matrix, c.count) for c in (*accepted, candidate)]
                    loss = spent.add(partial(authors.candidate, chosen))
                    other.model.load_state_dict(state)
                waiting.append((at + 1, candidate, loss))
        at += 1

    waiting: list[tuple[int, Candidate, float]] = []
    watched.between = between
    memory = watched.describe()  # of the image phase
    table = Table(None, {})
    walk = Walk(plan, objective, table, lambda: watched, None)
    walk.run()
    for visit, candidate, loss in waiting:
        row = table.find(visit, candidate.matrix.address, candidate.count)
        assert row is not None
        worst = max(worst, abs(row.value.loss - loss) / abs(loss))
    assert worst < 1e-4, f"losses differ by {worst:.1e}"
    return {
        "plan": plan, "spent": watched.spent, "plain": plainly, "authors": theirs, "worst": worst,
        "picks": sum(p.ratio > 0 for p in walk.picks), "memory": memory,
    }  # fmt: skip


def share(count: int, visits: int) -> list[int]:
    """``count`` turns spread over the visits."""
    return [(i + 1) * count // visits - i * count // visits for i in range(visits)]


_BASES: dict[str, LowRankBasis] = {}


def weight_of(state: dict[str, Tensor], candidate: Candidate) -> Tensor:
    matrix = candidate.matrix
    if matrix.address not in _BASES:
        _BASES[matrix.address] = LowRankBasis(matrix.of(state[matrix.key]))
    return _BASES[matrix.address].drop(candidate.count)


class Ready(Evaluator):
    """An evaluator whose images have been run: their features are random."""

    def fill(self, patches: int) -> None:
        g = torch.Generator().manual_seed(0)
        self._keeps_features = True
        for c, index in enumerate(self._chunks):
            local = torch.randn(len(index), patches, DIM, generator=g)
            image = torch.randn(len(index), DIM, generator=g)
            self._features[c] = self._unit(Seen(image, local))


def text_phase() -> dict[str, Any]:
    """Visits to some text layers with FULL images and classes."""
    clip = encoder()
    size = IMAGE["image_size"]
    n = FULL
    blank = torch.zeros(3, size, size)
    plan = make_plan(clip.model, order="text")
    objective = Objective(top_k=max(1, round(0.3 * n)), weight=WEIGHT)
    ready = Ready(
        clip, lambda i: blank.expand(len(i), -1, -1, -1), torch.arange(n), [prompts_of(n)],
        objective, batches=[min(n, 512), n - min(n, 512)] if n > 512 else [n], plan=plan,
        memory=4 * 10**9,
    )  # fmt: skip
    patches = (size // IMAGE["patch_size"]) ** 2
    ready.fill(patches)
    chosen = plan.matrices[:: max(1, len(plan.matrices) // 4)]
    spent = Spent()
    for matrix in chosen:
        spent.add(lambda m=matrix: ready.candidates(list(plan.candidates(m))))
    evaluated = len(list(plan.candidates(chosen[0])))
    # plainly: images by WHOLE at a time are measured by the whole search; prompts here
    pixels = torch.randn(WHOLE, 3, size, size)
    other = Plain(
        clip.model,
        pixels,
        clip.tokenize(prompts_of(n)),
        torch.arange(WHOLE),
        top_k=1,
        weight=WEIGHT,
    )
    images, prompts = Spent(), Spent()
    with torch.no_grad():
        for _ in range(3):
            images.add(other.images)
            prompts.add(other.text)
    scale = n / WHOLE
    plain_seconds = images.median * scale + prompts.median
    plain_macs = images.macs[0] * scale + prompts.macs[0] + n * (patches + 1) * DIM * n
    return {
        "visits": len(chosen), "ours": sum(spent.seconds) / len(chosen) / evaluated,
        "ours_macs": sum(spent.macs) / len(chosen) / evaluated,
        "plain": plain_seconds, "plain_macs": plain_macs,
    }  # fmt: skip


def report(whole: dict[str, Any], text: dict[str, Any]) -> str:
    plan: Plan = whole["plan"]
    spent: dict[str, Spent] = whole["spent"]
    seconds = sum(sum(s.seconds) for s in spent.values())
    macs = sum(sum(s.macs) for s in spent.values())
    theirs = len(plan.matrices) * 9
    lines = []
    for name, other in (
        ("plain re-evaluation", whole["plain"]),
        ("the authors' structure", whole["authors"]),
    ):
        t, m = other.median * theirs, statistics.mean(other.macs) * theirs
        lines.append(
            f"| {name}, {len(other.seconds)} candidates x {theirs} | {t:,.0f} | {m / 1e12:,.1f} | "
            f"{t / seconds:.2f} | {m / macs:.2f} |"
        )
    memory = whole["memory"]
    return "\n".join(
        [
            "# SeTAR search, ViT-B/16 shape",
            "",
            f"{describe_line()} Random weights, float32, W_up of both towers, 8 ratios. Written by "
            "`python -m bench.setar`, which says what is measured.",
            "",
            f"## Whole search, {WHOLE} images, {WHOLE} classes",
            "",
            "| | seconds | Tera multiply-adds | x time | x multiply-adds |",
            "|---|---|---|---|---|",
            f"| fastood, {plan.evaluations + 1} evaluations, run whole | {seconds:,.0f} | "
            f"{macs / 1e12:,.1f} | 1 | 1 |",
            *lines,
            "",
            f"Of fastood's seconds {sum(spent['image'].seconds):,.0f} are the image phase, "
            f"{sum(spent['text'].seconds):,.1f} the text phase. Losses agree to "
            f"{whole['worst']:.0e}; {whole['picks']} of {len(plan.matrices)} matrices changed. "
            f"Kept in the image phase: inputs of {kept(memory['every'])}. "
            "Decompositions are in the seconds of both, not in the multiply-adds.",
            "",
            f"## Text phase alone, {FULL:,} images, {FULL:,} classes",
            "",
            "| a candidate | seconds | Giga multiply-adds |",
            "|---|---|---|",
            f"| fastood, mean over candidates of {text['visits']} layers | {text['ours']:.2f} | "
            f"{text['ours_macs'] / 1e9:,.0f} |",
            f"| plain: images measured on {WHOLE}, scaled; prompts as they are; no loss | "
            f"{text['plain']:,.1f} | {text['plain_macs'] / 1e9:,.0f} |",
            f"| **x** | **{text['plain'] / text['ours']:.0f}** | "
            f"**{text['plain_macs'] / text['ours_macs']:.0f}** |",
            "",
        ]
    )


def kept(every: int) -> str:
    return {0: "no block", 1: "every block"}.get(every, f"one block in {every}")


def describe_line() -> str:
    found = describe()
    return (
        f"{found.get('cpu', 'CPU')}, {torch.get_num_threads()} threads, torch {torch.__version__}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", choices=("whole", "text"), default=None)
    options = parser.parse_args()
    text = text_phase() if options.only != "whole" else {}
    whole = whole_search() if options.only != "text" else {}
    if options.only:
        print(text or whole)
        return
    found = report(whole, text)
    print(found)
    if not SMOKE:
        options.out.write_text(found)


if __name__ == "__main__":
    main()
