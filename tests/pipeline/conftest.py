"""Small sets, a toy tower, and class features that belong to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastood.features.featureset import FeatureChunk, FeatureSet
from tests.conftest import clip_like


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test touches the cache of whoever runs the tests."""
    folder = tmp_path_factory.getbasetemp() / "shared-cache"
    monkeypatch.setenv("FASTOOD_CACHE", str(folder))
    return folder


NAMES = tuple(f"thing {k}" for k in range(6))


def feature_set(
    name: str, n: int, *, seed: int, labelled: bool = True, local: int = 0, names=NAMES
) -> FeatureSet:
    """CLIP-like features of ``n`` made-up images with their labels."""
    image, _, labels = clip_like(n, 6, 16, seed=seed)
    patches = None
    if local:
        generator = torch.Generator().manual_seed(seed + 1)
        patches = image[:, None] + torch.randn(n, local, 16, generator=generator)
    half = n // 2
    cuts = [(0, half), (half, n)]
    return FeatureSet(
        name=name,
        paths=tuple(f"{name}/{i:04d}.png" for i in range(n)),
        labels=labels.numpy().astype(np.int64) if labelled else None,
        class_names=names if labelled else None,
        chunks=tuple(
            FeatureChunk(a, image[a:b], None if patches is None else patches[a:b])
            for a, b in cuts
            if b > a
        ),
        provenance={"root": f"/nowhere/{name}.npz", "layout": "features"},
    )


@pytest.fixture(scope="session")
def text() -> torch.Tensor:
    return clip_like(1, 6, 16, seed=0)[1]


@pytest.fixture(scope="session")
def id_set() -> FeatureSet:
    return feature_set("id", 80, seed=0)


@pytest.fixture(scope="session")
def ood_set() -> FeatureSet:
    return feature_set("far", 50, seed=3, labelled=False)
