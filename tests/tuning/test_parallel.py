"""Sums, shares and gathered rows: alone, and in two real processes."""

from __future__ import annotations

import pytest
import torch

from fastood.tuning.parallel import World
from tests.tuning.launch import launch

GATHER = """
import sys, torch
from fastood.tuning.parallel import World

world = World.from_environment()
assert world.size == 2
torch.manual_seed(0)
for n, dtype in ((5, torch.float64), (1, torch.float32), (4, torch.bfloat16)):
    weights = torch.randn(n, 4, dtype=torch.float64)
    rows = torch.arange(n * 4, dtype=dtype).reshape(n, 4) / 7
    theta = torch.tensor(1.5, dtype=dtype, requires_grad=True)
    own = world.part(n)
    everything = world.gather_rows(theta * rows[own], n)
    assert everything.dtype == dtype
    assert torch.equal(everything.detach(), theta.detach() * rows)
    # the loss of a process is its share of Σ w r, times its rank + 1
    ((everything.double() * weights).sum() * (world.rank + 1)).backward()
    grad = world.sum(theta.grad) if theta.grad is not None else world.sum(torch.zeros_like(theta))
    want = (rows.double() * weights).sum() * (1 + 2)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 3e-2
    assert abs(grad.double() - want) <= tolerance * abs(want), (dtype, grad, want)

# A part without a graph: its process must not leave the others waiting in the backward pass.
start = torch.ones(2, requires_grad=world.rank == 0)
part = (start * 1.0)[: world.part(1).stop - world.part(1).start]
(world.gather_rows(part, 1).sum() * 3).backward()
if world.rank == 0:
    assert start.grad.tolist() == [3.0 * world.size, 0.0], start.grad
with torch.no_grad():
    assert not world.gather_rows(start[:0] if world.rank else start[:1], 1).requires_grad
world.barrier()
assert World.from_environment() == world
print("fine")
"""


def test_gathered_rows_and_their_gradient_in_two_processes(tmp_path):
    assert launch(GATHER, tmp_path) == ["fine\n"] * 2


LEAVE = """
import atexit
import torch, torch.distributed as dist
from fastood.tuning.parallel import World

atexit.register(lambda: print("joined" if dist.is_initialized() else "left"))  # runs last
World.from_environment().sum(torch.ones(1))
if {destroy}:
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("destroy", [False, True])
def test_a_process_leaves_its_group_before_python_ends(tmp_path, destroy):
    # Or gloo's threads may abort it: "terminate called without an active exception".
    assert launch(LEAVE.format(destroy=destroy), tmp_path) == ["left\n"] * 2


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 2, 6, 13])
def test_shares_are_consecutive_complete_and_even(size, n):
    parts = [World(rank, size).part(n) for rank in range(size)]
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(n))
    lengths = [p.stop - p.start for p in parts]
    assert max(lengths) - min(lengths) <= 1


def test_alone_everything_is_the_identity(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World.from_environment()
    assert world == World.alone() == World(0, 1)
    rows = torch.randn(3, 2, requires_grad=True)
    assert world.gather_rows(rows, 3) is rows
    assert torch.equal(world.sum(rows), rows)
    world.barrier()


def test_bad_worlds_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="rank 2 of size 2"):
        World(2, 2)
    with pytest.raises(ValueError, match="expected 3 of 3 rows"):
        World.alone().gather_rows(torch.ones(2, 2), 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK, MASTER_ADDR, MASTER_PORT"):
        World.from_environment()
