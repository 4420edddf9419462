"""``fastood score`` and ``fastood calibrate``: from a folder to numbers and decisions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastood.cli import inputs, show
from fastood.cli import options as o
from fastood.cli.request import Request

if TYPE_CHECKING:
    import numpy as np

    from fastood.calibration import Threshold
    from fastood.pipeline import ScoredSet

__all__ = ["calibrate", "score"]


def calibrate(
    typed: typer.Context,
    id: Annotated[
        str,
        typer.Option(help="In-distribution images that were used for nothing else."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the threshold goes.")] = Path(
        "threshold.json"
    ),
    model: o.Model = "ViT-B-16/openai",
    score: Annotated[
        str, typer.Option(help="One score, with options if any: mcm, energy:tau=0.02.")
    ] = "mcm",
    tpr: o.Tpr = 0.95,
    classes: o.Classes = None,
    class_match: o.ClassMatch = "name",
    adapt: o.Adapt = None,
    templates: o.Templates = None,
    text_features: o.TextFeatures = None,
    allow_duplicates: o.AllowDuplicates = False,
    negatives: o.Negatives = None,
    groups: o.Groups = 100,
    train: o.Train = None,
    pretrained: o.Pretrained = None,
    checkpoint: o.Checkpoint = None,
    allow_pickle: o.AllowPickle = False,
    limit: o.Limit = None,
    device: o.Device = None,
    dtype: o.Dtype = "float32",
    batch_size: o.BatchSize = 64,
    workers: o.Workers = None,
    cache: o.CacheFolder = None,
    no_cache: o.NoCache = False,
    verify: o.Verify = False,
    strict: o.Strict = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Find the threshold that accepts a share --tpr of in-distribution images, and save it."""
    from fastood.calibration import conformal_rank
    from fastood.pipeline.output import OutputFolder

    conformal_rank(1, tpr)  # refuses an impossible share now
    if out.is_dir():
        raise ValueError(f"--out {out}: expected a file for the threshold, got a folder")
    methods = inputs.parse_scores([score])
    if len(methods) != 1:
        raise ValueError(f"--score: a threshold is for one score, got {', '.join(methods)}")
    OutputFolder(out.parent)
    images, names = inputs.read_named_set(id, classes, match=class_match, limit=limit)
    request = Request.of(
        typed.params,
        scores=methods,
        class_names=names,
        named=classes is not None,
    )
    with request.pipeline([images]) as pipeline:
        found = pipeline.calibrate(images, tpr=tpr)
    if checkpoint is not None:
        found = dataclasses.replace(
            found, recipe={**found.recipe, "model": model, "checkpoint": checkpoint}
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    found.save(out)
    if json:
        show.print_json(found.as_dict())
        return
    show.line(found.describe())
    show.line(f"threshold: {out}")


def score(
    typed: typer.Context,
    images: Annotated[
        str, typer.Argument(help="Folder, list, tar shards or features, as for eval --id.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for scores.csv and scores.parquet."),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            help="Saved threshold: adds the decision, and fills in model, classes, template and "
            "score where they are not given."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="As for eval. Default: the threshold's, or ViT-B-16/openai.")
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option("--score", help="As for eval. Default: the threshold's, or mcm."),
    ] = None,
    classes: o.Classes = None,
    adapt: o.Adapt = None,
    templates: o.Templates = None,
    text_features: o.TextFeatures = None,
    allow_duplicates: o.AllowDuplicates = False,
    negatives: o.Negatives = None,
    groups: o.Groups = 100,
    train: o.Train = None,
    pretrained: o.Pretrained = None,
    checkpoint: o.Checkpoint = None,
    allow_pickle: o.AllowPickle = False,
    limit: o.Limit = None,
    fail_on_ood: Annotated[
        bool, typer.Option("--fail-on-ood", help="Exit with 3 if any image is OOD.")
    ] = False,
    device: o.Device = None,
    dtype: o.Dtype = "float32",
    batch_size: o.BatchSize = 64,
    workers: o.Workers = None,
    cache: o.CacheFolder = None,
    no_cache: o.NoCache = False,
    verify: o.Verify = False,
    strict: o.Strict = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> int:
    """Score a folder: one row per image, with the decision if a threshold is given."""
    from fastood.calibration import Threshold
    from fastood.pipeline.output import OutputFolder
    from fastood.pipeline.screening import Screening

    decide = None if threshold is None else Threshold.load(threshold)
    if fail_on_ood and decide is None:
        raise ValueError("--fail-on-ood: a decision needs --threshold FILE")
    methods = inputs.parse_scores(score) if score else None
    recipe: dict[str, Any] = {} if decide is None else dict(decide.recipe)
    if methods is None and decide is not None and decide.score is not None:
        # what the pipeline adds to the options of fitted and grouped scores is found again there
        options = {k: v for k, v in decide.options.items() if k not in ("fit", "groups")}
        methods = {decide.score: (decide.score, options)}
        groups = decide.options.get("groups", groups)
    if methods is None:
        methods = {"mcm": ("mcm", {})}
    folder = None if out is None else OutputFolder(out)
    given, names = inputs.read_named_set(images, None, match="name", limit=limit)
    adapt = adapt or recipe.get("adapt") or None
    own = inputs.adapted_classes(adapt)
    if classes is not None:
        names = inputs.read_class_names(classes)
    elif own is not None:
        names = own
    elif recipe.get("class_names"):
        names = tuple(recipe["class_names"])
        allow_duplicates = True  # they were allowed when the threshold was made
    elif names is not None and text_features is None:
        show.note(
            f"the classes are the {len(names)} subfolders of {images}; --classes names others"
        )
    if model is None:
        features = text_features is not None or ("model" in recipe and recipe["model"] is None)
        model = recipe.get("model") or ("none" if features else "ViT-B-16/openai")
    request = Request.of(
        typed.params,
        model=model,
        scores=methods,
        class_names=names,
        named=classes is not None,
        templates=templates or recipe.get("templates") or None,
        allow_duplicates=allow_duplicates,
        groups=groups,
        checkpoint=checkpoint or recipe.get("checkpoint"),
        adapt=adapt,
    )
    with request.pipeline([given]) as pipeline:
        if decide is not None:
            label = _deciding(pipeline.keys(), decide)
        scored = pipeline.score(given)
        is_ood = None if decide is None else decide.is_ood(scored.scores[label])
        found = Screening.of(scored, pipeline.class_names, is_ood)
    if folder is not None:
        found.save(folder)
    _print(found, scored, is_ood, json=json)
    if folder is not None and not json:
        show.line(f"table: {folder.path / 'scores.csv'}")
    return 3 if fail_on_ood and is_ood is not None and bool(is_ood.any()) else 0


def _deciding(keys: Any, threshold: Threshold) -> str:
    """The label the threshold is for; refuses before encoding if there is none."""
    import numpy as np

    from fastood.scores.result import Scores

    same = [label for label, key in keys.items() if key.score == threshold.score]
    if not same:
        raise ValueError(
            f"--threshold: it is for {threshold.score!r}, and the scores asked for are "
            f"{', '.join(keys)}"
        )
    # an empty set of scores has a key all the same: whatever differs is named now
    failure: ValueError | None = None
    for label in same:
        try:
            threshold.is_ood(Scores(np.zeros(0, dtype=np.float32), "id", keys[label]))
            return label
        except ValueError as error:
            failure = error
    raise ValueError(f"--threshold: {failure}")


def _print(found: Any, scored: ScoredSet, is_ood: np.ndarray | None, *, json: bool) -> None:
    skipped = scored.features.skipped
    if json:
        show.print_json(
            {
                "images": found.rows(),
                "skipped": [{"path": s.path, "reason": s.reason} for s in skipped],
            }
        )
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in found.columns:
        table.add_column(column, overflow="fold")
    shown = found.rows()[:40]
    for row in shown:
        cells = [f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()]
        style = "red" if row.get("decision") == "ood" else ""
        table.add_row(*(Text(cell) for cell in cells), style=style)
    out = show.console()
    out.print(table)
    if len(found) > len(shown):
        out.print(f"... {len(found) - len(shown)} more; --out FOLDER keeps them all")
    for s in skipped:
        show.note(f"left out: {s.path}: {s.reason}")
    if is_ood is not None:
        out.print(f"{int(is_ood.sum())} of {len(is_ood)} images are out of distribution")
