"""The state of a training run in one file: parameters, optimiser, counters, history. No pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastood.atomic import replacing
from fastood.data.paths import path_text
from fastood.errors import DataError

__all__ = [
    "Checkpoint",
    "load_module_state",
    "load_optimizer_state",
    "module_state",
    "optimizer_state",
    "read_checkpoint",
    "write_checkpoint",
]

_FORMAT, _VERSION = "fastood-training", 1


@dataclass(frozen=True)
class Checkpoint:
    """Attributes: tensors by name, and everything else as JSON values."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write_checkpoint(file: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint that replaces the one before it whole, or not at all.

    Raises:
        DataError: if it cannot be written.
    """
    from safetensors.torch import save_file

    # Own memory for each: safetensors refuses tensors that share theirs.
    held = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    metadata = {"format": _FORMAT, "version": str(_VERSION), "state": json.dumps(state)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            save_file(held, temporary, metadata)
    except OSError as error:
        raise DataError(
            f"{path_text(file)}: cannot be written: {error.strerror or error}"
        ) from error


def read_checkpoint(file: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        DataError: if it is missing, damaged, of another kind, or of a newer version.
    """
    from safetensors import SafetensorError, safe_open

    where = path_text(file)
    if not file.is_file():
        raise DataError(f"{where}: no such checkpoint")
    try:
        with safe_open(file, framework="pt") as archive:
            metadata = archive.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise DataError(
                    f"{where}: expected the state of a training run, got a file of format "
                    f"{metadata.get('format')!r}"
                )
            if int(metadata["version"]) > _VERSION:
                raise DataError(
                    f"{where}: was written by a newer fastood (version {metadata['version']} of "
                    f"the format, this one reads {_VERSION})"
                )
            # Copies: the file is replaced while the run goes on.
            tensors = {name: archive.get_tensor(name).clone() for name in archive.keys()}  # noqa: SIM118
            state = json.loads(metadata["state"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: is damaged ({error}); start anew in another folder") from error
    return Checkpoint(tensors, state)


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """What training can change: parameters that train, and buffers that are saved."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: t for name, t in module.state_dict().items() if name not in frozen}


def load_module_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved values into the module, in place.

    Raises:
        DataError: if names or shapes differ.
    """
    own = module_state(module)
    wrong = sorted(set(own) ^ set(tensors))
    wrong += [n for n in own if n in tensors and own[n].shape != tensors[n].shape]
    if wrong:
        raise DataError(
            f"checkpoint: expected the tensors of this method, {len(wrong)} are missing, unknown "
            f"or of another shape: {', '.join(wrong[:5])}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def optimizer_state(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """Momentum and moments as ``parameter/key`` tensors; ``names`` in the optimiser's order."""
    saved = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{key}": torch.as_tensor(value)
        for index, values in saved.items()
        for key, value in values.items()
        if value is not None
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of :func:`optimizer_state`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        state.setdefault(names.index(name), {})[field] = tensor.clone()
    content = optimizer.state_dict()
    content["state"] = state
    optimizer.load_state_dict(content)
