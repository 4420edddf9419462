"""The shipped demonstration: photographs, their classes, and nothing learned from them."""

from __future__ import annotations

ID_CLASSES = ("dress", "longsleeve", "pants", "shoes", "t-shirt")
"""In-distribution clothing classes. Fixed before the tiny model was trained."""

NEAR_OOD_CLASSES = ("hat", "outwear", "shirt", "shorts", "skirt")
"""Near-OOD clothing classes: the rest of the same collection. No photograph of any of them, in any
split, was seen in training; neither was any photograph shipped here."""
