"""Labelled images to search with."""

from __future__ import annotations

import pytest

from fastood.data.imageset import ImageSet
from tests.setar.searches import noise_images


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> ImageSet:
    return noise_images(tmp_path_factory.mktemp("id"))
