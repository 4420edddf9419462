"""Candidates from kept prefixes against whole passes of models whose weights were replaced."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

from fastood.errors import ModelError
from fastood.models.base import Encoder
from fastood.models.copies import copy_encoder
from fastood.scores.inputs import unit_rows
from fastood.setar import prefix as prefixes
from fastood.setar.evaluate import Evaluator
from fastood.setar.lowrank import low_rank
from fastood.setar.objective import Objective, Value
from fastood.setar.plan import Candidate, Plan, make_plan
from fastood.setar.prefix import Prefix, bytes_of, spacing
from tests.models import tiny
from tests.tolerances import SEARCH_F64_RTOL
from tests.tuning.towers import WORDS, hf_encoder, open_clip_encoder

N = 7
PROMPTS = [[f"a photo of a {w}" for w in WORDS], [f"{w}." for w in WORDS]]
LABELS = torch.tensor([0, 3, 1, 2, 0, 1, 3])


def deep_encoder() -> Encoder:
    return open_clip_encoder(image=tiny.vision(layers=5), text={"layers": 3})


@pytest.fixture(
    params=[open_clip_encoder, hf_encoder, deep_encoder], ids=["open_clip", "hugging face", "deep"]
)
def encoder(request) -> Encoder:
    return request.param()


def objective(**options) -> Objective:
    return Objective(**{"top_k": 2, "weight": 0.3, **options})


def images() -> Tensor:
    return tiny.pixels(N).double()


def evaluator(encoder: Encoder, plan: Plan, **options) -> Evaluator:
    pixels = images()
    settings = {"batches": [3, 3, 1], "chunk": 2, "memory": 10**9, **options}
    goal = settings.pop("objective", objective())
    return Evaluator(encoder, lambda i: pixels[i], LABELS, PROMPTS, goal, plan=plan, **settings)


def whole(
    encoder: Encoder,
    changes: list[Candidate],
    goal: Objective | None = None,
    *,
    batches: tuple[int, ...] = (3, 3, 1),
    part: str = "minor",
    seed: int = 0,
) -> Value:
    """The value of the model with these changes, by its own full passes."""
    model = copy_encoder(encoder)
    with torch.no_grad():
        for c in changes:
            w = c.matrix.weight(model.model)
            w.copy_(low_rank(w.clone(), drop=c.count, part=part, seed=seed))
        found = model.encode_image(images(), local=True)
        rows = [unit_rows(model.encode_tokens(model.tokenize(p))) for p in PROMPTS]
        text = unit_rows(torch.stack(rows).mean(0)) * model.logit_scale
        tally = (goal or objective()).tally(LABELS, batches)
        tally.add(0, unit_rows(found.image) @ text.T, unit_rows(found.local), text)
    return tally.value()


def near(a: Value, b: Value) -> bool:
    close = torch.isclose(
        torch.tensor([a.objective, a.loss, a.cross_entropy, a.patches]).double(),
        torch.tensor([b.objective, b.loss, b.cross_entropy, b.patches]).double(),
        rtol=SEARCH_F64_RTOL,
        atol=SEARCH_F64_RTOL,
    )
    return bool(close.all()) and a.ood_patches == b.ood_patches and a.accuracy == b.accuracy


@pytest.mark.parametrize(
    ("order", "kind"),
    [
        *(("image_text", kind) for kind in ("up", "down", "q", "k", "v", "o")),
        ("text_image", "up"),
        ("interleaved", "up"),
    ],
)
def test_candidates_are_those_of_whole_models(encoder, order, kind):
    """Every visit, every candidate, after accepted changes at earlier visits."""
    if order == "interleaved" and _depths(encoder) != 1:
        pytest.skip("towers of unequal depth")
    plan = make_plan(encoder.model, order=order, kinds=kind, ratios=[0.1, 0.3], projections=True)
    found = evaluator(encoder, plan)
    accepted: list[Candidate] = []
    assert near(found.baseline(), whole(encoder, []))
    for i, matrix in enumerate(plan.matrices):
        candidates = list(plan.candidates(matrix))
        for candidate, value in zip(candidates, found.candidates(candidates), strict=True):
            assert near(value, whole(encoder, [*accepted, candidate])), candidate
        if i % 3 != 1:  # also leave some as they are
            accepted.append(candidates[i % len(candidates)])
            found.accept(accepted[-1])
    assert near(found.baseline(), whole(encoder, accepted))


def _depths(encoder: Encoder) -> int:
    plan = make_plan(encoder.model, ratios=[0.1])
    towers = [m.tower for m in plan.matrices]
    return len({towers.count("image"), towers.count("text")})


def test_any_order_is_exact(encoder):
    """Visits up and down the towers, as an exhaustive search jumps."""
    plan = make_plan(encoder.model, order="exhaustive", ratios=[0.2])
    found = evaluator(encoder, plan)
    accepted: list[Candidate] = []
    for i in (0, len(plan.matrices) - 1, 1, len(plan.matrices) // 2):
        candidate = next(plan.candidates(plan.matrices[i]))
        found.accept(candidate)
        accepted.append(candidate)
        for matrix in plan.matrices:
            if matrix in [c.matrix for c in accepted]:
                continue
            trial = next(plan.candidates(matrix))
            assert near(found.candidates([trial])[0], whole(encoder, [*accepted, trial]))


@pytest.mark.parametrize("order", ["image_text", "text_image", "single"])
def test_memory_and_chunks_change_nothing(encoder, order):
    plan = make_plan(encoder.model, order=order, ratios=[0.1, 0.4])
    values = {}
    need = evaluator(encoder, plan).describe()["input_bytes"][0]
    spacings = set()
    for memory in (0, need, 2 * need, 10**9):
        for chunk in (2, 7):
            found = evaluator(encoder, plan, memory=memory, chunk=chunk)
            spacings.add(found.describe()["every"])
            run = [found.baseline()]
            for matrix in plan.matrices:
                candidates = list(plan.candidates(matrix))
                run += found.candidates(candidates)
                if order != "single":
                    found.accept(candidates[-1])
            values[memory, chunk] = run
    first = values.pop((0, 2))
    for run in values.values():
        assert all(near(a, b) for a, b in zip(first, run, strict=True))
    assert len(spacings) > 1 or order != "image_text"


@pytest.mark.parametrize("part", ["principal", "random"])
def test_other_parts(part):
    encoder = open_clip_encoder()
    plan = make_plan(encoder.model, ratios=[0.1, 0.2, 0.3])
    found = evaluator(encoder, plan, part=part, seed=3)
    for matrix in plan.matrices[::2]:
        candidates = list(plan.candidates(matrix))
        for candidate, value in zip(candidates, found.candidates(candidates), strict=True):
            assert near(value, whole(encoder, [candidate], part=part, seed=3))


@pytest.mark.parametrize("score", ["mcm", "gl_mcm", "energy"])
def test_metrics_of_scores(score):
    encoder = open_clip_encoder()
    goal = objective(metric="auroc", score=score)
    plan = make_plan(encoder.model, ratios=[0.3])
    found = evaluator(encoder, plan, objective=goal)
    for matrix in plan.matrices:
        candidate = next(plan.candidates(matrix))
        assert found.candidates([candidate])[0].objective == pytest.approx(
            whole(encoder, [candidate], goal).objective
        )


@pytest.mark.parametrize("pred_label", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        *({"metric": m} for m in ("loss", "cross_entropy", "patches")),
        *({"metric": "auroc", "score": s} for s in ("mcm", "l_mcm", "gl_mcm", "energy")),
    ],
    ids=lambda asked: "-".join(asked.values()),
)
def test_what_cannot_matter_does_not(asked, pred_label):
    """Queries and keys of the last block, where the objective is of patches alone."""
    encoder = open_clip_encoder()
    goal = objective(**asked, pred_label=pred_label)
    plan = make_plan(encoder.model, order="image", kinds=["q", "k", "v", "up"], ratios=[0.95])
    found = evaluator(encoder, plan, objective=goal)
    before = whole(encoder, [], goal).objective
    for matrix in plan.matrices:
        moved = [whole(encoder, [c], goal).objective for c in plan.candidates(matrix)]
        if found.cannot_matter(matrix):
            assert moved == pytest.approx([before], rel=SEARCH_F64_RTOL)
        elif asked["metric"] in ("loss", "cross_entropy", "patches"):  # others are steps
            assert abs(moved[0] - before) > 1e-6 or pred_label
    skipped = {m.address for m in plan.matrices if found.cannot_matter(m)}
    alone = "patches" in asked.values() or "l_mcm" in asked.values()
    assert skipped == ({"image.1.q", "image.1.k"} if alone and not pred_label else set())


def test_the_model_given_is_left_alone_and_images_are_decoded_once():
    encoder = open_clip_encoder()
    before = {k: v.clone() for k, v in encoder.model.state_dict().items()}
    asked: list[int] = []
    pixels = images()

    def decode(index: Tensor) -> Tensor:
        asked.extend(index.tolist())
        return pixels[index]

    plan = make_plan(encoder.model, ratios=[0.2])
    found = Evaluator(
        encoder, decode, LABELS, PROMPTS, objective(), batches=[N], plan=plan, memory=10**9, chunk=2
    )
    found.baseline()
    for matrix in plan.matrices:
        candidate = next(plan.candidates(matrix))
        found.candidates([candidate])
        found.accept(candidate)
    assert sorted(asked) == list(range(N))
    assert all(torch.equal(v, before[k]) for k, v in encoder.model.state_dict().items())


def test_costs_are_reported_in_full():
    encoder = open_clip_encoder()
    plan = make_plan(encoder.model, ratios=[0.1, 0.2])
    found = evaluator(encoder, plan)
    told: list[float] = []
    found.baseline(told.append)
    assert sum(told) == pytest.approx(found.cost_of_baseline)
    for matrix in plan.matrices:
        told.clear()
        candidates = list(plan.candidates(matrix))
        found.candidates(candidates, told.append)
        assert sum(told) == pytest.approx(sum(map(found.cost, candidates)))


def test_half_precision_is_refused():
    encoder = open_clip_encoder(torch.bfloat16)
    plan = make_plan(encoder.model)
    with pytest.raises(ModelError, match=r"needs float32 or float64 weights, got torch.bfloat16"):
        evaluator(encoder, plan)


def test_too_little_memory_is_said_before_the_work():
    encoder = deep_encoder()
    for order in ("image_text", "text", "single"):
        plan = make_plan(encoder.model, order=order)
        with pytest.warns(RuntimeWarning, match="decoded and run again"):
            found = evaluator(encoder, plan, memory=0)
        assert "decoded and run again" in found.notes[0]
        assert not evaluator(encoder, plan).notes
    need = evaluator(encoder, plan).describe()["input_bytes"][0]
    with pytest.warns(RuntimeWarning, match="hold the inputs of 2 of 5 blocks"):
        evaluator(encoder, make_plan(encoder.model), memory=2 * need)


_EXACT = """
import torch, warnings
warnings.simplefilter("ignore")
{setting}
from fastood.setar.exact import exact
new = hasattr(torch.backends, "fp32_precision")
def state():
    b = torch.backends
    places = [b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul, b.mkldnn.conv] if new else []
    older = [] if "fp32" in {setting!r} else [torch.get_float32_matmul_precision()]
    return [b.cudnn.allow_tf32, *older, *(p.fp32_precision for p in places)]
