"""Fixtures of the kernel tests: the module, one instruction set after the other, threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastood.errors import BuildError
from fastood.ops import loader


@pytest.fixture(scope="session")
def kernels() -> Any:
    """The compiled module; the test skips where there is none."""
    try:
        return loader.cpu()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["amx", "avx512", "avx2", "generic"])
def instruction_set(request: pytest.FixtureRequest, kernels: Any) -> Iterator[str]:
    """The test once for each instruction set of this machine."""
    if request.param not in kernels.instruction_sets():
        pytest.skip(f"this machine has no {request.param}")
    before = kernels.active_instruction_set()
    kernels.choose_instruction_set(request.param)
    yield request.param
    kernels.choose_instruction_set(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
