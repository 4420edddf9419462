"""What is said of a case: times per call, ratios, goals, and why something was not timed."""

from __future__ import annotations

import pytest
import torch

from bench.gpu.accuracy import Bound, compare
from bench.gpu.cases import CASES, Case, Goal
from bench.gpu.ceilings import Ceilings
from bench.gpu.clock import Clock
from bench.gpu.inputs import Inputs, Target, copies_for
from bench.gpu.measure import Broken, judged, measure
from bench.gpu.work import Variant, Work
from bench.shapes import Shape
from tests.bench import fake_gpu

TRUTH = torch.arange(3.0, dtype=torch.float64)


@pytest.fixture
def gpu(monkeypatch):
    return fake_gpu.install(monkeypatch)


def work(variants: list[Variant], goals: tuple[Goal, ...] = ()) -> Work:
    case = Case("delta_energy", "S1", Shape(8, 4, 2), "fp16", goals)
    return Work(case, variants, lambda: [TRUTH], copies=7, flops=4e6, moved=1.0, logits_bytes=588.0)


def test_gpu_time_is_that_of_one_call_of_a_graph(gpu):
    device, target = gpu
    clock = Clock(target)
    runner = clock.runner(device.call(3e-6), 7)
    assert runner.captured and runner.calls == 7 and not runner.note
    before = device.slept
    times = clock.gpu({"a": runner}, 0.01)["a"]
    assert times.seconds == pytest.approx([3e-6] * len(times.seconds))
    assert device.slept > before  # the host got ahead of the device


def test_what_cannot_be_captured_is_timed_from_python_and_says_so(gpu):
    device, target = gpu
    clock = Clock(target)

    def waits(i: int) -> torch.Tensor:
        torch.cuda.synchronize()
        return device.call(2e-6)(i)

    runner = clock.runner(waits, 4)
    assert not runner.captured and "not permitted" in runner.note
    assert clock.gpu({"a": runner}, 0.01)["a"].median == pytest.approx(2e-6)
    assert not clock.runner(device.call(1e-6), 4, capturable=False).captured


def test_a_replay_that_gives_something_else_is_wrong(gpu):
    device, target = gpu
    calls = iter(range(1000))

    def drifting(_: int) -> torch.Tensor:
        device.work(1e-6)
        return TRUTH.float() + 1e-4 * next(calls)

    variant = Variant("fastood", drifting, "ours", "fp16", Bound(0.0, 1.0))
    (row,) = measure(work([variant]), Clock(target), None, 0.01)
    assert "replay" in row["wrong"]


def test_ratios_limit_memory_and_goals(gpu):
    device, target = gpu
    goals = (
        Goal("C", 2.0, 1.2),
        Goal("x eager fp16", 5.0),
        Goal("peak / logits", 1.0),
        Goal("launches", 4),
    )
    found = measure(
        work(
            [
                Variant("cuBLAS fp16", device.call(2e-6), "product", "fp16"),
                Variant("fastood", device.call(3e-6), "ours", "fp16", Bound(1e-3), "cuBLAS fp16"),
                Variant("eager fp16", device.call(12e-6), precision="fp16"),
            ],
            goals,
        ),
        Clock(target),
        Ceilings({"fp16": 4e12}, 1e12),
        0.01,
    )
    ours = found[1]
    assert ours["gpu_us"] == pytest.approx([3.0] * 3)
    assert ours["over_bare"] == pytest.approx([1.5] * 3)
    assert ours["share_of_limit"] == pytest.approx(1 / 3)
    assert ours["peak_bytes"] == 600 - 12 and ours["peak_over_logits"] == 1.0
    assert [g["value"] for g in ours["goals"]] == [
        pytest.approx(1.5),
        pytest.approx(4.0),
        1.0,
        None,
    ]
    assert ours["distinct"] == 3 and ours["max_abs_error"] == 0
    assert "goals" not in found[0] or not found[0]["goals"]


