"""Images and prompts to features: encoded once, kept in a content-addressed cache."""

from fastood.features.cache import FeatureCache
from fastood.features.encode import encode_images
from fastood.features.featureset import FeatureChunk, FeatureSet, Skipped
from fastood.features.text import encode_classes, prompts_digest

__all__ = [
    "FeatureCache",
    "FeatureChunk",
    "FeatureSet",
    "Skipped",
    "encode_classes",
    "encode_images",
    "prompts_digest",
]