g = torch.Generator().manual_seed(0)
x = torch.randn(512, 512, generator=g)
true, before = x.double() @ x.double(), state()
with exact():
    assert not torch.is_grad_enabled()
    error = float(((x @ x).double() - true).abs().max())  # bfloat16: 0.25 where the CPU has it
    place = torch.backends.cuda.matmul
    assert place.fp32_precision == "ieee" if new else not place.allow_tf32
assert error < 1e-3, error
assert state() == before and torch.is_grad_enabled()
"""


@pytest.mark.parametrize(
    "setting",
    [
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    ],
)
def test_exact_products_and_restored_settings(setting):
    """In processes of their own: torch's older and newer settings must not be mixed in one."""
    if "fp32" in setting and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch below 2.9")
    done = subprocess.run(
        [sys.executable, "-c", _EXACT.format(setting=setting)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_everything_is_computed_exactly():
    """Whatever a program has set for its own work."""
    encoder = open_clip_encoder(torch.float32)
    plan = make_plan(encoder.model, ratios=[0.2], projections=True)
    pixels, seen = images().float(), set()

    def decode(index: Tensor) -> Tensor:
        seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), _precision()))
        return pixels[index]

    def run() -> list[float]:
        found = Evaluator(
            encoder, decode, LABELS, PROMPTS, objective(), batches=[N], plan=plan, memory=0
        )
        values = [found.baseline().loss]
        for matrix in plan.matrices:
            candidate = next(plan.candidates(matrix))
            values.append(found.candidates([candidate])[0].loss)
            found.accept(candidate)
        return values

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the memory
        expected = run()
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            assert run() == expected
    assert len(seen) == 1 and next(iter(seen))[:2] == (False, False)
    assert next(iter(seen))[2] in ("ieee", "highest")


