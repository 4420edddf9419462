"""How many kernels a call starts, by the profiler.

Last of all: a profiler that has run once slows down what is launched after it.
"""

from __future__ import annotations

import warnings

import torch

from bench.gpu.inputs import Target
from bench.gpu.work import Call

__all__ = ["launches"]


def launches(call: Call, target: Target) -> int | None:
    """Kernels, copies and fills of one call on the device; None if the profiler sees nothing."""
    if not target.gpu:
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call(0)
    target.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            call(0)
            torch.cuda.synchronize(target.device)
    count = sum(
        event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        for event in found.events()
    )
    return count or None