def test_wrong_or_failing_is_not_timed_and_the_others_are(gpu):
    device, target = gpu

    def fails(_: int) -> None:
        raise ValueError("precision: expected None")

    off = device.call(1e-6, TRUTH.float() + 0.1)
    found = measure(
        work(
            [
                Variant("fastood", off, "ours", "fp16", Bound(1e-3)),
                Variant("fastood tf32", fails, "ours", "tf32", Bound(1e-3)),
                Variant("eager fp16", off, precision="fp16"),
            ]
        ),
        Clock(target),
        None,
        0.01,
    )
    assert "3 of 3 numbers" in found[0]["wrong"] and "gpu_us" not in found[0]
    assert found[1]["failed"] == "ValueError: precision: expected None"
    assert found[2]["gpu_us"] and found[2]["max_abs_error"] == pytest.approx(0.1)


def test_a_device_that_no_longer_answers_ends_the_run(gpu):
    device, target = gpu

    def crashes(_: int) -> None:
        device.broken = True
        device.synchronize()

    variants = [Variant("fastood", crashes, "ours", "fp16", Bound(1e-3))]
    with pytest.raises(Broken, match="illegal memory access"):
        measure(work(variants), Clock(target), None, 0.01)


def test_long_calls_are_called_a_few_times_without_a_graph(gpu):
    import time

    device, target = gpu

    def slow(i: int) -> torch.Tensor:
        time.sleep(0.02)
        return device.call(1.0)(i)

    fast = Variant("fastood", device.call(1e-3), "ours", "fp16", Bound(1e-3))
    found = measure(work([fast, Variant("eager", slow)]), Clock(target), None, 0.05)
    assert "from Python" in found[1]["note"]
    assert found[1]["gpu_us"][0] >= 2e4
    assert found[0]["to"]["eager"][0] == pytest.approx(1e3 / found[1]["gpu_us"][0])


def test_goals_without_a_measurement_stay_open():
    row = {"variant": "fastood", "gpu_us": [5.0, 4.0, 6.0], "wall_us": [9000.0, 1.0, 1.0]}
    goals = [Goal(m, 1.0) for m in ("C", "gpu us", "wall us", "ms", "launches", "x published")]
    assert [g["value"] for g in judged(goals, row, [row])] == [None, 5.0, 9000.0, 9.0, None, None]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (torch.tensor([0.0, 1.0, float("nan")]), "1 of 3 numbers"),
        (torch.tensor([0.0, 1.0, 2.1]), "1 of 3 numbers"),
        (torch.zeros(2), "expected (3,)"),
    ],
)
def test_nan_and_wrong_shapes_are_wrong(found, said):
    wrong = compare([found], [TRUTH], Bound(1e-2)).wrong
    assert wrong is not None and said in wrong
    assert compare([TRUTH.float()], [TRUTH], Bound(0.0)).wrong is None
    assert "expected 2" in (compare([TRUTH], [TRUTH, TRUTH], Bound(1.0)).wrong or "")


def test_copies_of_inputs_outgrow_the_cache():
    mib = 2**20
    assert copies_for(2 * mib, 60 * mib) == 75
    assert copies_for(1, 60 * mib) == 96
    assert copies_for(200 * mib, 60 * mib) == 2


def test_copies_hold_the_same_images_in_other_orders():
    inputs = Inputs(Shape(9, 5, 16, p=2, m=6, g=3), "fp16", Target(torch.device("cpu")))
    image, labels = inputs.of("image"), inputs.of("labels")
    order = [row.tolist() for row in image[1]]
    place = [order.index(row.tolist()) for row in image[0]]
    assert place != list(range(9))
    assert torch.equal(labels[1][place], labels[0])
    assert torch.equal(inputs.of("local")[1][place], inputs.of("local")[0])
    assert inputs.of("text")[0].data_ptr() != inputs.of("text")[1].data_ptr()
    assert inputs.of("image", torch.float32)[1].half().equal(image[1])
    assert inputs.banks[1].negatives.shape == (3, 2, 16)


def test_every_case_has_a_name_of_its_own_and_those_with_goals_come_first():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    with_goals = [bool(case.goals) for case in CASES]
    assert with_goals.index(False) >= 8
    for case in CASES:
        assert case.shape.d == 512 or not case.goals or case.work == "low_rank"