def _precision() -> str:
    if hasattr(torch.backends, "fp32_precision"):
        return torch.backends.mkldnn.matmul.fp32_precision
    return torch.get_float32_matmul_precision()


# ------------------------------------------------------------------------------------ prefix


class Adder:
    """Block i adds 10^i, times what its weight has become."""

    depth = 6

    def __init__(self) -> None:
        self.weights = [1] * self.depth
        self.runs = 0

    def block(self, index: int, state: Tensor) -> Tensor:
        self.runs += 1
        return state + self.weights[index] * 10**index


@pytest.mark.parametrize("every", [0, 1, 2, 4, 6])
def test_prefix_is_right_after_any_change(every):
    tower = Adder()
    prefix = Prefix(tower, lambda chunk: torch.tensor(chunk * 10**6), every)
    g = torch.Generator().manual_seed(every)
    for _ in range(200):
        layer, chunk, kind = (int(torch.randint(6, (1,), generator=g)) for _ in range(3))
        if kind == 0:
            tower.weights[layer] += 1
            prefix.changed(layer)
        elif kind == 1:
            prefix.drop(chunk)
        elif kind == 2:
            prefix.space(layer)
        expected = chunk * 10**6 + sum(w * 10**i for i, w in enumerate(tower.weights[:layer]))
        assert int(prefix.input(layer, chunk)) == expected
        assert all(prefix.every and at % prefix.every == 0 for at, _ in prefix._kept)


