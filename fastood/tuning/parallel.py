"""Several processes that train as one: sums, shares, and rows gathered with their gradient.

Nothing here averages. A loss is Σ numerator / Σ count over all images of all processes, and its
gradient is the sum of every process's gradient, so the result is that of one process with the
whole batch.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["World"]

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The processes that train together; the default is one process alone.

    Every method but ``part`` is collective: all processes call it, in the same order.

    Attributes:
        rank: number of this process, 0..size - 1.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ValueError(
                f"rank: expected 0 <= rank < size, got rank {self.rank} of size {self.size}"
            )

    @classmethod
    def alone(cls) -> World:
        """One process."""
        return cls()

    @classmethod
    def from_environment(cls, backend: str | None = None) -> World:
        """The processes that ``torchrun`` started; alone if it started none.

        Joins the default process group if that has not happened yet: with ``nccl`` on GPUs (each
        process takes the GPU of its ``LOCAL_RANK``), else with ``gloo``, which is left again when
        the process ends.

        Raises:
            ValueError: if only some of torchrun's variables are set, or WORLD_SIZE > 1 and this
                torch was built without distributed support.
        """
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        found = [name for name in _ENVIRONMENT if os.environ.get(name)]
        if "WORLD_SIZE" not in found or os.environ["WORLD_SIZE"] == "1":
            return cls()
        missing = [name for name in _ENVIRONMENT if name not in found]
        if missing:
            raise ValueError(
                f"environment: WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} "
                "not set; start the processes with torchrun, or unset WORLD_SIZE for one process"
            )
        if not dist.is_available():
            raise ValueError(
                f"environment: WORLD_SIZE is {os.environ['WORLD_SIZE']}, but this torch has no "
                "distributed support; unset WORLD_SIZE to train in one process"
            )
        if backend is None:
            backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend)
        if dist.get_backend() == "gloo":
            atexit.register(_leave)
        return cls(dist.get_rank(), dist.get_world_size())

    def part(self, n: int) -> slice:
        """This process's share of n rows: consecutive, sizes differ by at most one, maybe none."""
        return _share(n, self.rank, self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, without gradient; half precision is summed in float32."""
        if self.size == 1:
            return tensor.detach()
        wide = self._sendable(tensor).clone()
        _distributed().all_reduce(wide)
        return wide.to(tensor)

    def gather_rows(self, part: Tensor, n: int) -> Tensor:
        """All n rows from every process's ``world.part(n)``, (n, ...), differentiable.

        Each process's loss depends on all rows, so the backward pass sums the gradients of the
        rows over the processes and hands every process those of its own rows. Parts may be uneven
        and empty.

        Args:
            part: the rows ``part(n)`` of this process.
            n: rows of all processes together.

        Raises:
            ValueError: if ``part`` does not have as many rows as ``part(n)``.
        """
        own = self.part(n)
        if len(part) != own.stop - own.start:
            raise ValueError(
                f"part: expected {own.stop - own.start} of {n} rows in process {self.rank} of "
                f"{self.size}, got {len(part)}"
            )
        if self.size == 1:
            return part
        if torch.is_grad_enabled() and not part.requires_grad:
            # An empty part may come without a graph; its process still has to take part in the
            # backward pass, or the others wait for it forever.
            part = part.detach().requires_grad_()
        return _GatherRows.apply(part, n, self)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            self.sum(torch.zeros(1))

    def _sendable(self, tensor: Tensor) -> Tensor:
        """Where the backend can send it, contiguous; half precision as float32, which is exact."""
        tensor = tensor.detach()
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()  # not every backend knows every half type
        if _distributed().get_backend() == "nccl":
            tensor = tensor.cuda()
        return tensor.contiguous()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, n: int, world: World) -> Tensor:
        ctx.world, ctx.own = world, world.part(n)
        sizes = [_share(n, rank, world.size) for rank in range(world.size)]
        longest = sizes[0].stop - sizes[0].start
        rows = world._sendable(part)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows  # all_gather takes equal shapes
        parts = [torch.empty_like(padded) for _ in range(world.size)]
        _distributed().all_gather(parts, padded)
        kept = [p[: s.stop - s.start] for p, s in zip(parts, sizes, strict=True)]
        return torch.cat(kept).to(part)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.world.sum(grads[0].contiguous())[ctx.own], None, None


def _share(n: int, rank: int, size: int) -> slice:
    base, extra = divmod(n, size)
    start = rank * base + min(rank, extra)
    return slice(start, start + base + (rank < extra))


def _leave() -> None:
    """Ends gloo's threads while Python still runs.

    One that lets go of a tensor while the interpreter shuts down aborts the process, results
    written or not (pytorch/pytorch#179291). NCCL has no such threads, and ending it waits for
    processes that may have failed.
    """
    if _distributed().is_initialized():
        _distributed().destroy_process_group()


def _distributed() -> Any:
    import torch.distributed as dist

    return dist
