"""Features somebody already computed: npz, npy or safetensors, never pickles."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastood.data.folder import set_name
from fastood.data.paths import FEATURE_SUFFIXES, path_text
from fastood.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from fastood.features.featureset import FeatureSet

__all__ = ["load_features"]

_MAGIC = {".npz": b"PK", ".npy": b"\x93NUMPY"}

_BLOCK = 4096  # rows per chunk: large enough for BLAS, small enough to stay in cache with K=1000


def load_features(path: Any, *, name: str | None = None, split: str | None = None) -> FeatureSet:
    """Read image features from a file.

    Args:
        path: ``.npz`` or ``.safetensors`` with ``features`` (n, D) (or ``image_features``) and,
            where known, ``labels`` (n,), ``class_names`` (K,), ``split`` (n,), ``file_names``
            (n,) and ``local`` (n, P, D); or a bare ``.npy`` of features. In safetensors, texts
            are JSON lists in the metadata. Negative labels mean "unknown".
        name: name for tables; the file's name if None.
        split: keep the rows of this split only; all rows if None.

    Returns:
        Features as stored (dtype kept, not normalised).

    Raises:
        DataError: if the file is missing, damaged, needs unpickling, lacks features, or its
            arrays do not fit together or hold rows that are zero or not finite.
    """
    import torch

    from fastood.features.featureset import FeatureChunk, FeatureSet

    file = Path(path).expanduser()
    where = path_text(file)
    arrays = _read(file, where)
    key = next((k for k in ("features", "image_features") if k in arrays), None)
    if key is None:
        raise DataError(
            f"{where}: expected an array 'features' (n, D), the file has "
            f"{', '.join(sorted(arrays)) or 'nothing'}"
        )
    image = _tensor(arrays[key], f"{where}: {key}", dimensions=2)
    local = arrays.get("local")
    n = len(image)
    local = None if local is None else _tensor(local, f"{where}: local", dimensions=3)
    if local is not None and (len(local) != n or local.shape[2] != image.shape[1]):
        raise DataError(
            f"{where}: local: expected ({n}, P, {image.shape[1]}) to match {key} "
            f"{tuple(image.shape)}, got {tuple(local.shape)}"
        )
    names = _texts(arrays.get("class_names"))
    labels = _labels(arrays.get("labels"), n, names, where)
    paths = _texts(arrays.get("file_names")) or [f"{i:0{len(str(n))}d}" for i in range(n)]
    rows = _rows_of(arrays.get("split"), split, n, where)
    if len(paths) != n:
        raise DataError(f"{where}: file_names: expected {n}, got {len(paths)}")
    if rows is not None:
        index = torch.from_numpy(rows)
        image, local = image[index], None if local is None else local[index]
        labels = None if labels is None else labels[rows]
        paths = [paths[i] for i in rows]
    _check_rows(image, where, paths)
    chunks = tuple(
        FeatureChunk(i, image[i : i + _BLOCK], None if local is None else local[i : i + _BLOCK])
        for i in range(0, len(image), _BLOCK)
    )
    stem = path_text(file.stem)
    return FeatureSet(
        name=name or (set_name(file.parent) if stem == "features" else stem),
        paths=tuple(paths),
        labels=labels,
        class_names=None if names is None else tuple(names),
        chunks=chunks,
        provenance={
            "source": where,
            "root": where,
            "layout": f"features {tuple(image.shape)} {str(image.dtype).removeprefix('torch.')}"
            + ("" if split is None else f"; split {split}"),
            "images": len(image),
            "split": split,
        },
    )


def _read(file: Path, where: str) -> dict[str, Any]:
    suffix = file.suffix.lower()
    if not file.is_file():
        raise DataError(f"{where}: no such file")
    if suffix in (".pt", ".pth", ".pkl", ".pickle", ".bin"):
        raise DataError(
            f"{where}: {suffix} files need unpickling, which can run any code; save the features "
            "as .npz or .safetensors"
        )
    if suffix not in FEATURE_SUFFIXES:
        raise DataError(
            f"{where}: expected {', '.join(FEATURE_SUFFIXES)}, got {suffix or 'no'} file"
        )
    try:
        if suffix == ".safetensors":
            return _read_safetensors(file)
        with file.open("rb") as raw:  # numpy would take anything else for a pickle
            if not raw.read(8).startswith(_MAGIC[suffix]):
                raise DataError(f"{where}: not a {suffix} file; is it damaged, or another format?")
        if suffix == ".npy":
            return {"features": np.load(file, allow_pickle=False)}
        with np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except DataError:
        raise
    except ValueError as error:
        if "pickle" in str(error).lower():
            raise DataError(
                f"{where}: holds pickled objects, which can run any code and are refused; save "
                "texts as numpy str arrays and numbers as plain arrays"
            ) from error
        raise DataError(f"{where}: cannot be read: {error}") from error
    except (OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{where}: cannot be read: {error}") from error


def _read_safetensors(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as archive:
            keys = list(archive.keys())
            arrays: dict[str, Any] = {key: archive.get_tensor(key) for key in keys}
            metadata = archive.metadata() or {}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    for key in ("class_names", "split", "file_names"):
        if key in metadata:
            arrays[key] = np.asarray(json.loads(metadata[key]), dtype=str)
    return arrays


def _tensor(values: Any, what: str, *, dimensions: int) -> Tensor:
    import torch

    if not isinstance(values, torch.Tensor):
        if values.dtype.kind != "f":
            raise DataError(f"{what}: expected floating point numbers, got {values.dtype}")
        values = torch.from_numpy(np.ascontiguousarray(values, values.dtype.newbyteorder("=")))
    if not values.is_floating_point():
        raise DataError(f"{what}: expected floating point numbers, got {values.dtype}")
    if values.ndim != dimensions or 0 in values.shape:
        shape = "(n, D)" if dimensions == 2 else "(n, P, D)"
        raise DataError(f"{what}: expected {shape}, not empty, got {tuple(values.shape)}")
    return values


def _texts(values: Any) -> list[str] | None:
    return None if values is None else [str(v) for v in np.asarray(values).reshape(-1)]


def _labels(values: Any, n: int, names: list[str] | None, where: str) -> np.ndarray | None:
    if values is None:
        return None
    labels = np.asarray(values)
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where}: labels: expected ({n},) integers, got {labels.shape} {labels.dtype}"
        )
    labels = labels.astype(np.int64)
    if names is not None and labels.max() >= len(names):
        raise DataError(
            f"{where}: labels: go up to {labels.max()}, but there are {len(names)} class names"
        )
    return np.where(labels < 0, -1, labels)


def _rows_of(values: Any, split: str | None, n: int, where: str) -> np.ndarray | None:
    if split is None:
        return None
    splits = np.asarray(_texts(values) or [])
    if splits.shape != (n,):
        raise DataError(f"split: {where} has no 'split' array with {n} rows, got split={split!r}")
    rows = np.flatnonzero(splits == split)
    if not len(rows):
        raise DataError(f"split: {where} has {', '.join(sorted(set(splits)))}, got {split!r}")
    return rows


def _check_rows(image: Tensor, where: str, paths: list[str]) -> None:
    import torch

    size = torch.linalg.vector_norm(image.float(), dim=1)
    bad = torch.nonzero(~torch.isfinite(size) | (size == 0)).flatten().tolist()
    if bad:
        raise DataError(
            f"{where}: {len(bad)} of {len(image)} rows are zero or not finite, first: row "
            f"{bad[0]} ({paths[bad[0]]})"
        )
