"""Methods in two real processes: classes and images shared, sums those of one process."""

from __future__ import annotations

import pytest
import torch

from fastood.tuning.method import total_loss
from fastood.tuning.registry import build_method
from tests.tuning.launch import launch
from tests.tuning.parity import NAMES, batches, encoder

SETTINGS = {
    "coop": {"n_ctx": 4},
    "locoop": {"n_ctx": 4, "top_k": 2},
    "ebm": {"n_ctx": 4},
    "cocoop": {},
    "clip-adapter": {},
}

SCRIPT = """
import sys
from pathlib import Path
import torch
from fastood.tuning.method import Batch, total_loss
from fastood.tuning.parallel import World
from tests.tuning.test_shared_methods import made
world = World.from_environment()
found = {}
for name, method, batch in made():
    method.world = world
    own = world.part(len(batch.labels))
    terms, _ = method.terms(Batch(*(x[own] for x in batch)))
    counts = world.sum(torch.tensor([float(t.count) for t in terms]))
    loss = total_loss(terms, counts.unbind())
    loss.backward()
    sums = [world.sum(loss), *(world.sum(p.grad) for p in method.parameters())]
    found.setdefault(name, []).append([x.clone() for x in sums])
torch.save(found, Path(sys.argv[1]) / f"{world.rank}.pt")
"""


def made():
    """Each method with a batch of five images, and with one of a single image."""
    network = encoder(torch.float64)
    for name, settings in SETTINGS.items():
        for b in (5, 1):
            method = build_method(name, network, NAMES, **settings)
            yield name, method, batches(1, b=b, dtype=torch.float64, seed=3)[0]


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    want: dict[str, list[list[torch.Tensor]]] = {}
    for name, method, batch in made():
        loss = total_loss(method.terms(batch)[0])
        loss.backward()
        want.setdefault(name, []).append([loss.detach(), *(p.grad for p in method.parameters())])
    launch(SCRIPT, tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == want.keys()
        for name in want:
            for got, expected in zip(found[name], want[name], strict=True):
                for a, b in zip(got, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)
