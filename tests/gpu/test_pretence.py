"""The pretended GPU refuses what a GPU would, and computes what a CPU does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.gpu.pretence import DEVICE, PretendedGPU, why_no_pretence

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or why_no_pretence() is not None, reason="no need, or no way"
)


@pytest.fixture
def pretended():
    found = PretendedGPU()
    with found.present():
        yield found


def test_numbers_are_those_of_the_cpu(pretended):
    layer, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
    want = layer(x)
    layer.to(DEVICE)
    found = layer(x.to(DEVICE))
    assert found.is_cuda and found.device == DEVICE and layer.weight.is_cuda
    assert torch.equal(found.cpu(), want) and not found.cpu().is_cuda
    q = torch.randn(2, 3, 5, 8)
    attended = F.scaled_dot_product_attention(*[q.to(DEVICE)] * 3)
    torch.testing.assert_close(attended.cpu(), F.scaled_dot_product_attention(q, q, q))


def test_views_share_their_memory(pretended):
    x = torch.zeros(2, 3, device=DEVICE)
    x[0] = 1
    x[:, 1].add_(2)
    x.copy_(x + torch.tensor(1.0))
    assert x.cpu().tolist() == [[2.0, 4.0, 2.0], [1.0, 3.0, 1.0]]


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x, y: x + y,
        lambda x, y: y @ x.mT,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: F.linear(x, y),
        lambda x, y: x.add_(y),
        lambda x, y: y[x.bool()],
        lambda x, y: torch.where(x > 0, x, y),
    ],
)
def test_two_devices_in_one_operator_are_refused(pretended, mixed):
    x, y = torch.ones(2, 3, device=DEVICE), torch.ones(2, 3)
    with pytest.raises(RuntimeError):
        mixed(x, y)


def test_what_a_gpu_allows_is_allowed(pretended):
    x = torch.arange(6.0, device=DEVICE).view(2, 3)
    assert (x * torch.tensor(2.0)).sum().item() == 30
    assert x[torch.tensor([1])].cpu().tolist() == [[3, 4, 5]]
    x[torch.tensor([0])] = 0
    assert x.copy_(torch.ones(2, 3)).is_cuda and int(x.sum()) == 6


def test_reads_are_counted(pretended):
    x = torch.ones(3, device=DEVICE)
    assert not pretended.waits
    y = x * 2 + x.new_zeros(3)
    assert not pretended.waits
    assert float(y.sum()) == 6
    y.cpu()
    assert y.nonzero().tolist() == [[0], [1], [2]]
    assert pretended.waits.total() == 4
    with pytest.raises((RuntimeError, TypeError)):
        y.numpy()
