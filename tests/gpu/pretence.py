"""A GPU of pretence: tensors that say ``cuda:0``, computed on the CPU.

What a GPU would refuse is refused: tensors of two devices in one operator. Everything else runs
with real numbers, so that whole evaluations and searches can be compared with those on the CPU.
Not covered are kernels (``fastood::`` operators run their plain form), streams, and backward
passes, for which torch wants a driver.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import fastood
from fastood.ops import dispatch, lowrank

__all__ = ["DEVICE", "PretendedGPU", "why_no_pretence"]

DEVICE = torch.device("cuda", 0)

aten = torch.ops.aten
_READS = {  # a GPU's queue has to be empty first
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default,
    aten.masked_select.default,
}  # fmt: skip
_BY_CPU_INDEX = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default,
}  # fmt: skip
_COPIES = {aten.copy_.default, aten._to_copy.default}
_PACKAGE = str(Path(fastood.__file__).parent)


class _OnGPU(Tensor):
    """A CPU tensor that says it is on the GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _OnGPU:
        found = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        found.held = held
        return found

    def __repr__(self, **_: Any) -> str:
        return f"_OnGPU({self.held})"

    def tolist(self) -> Any:  # torch does not hand it on
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the pretended GPU, which is no longer there")


class PretendedGPU(TorchDispatchMode):
    """While it is entered, ``cuda:0`` exists.

    Attributes:
        waits: reads from the device, by the line of the package that asked for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in tensors if isinstance(x, _OnGPU)]
        if func.namespace == "fastood" and ours:
            with self:
                plain = torch._C.DispatchKey.CompositeExplicitAutograd
                return func._op_dk(plain, *args, **kwargs)
        asked = kwargs.get("device")
        here = bool(ours) if asked is None else torch.device(asked).type == "cuda"
        if func is aten.copy_.default:
            here = isinstance(args[0], _OnGPU)
        if ours:
            _refuse_mixed(func, args, [x for x in tensors if not isinstance(x, _OnGPU)])
            if func in _READS or (func in _COPIES and not here):
                self.waits[_line(func)] += 1
        out = func(*tree_map(_held, args), **_on_cpu(func, kwargs))
        if not here:
            return out
        out = tree_map(_wrapped, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if ours else out

    @contextmanager
    def present(self) -> Iterator[torch.device]:
        """Enter it, with what torch and fastood ask about GPUs answered."""
        everywhere = mock.patch.multiple(
            torch.cuda,
            _lazy_init=lambda: None,
            is_available=lambda: True,
            device_count=lambda: 1,
            get_device_name=lambda *_: "pretence",
            mem_get_info=lambda *_: (8 << 30, 16 << 30),
        )
        torch._C._ensureCUDADeviceGuardSet()
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        with ExitStack() as stack:
            stack.enter_context(everywhere)
            stack.enter_context(mock.patch.object(dispatch, "_refusal", _refusal))
            stack.enter_context(mock.patch.dict(lowrank._solvers, {str(DEVICE): None}))
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
            stack.enter_context(self)
            yield DEVICE


def why_no_pretence() -> str | None:
    """Why this torch cannot pretend, if it cannot."""
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        return "this torch needs a driver to make tensors that say cuda"
    return None if torch.version.cuda else "torch without CUDA"


def _refusal(device: int | None) -> str | None:
    return None if device is None else "the GPU is pretended"


def _refuse_mixed(func: Any, args: Any, others: list[Tensor]) -> None:
    if func in _COPIES:
        return
    wrong = [x for x in others if x.ndim]  # numbers go everywhere
    if func in _BY_CPU_INDEX and isinstance(args[0], _OnGPU):
        wrong = [x for x in wrong if x.is_floating_point()]
    if wrong:
        raise RuntimeError(
            f"{func}: expected all tensors on {DEVICE}, found {[tuple(x.shape) for x in wrong]} "
            "on the CPU"
        )


def _on_cpu(func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs = tree_map(_held, kwargs)
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    return {k: v for k, v in kwargs.items() if k not in ("pin_memory", "non_blocking")}


def _held(x: Any) -> Any:
    return x.held if isinstance(x, _OnGPU) else x


def _wrapped(x: Any) -> Any:
    return _OnGPU(x) if isinstance(x, Tensor) and not isinstance(x, _OnGPU) else x


def _line(func: Any) -> str:
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(_PACKAGE):
            return f"{frame.filename.removeprefix(_PACKAGE).lstrip('/')}:{frame.name}"
    return str(func)
