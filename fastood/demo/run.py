"""The demonstration: shipped photographs, shipped model, the same pipeline everyone else uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastood.demo import CALIBRATION, FAR_OOD, ID, ID_CLASSES, NEAR_OOD, photo_folder

if TYPE_CHECKING:
    from fastood.features.encode import Progress
    from fastood.pipeline import Evaluation

__all__ = ["run_demo"]

NOTES = (
    "The model is a CLIP of a few million parameters trained on small pictures; its numbers show "
    "how the tools work, not how well vision-language models detect OOD images.",
    "NegLabel is left out: negative labels are mined from tens of thousands of words, and this "
    "model knows a few dozen.",
    "Near-OOD classes and every photograph shown here were kept out of its training.",
)


def run_demo(out: str | Path, *, progress: Progress | None = None) -> Evaluation:
    """Images → features (global and local) → scores → metrics → thresholds → report.

    Args:
        out: folder for the results; an earlier demo there is replaced.
        progress: as for ``Pipeline``.
    """
    from fastood.data import load_images
    from fastood.features import FeatureCache
    from fastood.models import load_model
    from fastood.pipeline import Pipeline
    from fastood.pipeline.output import OutputFolder

    folder = OutputFolder(out, overwrite=True)
    pipeline = Pipeline(
        load_model("fastood-tiny", device="cpu"),
        ID_CLASSES,
        cache=FeatureCache(folder.path / "cache"),
        progress=progress,
    )
    found = pipeline.evaluate(
        load_images(photo_folder(ID), name="clothing", class_names=list(ID_CLASSES)),
        [
            load_images(photo_folder(NEAR_OOD), name="near: other clothing"),
            load_images(photo_folder(FAR_OOD[0]), name="far: scikit-image"),
            load_images(photo_folder(FAR_OOD[1]), name="far: Omniglot"),
        ],
        calibration=load_images(photo_folder(CALIBRATION), name="held-out clothing"),
        command="fastood demo",
        notes=NOTES,
    )
    found.save(folder)
    return found
