"""``fastood eval``, ``fastood report`` and ``fastood demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastood.cli import inputs, show
from fastood.cli import options as o
from fastood.cli.request import Request

__all__ = ["demo", "evaluate", "report"]


def evaluate(
    typed: typer.Context,
    id: Annotated[
        str,
        typer.Option(
            help="In-distribution images: a folder (class subfolders give labels), list file, "
            "CoOp split, tar shards, or features; [bold]PATH[/], [bold]NAME=PATH[/], "
            "[bold]PATH@SPLIT[/] where a set has several."
        ),
    ],
    ood: Annotated[
        list[str],
        typer.Option(help="Out-of-distribution set, likewise; repeat for more, or a collection."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for results.json, scores.*, report.html.")
    ] = Path("fastood-eval"),
    model: o.Model = "ViT-B-16/openai",
    score: o.ScoreNames = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Further in-distribution images that thresholds are taken from."),
    ] = None,
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
    tpr: o.Tpr = 0.95,
    aupr: Annotated[str, typer.Option(help="ap (MCM) or trapezoid (OpenOOD, pytorch-ood).")] = "ap",
    bootstrap: Annotated[
        int, typer.Option(help="Resamples for intervals of FPR and AUPR; 0 for none.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results of another evaluation.")
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
) -> None:
    """Score one ID set against OOD sets: table, results.json, per-image scores, report.html.

    Every set is encoded once, however many scores are asked, and kept: a run that is interrupted
    or killed continues where it stopped when the same command is given again.
    """
    from fastood.pipeline.checks import check_set_names, check_settings
    from fastood.pipeline.output import OutputFolder

    options: dict[str, Any] = {"tpr": tpr, "aupr": aupr, "resamples": bootstrap, "seed": seed}
    check_settings(**options)
    methods = inputs.parse_scores(score) if score else None
    folder = OutputFolder(out, overwrite=overwrite)
    id_set, names = inputs.read_named_set(id, classes, match=class_match, limit=limit)
    ood_sets = inputs.read_sets(ood, limit=limit)
    check_set_names(id_set, ood_sets)
    held = None
    if calibration is not None:
        held = inputs.read_set(calibration, limit=limit)
    request = Request.of(
        typed.params,
        scores=methods,
        class_names=names,
        named=classes is not None,
    )
    sets = [id_set, *ood_sets, *([] if held is None else [held])]
    with request.pipeline(sets) as pipeline:
        folder.check(pipeline.plan(id_set, ood_sets, calibration=held, **options))
        found = pipeline.evaluate(
            id_set,
            ood_sets,
            calibration=held,
            **options,
            command=show.typed(),
        )
    found.save(folder)
    _finish(found.results, folder.path, json=json)


def report(
    folder: Annotated[Path, typer.Argument(help="Where `fastood eval` wrote its results.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Another file for the report.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="Score that orders the picture galleries.")
    ] = None,
    table: Annotated[
        str | None, typer.Option(help="Print the table as markdown, latex or csv instead.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Also write a figure (png, pdf, svg).")
    ] = None,
) -> None:
    """Write report.html again from saved results, or print their table for a paper."""
    from fastood.metrics.ranks import check_choice
    from fastood.pipeline import Evaluation
    from fastood.report import save_figure, to_csv, to_latex, to_markdown, write_report

    if table is not None:
        check_choice("--table", table, ("markdown", "latex", "csv"))
    if figure is not None:
        check_choice("--figure: suffix", figure.suffix.lower(), (".png", ".pdf", ".svg"))
    found = Evaluation.load(folder)
    if table is not None:
        render = {"markdown": to_markdown, "latex": to_latex, "csv": to_csv}[table]
        sys.stdout.write(render(found.results).rstrip("\n") + "\n")
        return
    target = write_report(
        found.results,
        found.table,
        out or folder / "report.html",
        open_image=found.open_image,
        score=score,
    )
    show.line(f"report: {target}")
    if figure is not None:
        show.line(f"figure: {save_figure(found.results, found.table, figure)}")


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path(
        "fastood-demo"
    ),
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """The whole chain on shipped CC0 photographs and the shipped tiny model: no download.

    Five clothing classes are in-distribution; other clothing (near), scikit-image photographs and
    handwritten characters (far) are not. Thresholds come from photographs of their own.
    """
    from fastood.demo.run import run_demo

    with show.progress(quiet=quiet) as bar:
        found = run_demo(out, progress=bar)
    _finish(found.results, out, json=json)


def _finish(results: dict[str, Any], folder: Path, *, json: bool) -> None:
    if json:
        show.print_json(results)
        return
    from fastood.report import print_results

    print_results(results, console=show.console())
    for line in results["notes"]:
        show.note(line)
    held = [results["calibration"]] if results.get("calibration") else []
    skipped = sum(len(s["skipped"]) for s in [results["id"], *results["ood"], *held])
    if skipped:
        show.note(f"{skipped} files could not be read and were left out; the report lists them")
    show.line(f"report: {folder / 'report.html'}")
