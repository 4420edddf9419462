"""Where the kernels run: on a GPU, or interpreted on CPU tensors (see ``tests/conftest.py``)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from fastood.kernels.launch import usable
from fastood.ops import ebm, grouped, library, patches, rows  # noqa: F401 (they declare operators)

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if (_REASON := usable(torch.empty(0, device=_DEVICE))) is not None:
    collect_ignore_glob = ["test_*.py"]  # the modules under test do not even import


@pytest.fixture
def device() -> str:
    """The device whose tensors the kernels take in this process."""
    return _DEVICE


@pytest.fixture
def operators(device: str) -> Iterator[None]:
    """``torch.ops.fastood.*`` by what they run on CUDA tensors, on CPU tensors too."""
    if device == "cuda":
        yield
        return
    override = torch.library.Library("fastood", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that CPU kernels are overridden
        for name, function in library.GPU.items():
            override.impl(name, function, "CPU")
    yield
    override._destroy()
