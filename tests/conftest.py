"""Shared fixtures: the real data where it is, and data that looks like CLIP's where it is not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # before anything imports Triton: kernels then run on CPU tensors, as NumPy
    os.environ.setdefault("TRITON_INTERPRET", "1")


_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    # threads of several workers would take each other's cores and spin
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # as under nohup; what is interrupted here, and programs started here, must notice
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of real CLIP features and images; the test skips without it."""
    root = os.environ.get("FASTOOD_TEST_DATA")
    if not root:
        pytest.skip("FASTOOD_TEST_DATA is not set")
    path = Path(root)
    if not path.is_dir():
        pytest.fail(f"FASTOOD_TEST_DATA: expected a folder, got {root}")
    return path


def clip_like(b: int, k: int, d: int = 64, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Image and class features whose cosines spread as CLIP's do: about .2, a clear best class."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(d, generator=g, dtype=torch.float64)
    text = 0.8 * common + torch.randn(k, d, generator=g, dtype=torch.float64)
    label = torch.randint(k, (b,), generator=g)
    strength = torch.rand(b, 1, generator=g, dtype=torch.float64)
    image = 0.15 * common + 0.4 * strength * text[label]
    image = image + torch.randn(b, d, generator=g, dtype=torch.float64)
    norms = 1 + 10 * torch.rand(b, 1, generator=g, dtype=torch.float64)
    return (image * norms).to(dtype), text.to(dtype), label