def test_prefix_runs_no_block_twice_when_everything_is_kept():
    tower = Adder()
    prefix = Prefix(tower, lambda chunk: torch.zeros(1), 1)
    for layer in (5, 4, 3, 2, 1, 0):
        prefix.input(layer, 0)
        prefix.changed(layer)
    assert tower.runs == 5


@pytest.mark.parametrize("sizes", [[10], [10] * 3, [10] * 12, [8, 8, 4, 4, 4, 4, 2, 2, 1]])
def test_spacing_stays_within_the_budget_and_uses_it(sizes):
    for budget in range(sum(sizes) + 5):
        every = spacing(sizes, budget)
        assert (every == 0) == (budget < sizes[0])
        if every:
            assert sum(sizes[::every]) <= budget
            assert every == 1 or sum(sizes[:: every - 1]) > budget


def test_a_quarter_of_what_is_free_is_the_default(monkeypatch):
    encoder = open_clip_encoder()
    plan = make_plan(encoder.model)
    for free, expected in ((8_000_000, 2_000_000), (None, 4_000_000_000)):
        monkeypatch.setattr(prefixes, "free_memory", lambda free=free: free)
        assert evaluator(encoder, plan, memory=None).describe()["memory"] == expected


def test_bytes_of_counts_nested_tensors():
    state = {"a": torch.zeros(3), "b": (torch.zeros(2, dtype=torch.float64), [torch.zeros(1)])}
    assert bytes_of(state) == 12 + 16 + 4


def held(found: Evaluator) -> int:
    """Bytes of everything kept between candidates of either tower, whole storages."""
    prefixes = found._prefix, found._text_prefix
    kept = [x for prefix in prefixes for x in prefix._kept.values()]
    kept += [x for s in found._features.values() for x in s]
    return sum(
        {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}.values()
    )


@pytest.mark.parametrize("order", ["image_text", "text_image", "exhaustive"])
def test_what_is_kept_stays_within_the_memory_given(order):
    encoder = deep_encoder()
    plan = make_plan(encoder.model, order=order, ratios=[0.1])
    need = evaluator(encoder, plan).describe()
    whole_texts = sum(need["text_bytes"])
    assert whole_texts > need["input_bytes"][0] / 2  # so it would show
    for places in (0, 0.5, 1, 2.4, 4, 100):
        memory = int(places * need["input_bytes"][0])
        found = evaluator(encoder, plan, memory=memory)
        found.baseline()
        assert held(found) <= memory
        for matrix in plan.matrices:
            found.candidates(list(plan.candidates(matrix)))
            assert held(found) <= memory
        if places == 100:
            assert held(found) > 0
            assert order == "text_image" or found.describe()["text_every"] == 1
