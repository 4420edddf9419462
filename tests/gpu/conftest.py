"""A GPU for tests of what runs around the kernels: a real one, or one of pretence."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from tests.gpu.pretence import DEVICE, PretendedGPU, why_no_pretence


@pytest.fixture
def gpu() -> AbstractContextManager[torch.device]:
    """To enter, without gradients; gives the device."""
    if torch.cuda.is_available():
        return nullcontext(DEVICE)
    why = why_no_pretence()
    if why:
        pytest.skip(why)
    return PretendedGPU().present()
