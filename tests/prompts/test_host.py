"""What would make the host wait for a GPU, or a captured step wrong, does not happen in a step."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.prompts.towers import context_of, learned, open_clip_encoder

WAITS = (
    "_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "repeat_interleave",
    "is_nonzero", "_unique2", "lift_fresh", "bincount",
)  # fmt: skip


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        shapes = tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))
        self.calls.append((func.__name__.split(".")[0], shapes))
        return out


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("class_specific", [False, True])
def test_a_step_neither_waits_nor_depends_on_data(position, chunk, class_specific):
    encoder = open_clip_encoder(dtype=torch.float32)
    prompts = learned(
        encoder, n_ctx=4, position=position, class_specific=class_specific, chunk=chunk
    )

    def step(seed: int) -> list[tuple[str, tuple[tuple[int, ...], ...]]]:
        context = context_of(prompts, seed=seed, dtype=torch.float32)
        with Recorder() as seen:
            features = prompts(context)
            torch.autograd.grad(features, context, features.detach())
        return seen.calls

    step(0)  # index tensors are made once
    first, second = step(1), step(2)
    assert len(first) > 100 and first == second
    assert not {name for name, _ in first} & set(WAITS)
