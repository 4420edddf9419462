"""One ID set against many OOD sets: metrics, thresholds, and a record of how they came about."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastood._version import __version__, installed
from fastood.data.imageset import ImageSet
from fastood.features.featureset import FeatureSet
from fastood.pipeline.checks import check_set_names
from fastood.pipeline.core import Pipeline, ScoredSet
from fastood.pipeline.output import OutputFolder
from fastood.report.table import ScoreTable

__all__ = ["Evaluation", "evaluate_sets"]

OpenImage = Callable[[str, str], bytes | None]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        results: JSON-ready: metrics, thresholds, provenance (``results.json``).
        table: one row per image (``scores.parquet``, ``scores.csv``).
        open_image: (set name, path) to the bytes of an image, for the report's pictures.
    """

    results: dict[str, Any]
    table: ScoreTable
    open_image: OpenImage | None = field(default=None, repr=False)

    def metric(self, ood: str, score: str, name: str) -> float:
        """One number, for example ``metric("dtd", "mcm", "AUROC")``; ``"average"`` is a set too."""
        for row in self.results["metrics"]:
            if row["set"] == ood and row["score"] == score:
                return float(row[name])
        raise KeyError(f"no metrics of {score!r} on {ood!r}")

    def save(self, folder: str | Path | OutputFolder) -> Path:
        """Write ``scores.parquet``, ``scores.csv``, ``report.html`` and, last, ``results.json``.

        ``results.json`` comes last, so that a folder that has one is complete.

        Raises:
            DataError: if the folder cannot be written or holds the results of something else.
        """
        from fastood.report import write_report

        out = folder if isinstance(folder, OutputFolder) else OutputFolder(folder)
        out.check(self.results)
        out.make()
        self.table.save(out.path)
        write_report(self.results, self.table, out.path / "report.html", open_image=self.open_image)
        out.write_json("results.json", self.results)
        return out.path

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """What ``save`` wrote; pictures are found again where the image files still are.

        Raises:
            DataError: if the folder holds no complete evaluation.
        """
        from fastood.pipeline.output import read_results
        from fastood.pipeline.pictures import opener

        results = read_results(Path(folder))
        return cls(results, ScoreTable.load(folder), opener(results))


