from __future__ import annotations

from pathlib import Path

import pytest

from fastood.features import FeatureCache
from tests.features.toy_encoder import ToyEncoder


@pytest.fixture
def encoder() -> ToyEncoder:
    return ToyEncoder()


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")
