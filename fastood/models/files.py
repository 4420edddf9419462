"""Weight files: found in the local cache or on the Hub, and read without running their code."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from fastood.errors import ModelError, WeightsUnavailable

__all__ = [
    "cached_hub_file",
    "check_readable_format",
    "hub_file",
    "load_strict",
    "no_network",
    "read_state_dict",
    "unavailable",
]

_PICKLED = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def unavailable(what: str, reason: object) -> WeightsUnavailable:
    """The error for weights that cannot be reached, with what works without a network."""
    from fastood.models.catalogue import list_models

    cached = [m.name for m in list_models() if m.cached and not m.bundled]
    have = ", ".join(cached[:6]) + (", ..." if len(cached) > 6 else "") if cached else "none"
    short = " ".join(str(reason).split())
    return WeightsUnavailable(
        f"{what}: weights could not be reached ({short[:200]}). Without a network, use "
        f"checkpoint='/path/to/weights.safetensors' with the architecture as name, a model in the "
        f"local cache ({have}), or 'fastood-tiny', which ships with fastood."
    )


def cached_hub_file(repo: str, names: Iterable[str], cache_dir: str | None = None) -> str | None:
    """The first of ``names`` that the local Hugging Face cache holds, or None. No network."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        found = try_to_load_from_cache(repo, name, cache_dir=cache_dir)
        if isinstance(found, str):
            return found
    return None


def hub_file(repo: str, names: Iterable[str], *, cache_dir: str | None = None) -> str:
    """Path of the first of ``names`` in ``repo``: from the cache, else downloaded.

    Raises:
        WeightsUnavailable: if neither is possible.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    names = tuple(names)
    try:
        found = cached_hub_file(repo, names, cache_dir)
    except HFValidationError as error:
        raise ModelError(
            f"{repo}: neither a folder that exists here nor the name of a Hub repository "
            f"(organisation/name)"
        ) from error
    if found is not None:
        return found
    reason = no_network()
    if reason is not None:
        raise unavailable(repo, reason)
    last: Exception | None = None
    for name in names:
        try:
            return hf_hub_download(repo, name, cache_dir=cache_dir)
        except LocalEntryNotFoundError as error:  # no connection
            raise unavailable(repo, error) from error
        except EntryNotFoundError as error:  # this repository keeps another file name
            last = error
        except Exception as error:  # the Hub client lets several HTTP libraries' errors through
            raise unavailable(repo, error) from error
    raise unavailable(repo, f"it holds none of {', '.join(names)}") from last


def no_network() -> str | None:
    """Why the Hub cannot be reached, found in milliseconds instead of its client's 20 s of retries.

    Behind a proxy names need not resolve here, so the client is left to try.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError as error:
        return f"{address.hostname}: {error}"
    return None


def check_readable_format(path: str | Path, *, allow_pickle: bool) -> None:
    """Refuse pickled checkpoints unless they are explicitly allowed."""
    suffix = Path(path).suffix.lower()
    if suffix == ".safetensors":
        return
    if suffix not in _PICKLED:
        raise ModelError(
            f"checkpoint {path}: expected a .safetensors file (or, with allow_pickle=True, one of "
            f"{', '.join(_PICKLED)}), got {suffix or 'no suffix'}"
        )
    if not allow_pickle:
        raise ModelError(
            f"checkpoint {path}: expected .safetensors, got {suffix}, which must be unpickled and "
            f"can carry code. Convert it to safetensors, or, if you trust its source, pass "
            f"allow_pickle=True (it is then read with weights_only=True)"
        )


def read_state_dict(path: str | Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint on the CPU.

    A wrapping ``state_dict`` or ``model`` entry and a ``module.`` prefix are removed.

    Raises:
        WeightsUnavailable: if there is no such file.
        ModelError: if it is pickled and that is not allowed, is damaged, or is not a state dict.
    """
    path = Path(path)
    check_readable_format(path, allow_pickle=allow_pickle)
    if not path.is_file():
        raise WeightsUnavailable(f"checkpoint {path}: no such file")
    state: object
    if path.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(path, device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(
                f"checkpoint {path}: not a readable safetensors file ({error}); "
                f"was the download cut short?"
            ) from error
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            short = " ".join(str(error).split())[:160]
            raise ModelError(
                f"checkpoint {path}: cannot be read with weights_only=True ({short}); it holds "
                f"more than tensors (a TorchScript archive or whole objects) or is damaged. Save "
                f"its state_dict as safetensors where you trust it"
            ) from error
    return _tensors_of(state, path)


def _tensors_of(state: object, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state:
        raise ModelError(f"checkpoint {path}: expected named tensors, got {type(state).__name__}")
    bad = [str(k) for k, v in state.items() if not isinstance(v, Tensor)]
    if bad:
        raise ModelError(f"checkpoint {path}: not tensors: {', '.join(bad[:5])}")
    if all(str(k).startswith("module.") for k in state):
        state = {str(k)[len("module.") :]: v for k, v in state.items()}
    return {str(k): v for k, v in state.items()}


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load ``state`` with no name missing, left over or of another shape.

    Raises:
        ModelError: naming the first differences.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in sorted(own.keys() & state.keys())
        if own[k].shape != state[k].shape
    ]
    if missing or extra or shapes:
        parts = [
            f"{len(found)} {what} ({'; '.join(found[:3])}{'; ...' if len(found) > 3 else ''})"
            for what, found in (("missing", missing), ("unknown", extra), ("misshapen", shapes))
            if found
        ]
        raise ModelError(
            f"{source}: does not fit the architecture: {', '.join(parts)}. "
            f"Was it saved from another architecture or as only one tower?"
        )
    module.load_state_dict(state, strict=True)