def evaluate_sets(
    pipeline: Pipeline,
    id_set: ImageSet | FeatureSet,
    ood_sets: Sequence[ImageSet | FeatureSet],
    *,
    calibration: ImageSet | FeatureSet | None = None,
    tpr: float = 0.95,
    aupr: Literal["ap", "trapezoid"] = "ap",
    resamples: int = 1000,
    seed: int = 0,
    command: str | None = None,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Score every set once, then compare the ID set with each OOD set under every score.

    Args:
        calibration: in-distribution images, other than ``id_set``, that thresholds are taken from;
            without it they come from ``id_set`` itself, and the results say so.
        tpr: share of ID images thresholds accept, and the recall of the FPR metrics.
        aupr: how AUPR integrates, see ``fastood.metrics.evaluate``.
        resamples, seed: of the bootstrap intervals; 0 resamples leave them out (DeLong stays).
        command, notes: kept in the results.
    Raises:
        ValueError: no OOD set, or sets of one name; DataError where images cannot be used.
    """
    started = time.perf_counter()
    settings: dict[str, Any] = {"tpr": tpr, "aupr": aupr, "resamples": resamples, "seed": seed}
    plan = pipeline.plan(id_set, ood_sets, calibration=calibration, **settings)
    tpr = plan["settings"]["tpr"]
    same = calibration is None or _same_images(calibration, id_set)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        scored_id = pipeline.score(id_set)
        scored_ood = [pipeline.score(s) for s in ood_sets]
        scored_calibration = None if calibration is None else pipeline.score(calibration)
        scored = time.perf_counter()
        rows = _metric_rows(scored_id, scored_ood, tpr, aupr, resamples, seed)
        thresholds = _thresholds(scored_calibration or scored_id, same, tpr)
    for entry in {str(entry.message): entry for entry in caught}.values():  # each of them once
        warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)
    seconds = {"scores": scored - started, "metrics": time.perf_counter() - scored}

    results = {
        "schema": 1,
        "fastood": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        **plan,
        "id": {**_describe(scored_id), "accuracy": _accuracy(scored_id)},
        "ood": [_describe(found) for found in scored_ood],
        "calibration": None if scored_calibration is None else _describe(scored_calibration),
        "metrics": rows,
        "thresholds": thresholds,
        "notes": [*notes, *_notes(scored_id, same)],
        "warnings": list(dict.fromkeys(str(entry.message) for entry in caught)),
        "versions": _versions(),
        "seconds": seconds,
    }
    table = _table(pipeline, scored_id, scored_ood)
    return Evaluation(results, table, _opener([id_set, *ood_sets]))


def describe_plan(
    pipeline: Pipeline,
    id_set: ImageSet | FeatureSet,
    ood_sets: Sequence[ImageSet | FeatureSet],
    *,
    calibration: ImageSet | FeatureSet | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The part of the results that is known before any image is encoded.

    Raises:
        ValueError, TypeError: no OOD set, or sets of one name; features of another width.
        DataError, ModelError: sets that this pipeline cannot score.
    """
    check_set_names(id_set, ood_sets)
    held = [] if calibration is None else [calibration]
    pipeline.check(id_set, *ood_sets, *held)
    return {
        "model": _model(pipeline),
        "prompts": {
            "templates": list(pipeline.templates),
            "class_names": list(pipeline.class_names),
            "digest": pipeline.digest,
            "warnings": list(pipeline.warnings),
        },
        "scores": _scores(pipeline),
        "id": _source(id_set),
        "ood": [_source(s) for s in ood_sets],
        "calibration": None if calibration is None else _source(calibration),
        "settings": dict(settings),
    }


def _source(given: ImageSet | FeatureSet) -> dict[str, Any]:
    """Name, place and layout of a set, as they are before and after it is encoded."""
    if isinstance(given, ImageSet):
        root, layout = given.root, given.layout
    else:
        root = str(given.provenance.get("root", ""))
        layout = str(given.provenance.get("layout", "features"))
    if root and Path(root).exists():  # a report made later, elsewhere, finds the pictures
        root = str(Path(root).absolute())
    return {"name": given.name, "root": root, "layout": layout}


def _same_images(one: ImageSet | FeatureSet, other: ImageSet | FeatureSet) -> bool:
    if one is other:
        return True
    paths = [
        s.paths if isinstance(s, FeatureSet) else tuple(i.path for i in s) for s in (one, other)
    ]
    sources = [_source(s) for s in (one, other)]
    return (
        paths[0] == paths[1]
        and bool(sources[0]["root"])
        and (sources[0]["root"] == sources[1]["root"])
    )


def _metric_rows(
    scored_id: ScoredSet,
    scored_ood: Sequence[ScoredSet],
    tpr: float,
    aupr: Literal["ap", "trapezoid"],
    resamples: int,
    seed: int,
) -> list[dict[str, Any]]:
    from fastood.metrics import average, evaluate

    rows: list[dict[str, Any]] = []
    each: dict[str, list[Any]] = {label: [] for label in scored_id.scores}
    for ood in scored_ood:
        enough = min(len(scored_id), len(ood)) >= 2
        for label, id_scores in scored_id.scores.items():
            found = evaluate(
                id_scores,
                ood.scores[label],
                tpr=tpr,
                aupr=aupr,
                intervals=(True if resamples else "delong") if enough else None,
                resamples=resamples or 1000,
                seed=seed,
            )
            each[label].append(found)
            rows.append({"set": ood.features.name, "score": label, **found.as_dict()})
    if len(scored_ood) > 1:
        for label, found_all in each.items():
            rows.append({"set": "average", "score": label, **average(found_all).as_dict()})
    return rows


def _thresholds(scored: ScoredSet, same: bool, tpr: float) -> dict[str, Any]:
    from fastood.calibration import calibrate

    source = f"{scored.features.name} ({len(scored)} images)"
    if same:
        source += ", the evaluated ID images themselves: their acceptance is tpr by construction"
    return {
        label: {**calibrate(values, tpr=tpr).as_dict(), "source": source}
        for label, values in scored.scores.items()
    }


def _model(pipeline: Pipeline) -> dict[str, Any]:
    encoder = pipeline.encoder
    if encoder is None:
        return {
            "name": "features given",
            "fingerprint": None,
            "logit_scale": pipeline.logit_scale,
            "logit_bias": 0.0,
            "embed_dim": None,
            "device": "cpu",
            "dtype": "as given",
            "preprocess": None,
        }
    adapted = bool(pipeline.adaptations)
    return {
        "name": encoder.name,
        "fingerprint": pipeline.model_fingerprint,
        "logit_scale": encoder.logit_scale,
        "logit_bias": encoder.logit_bias,
        "embed_dim": encoder.embed_dim,
        "device": str(encoder.device),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "preprocess": encoder.preprocess_id,
        **({"adapted": [_brief(made) for made in pipeline.adaptations]} if adapted else {}),
    }


def _brief(made: Mapping[str, Any]) -> str:
    """An adaptation in a line: a report has the rest from its file."""
    return f"{made['method']} ({made['digest']})"


def _scores(pipeline: Pipeline) -> dict[str, Any]:
    formulas = pipeline.formulas()
    return {
        label: {
            "name": key.score,
            "options": dict(key.options),
            "higher": "id",
            "formula": formulas[label][0],
            "source": formulas[label][1],
        }
        for label, key in pipeline.keys().items()
    }


def _describe(scored: ScoredSet) -> dict[str, Any]:
    features = scored.features
    return {
        **_source(features),
        "images": len(features),
        "encoded": features.encoded,
        "skipped": [{"path": s.path, "reason": s.reason} for s in features.skipped],
    }


def _accuracy(scored: ScoredSet) -> dict[str, Any] | None:
    if scored.labels is None or not (scored.labels >= 0).any():
        return None
    from fastood.metrics import accuracy

    known = scored.labels >= 0
    return accuracy(scored.predicted[known], scored.labels[known]).as_dict()


def _notes(scored_id: ScoredSet, same: bool) -> list[str]:
    notes = []
    if scored_id.features.labels is not None and scored_id.labels is None:
        notes.append(
            "ID accuracy is not given: the ID set's classes are not the classes that were prompted."
        )
    if same:
        notes.append(
            "Thresholds come from the evaluated ID images themselves; give a separate calibration "
            "set to see how they hold on new images."
        )
    return notes


def _table(pipeline: Pipeline, scored_id: ScoredSet, scored_ood: Sequence[ScoredSet]) -> ScoreTable:
    sets = [(scored_id, "id"), *((s, "ood") for s in scored_ood)]
    own = np.asarray(pipeline.class_names, dtype=object)
    columns: dict[str, list[Any]] = {
        k: [] for k in ("set", "role", "path", "label", "class_name", "predicted")
    }
    for scored, role in sets:
        features, n = scored.features, len(scored)
        columns["set"] += [features.name] * n
        columns["role"] += [role] * n
        columns["path"] += list(features.paths)
        labels = features.labels if role == "ood" or scored.labels is None else scored.labels
        names = features.class_names if labels is features.labels else tuple(own)
        for y in [-1] * n if labels is None else labels.tolist():
            columns["label"].append(None if y < 0 else y)
            columns["class_name"].append(None if y < 0 or names is None else names[y])
        columns["predicted"] += own[scored.predicted].tolist()
    return ScoreTable.from_columns(
        **columns,
        scores={
            label: np.concatenate([s.scores[label].values for s, _ in sets])
            for label in scored_id.scores
        },
    )


def _opener(sets: Sequence[ImageSet | FeatureSet]) -> OpenImage:
    readers: Mapping[str, Mapping[str, Callable[[], bytes]]] = {
        s.name: {item.path: item.read for item in s} for s in sets if isinstance(s, ImageSet)
    }

    def open_image(set_name: str, path: str) -> bytes | None:
        read = readers.get(set_name, {}).get(path)
        return None if read is None else read()

    return open_image


def _versions() -> dict[str, str]:
    packages = ("torch", "open_clip_torch", "transformers", "timm", "pillow", "numpy")
    found = {package: version for package in packages if (version := installed(package))}
    return {"python": platform.python_version(), "platform": platform.platform(), **found}
