"""``fastood search setar``: a model and labelled images in, a recipe of low-rank weights out."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fastood.cli import adapting, inputs, labelled, show
from fastood.cli import options as o

if TYPE_CHECKING:
    from fastood.setar.run import Found, Progress

__all__ = ["search_app"]

search_app = typer.Typer(
    no_args_is_help=True, help="Search for a better version of a model without training."
)

_VISITS, _OBJECTIVE = "What is tried", "Objective (default: the authors')"

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@search_app.callback()
def _root() -> None:  # keeps `setar` a command of its own
    pass


@search_app.command("setar")
def setar(
    id: Annotated[
        str,
        typer.Option(
            help="Labelled training images of the ID classes: a folder with a subfolder for each "
            "class, a list, or a CoOp split file. Never the test set."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for the recipe and the table of candidates."),
    ] = Path("fastood-setar"),
    model: o.Model = "ViT-B-16/openai",
    shots: Annotated[
        str, typer.Option(help="Images of each class, drawn with --seed; or 'all'.")
    ] = "1",
    seed: Annotated[int, typer.Option(help="Of the draw, and of --part random.")] = 1,
    order: Annotated[
        str,
        typer.Option(
            help="image_text, text_image, image, text, interleaved, exhaustive or single (LASER); "
            "the authors' names work too.",
            rich_help_panel=_VISITS,
        ),
    ] = "image_text",
    kinds: Annotated[
        str,
        typer.Option(
            help="Weight matrices: q, k, v, o, up, down, proj, or W_up, ...; several as up+down.",
            rich_help_panel=_VISITS,
        ),
    ] = "up",
    ratios: Annotated[
        str | None,
        typer.Option(
            help="Shares of singular directions to drop, or numbers. Default: 0,0.05,...,0.40.",
            rich_help_panel=_VISITS,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Only these blocks, from 0 at the input: 6-11 or 0,1,-1.", rich_help_panel=_VISITS
        ),
    ] = None,
    projections: Annotated[
        bool,
        typer.Option("--projections", help="Also the projections.", rich_help_panel=_VISITS),
    ] = False,
    part: Annotated[
        str,
        typer.Option(
            help="Drop the 'minor' directions, the 'principal', or 'random' ones.",
            rich_help_panel=_VISITS,
        ),
    ] = "minor",
    metric: Annotated[
        str,
        typer.Option(
            help="loss, cross_entropy or patches; or auroc, aupr, fpr of --score on patches.",
            rich_help_panel=_OBJECTIVE,
        ),
    ] = "loss",
    score: Annotated[
        str | None,
        typer.Option(
            help="mcm, l_mcm, gl_mcm, energy, entropy or variance.", rich_help_panel=_OBJECTIVE
        ),
    ] = None,
    weight: Annotated[
        float | None, typer.Option(help="Of the patch term (λ).", rich_help_panel=_OBJECTIVE)
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="A patch is OOD if its label is not among so many classes.",
            rich_help_panel=_OBJECTIVE,
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the scores.", rich_help_panel=_OBJECTIVE)
    ] = None,
    pred_label: Annotated[
        bool,
        typer.Option(
            "--pred-label", help="OOD patches by the predicted class.", rich_help_panel=_OBJECTIVE
        ),
    ] = False,
    id_set: Annotated[
        str | None,
        typer.Option(
            help="imagenet or voc: whose published settings. Default: by the number of classes.",
            rich_help_panel=_OBJECTIVE,
        ),
    ] = None,
    partition: Annotated[
        str,
        typer.Option(
            help="Mean over patches in batches as the authors' loader makes them ('reference'), or "
            "over all images ('global').",
            rich_help_panel=_OBJECTIVE,
        ),
    ] = "reference",
    reference_batch: Annotated[
        int | None,
        typer.Option(
            "--reference-batch", min=1, help="Images of those batches.", rich_help_panel=_OBJECTIVE
        ),
    ] = None,
    template: o.Templates = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again where another search lies.")
    ] = False,
    adapt: o.Adapt = None,
    classes: o.Classes = None,
    class_match: o.ClassMatch = "name",
    pretrained: o.Pretrained = None,
    checkpoint: o.Checkpoint = None,
    allow_pickle: o.AllowPickle = False,
    limit: o.Limit = None,
    device: o.Device = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="To keep between candidates: 8GB. Default: a quarter of what is free. Less costs "
            "time, never accuracy.",
        ),
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Images run together. Default: by the device.")
    ] = None,
    workers: o.Workers = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """SeTAR: drop weak singular directions of weight matrices where that lowers a loss.

    No training. Every evaluated candidate is written at once; an interrupted search goes on when
    the same command is given again. `--adapt OUT/recipe.json` then uses the result, and
    `fastood train setar-ft:picks=OUT/recipe.json` trains from it.
    """
    from fastood.data.imageset import ImageSet
    from fastood.models import load_model
    from fastood.report.search import write_search_report
    from fastood.setar.plan import RATIOS
    from fastood.setar.run import Partition, search
    from fastood.setar.table import CANDIDATES
    from fastood.tuning.fewshot import few_shot

    count = labelled.read_shots(shots)
    chosen = _numbers("--ratios", ratios) if ratios is not None else list(RATIOS)
    blocks = None if layers is None else _blocks(layers)
    budget = None if memory is None else _bytes(memory)
    if out.suffix.lower() == ".json" or (out.exists() and not out.is_dir()):
        raise ValueError(f"--out {out}: expected a folder, got a file; the recipe is a file in it")
    images, names, _ = labelled.read_training(id, None, classes, class_match, limit, count, seed)
    if not isinstance(images, ImageSet):
        raise ValueError(f"--id {id}: expected images, got features; SeTAR runs the image tower")
    images = few_shot(images, count, seed, class_names=names)
    encoder = load_model(
        model,
        pretrained=pretrained,
        checkpoint=checkpoint,
        device=device,
        dtype="float32",
        allow_pickle=allow_pickle,
    )
    encoder = adapting.changed(encoder, adapt)
    with _bar(quiet=quiet) as progress:
        done = search(
            encoder,
            images,
            class_names=names,
            order=order,
            kinds=kinds.split("+"),
            ratios=chosen,
            projections=projections,
            layers=blocks,
            part=cast(Any, part),
            seed=seed,
            metric=metric,
            score=score,
            weight=weight,
            top_k=top_k,
            temperature=temperature,
            pred_label=pred_label,
            id_set=id_set,
            partition=cast(Partition, partition),
            batch_size=reference_batch,
            templates=inputs.templates_of(template),
            out=out,
            overwrite=overwrite,
            memory=budget,
            chunk=chunk,
            workers=workers,
            progress=progress,
        )
    page = write_search_report(out, done)
    if json:
        show.print_json(
            {
                "file": str(done.file),
                "part": done.recipe.part,
                "picks": done.recipe.lora_settings(),
                "baseline": done.baseline.as_dict(),
                "final": done.final.as_dict(),
                "evaluations": len(done.rows),
                "notes": list(done.notes),
            }
        )
        return
    for note in done.notes:
        warnings.warn(note, RuntimeWarning, stacklevel=1)
    _print(done)
    show.line(f"recipe: {done.file}")
    show.line(f"candidates: {out / CANDIDATES}")
    show.line(f"report: {page}")
    adapting.say_how_to_use(
        [*(adapt or ()), done.file],
        model=model,
        pretrained=pretrained,
        checkpoint=checkpoint,
        allow_pickle=allow_pickle,
    )


def _print(done: Found) -> None:
    from rich.table import Table

    changes = done.recipe.changes
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("matrix", "dropped", "directions", "objective"):
        table.add_column(name, justify="left" if name == "matrix" else "right")
    table.add_row("as it is", "", "", f"{done.baseline.objective:.5f}")
    for pick in changes:
        share = f"{100 * pick.ratio:g}%" if isinstance(pick.ratio, float) else ""
        table.add_row(pick.address, share, str(pick.count), f"{pick.objective:.5f}")
    show.console().print(table)
    a, b = done.baseline, done.final
    show.line(
        f"{len(changes)} of {len(done.recipe.picks)} matrices changed; loss {a.loss:.5f} -> "
        f"{b.loss:.5f}, accuracy {a.accuracy:.1%} -> {b.accuracy:.1%} on the images searched with"
    )


def _numbers(what: str, text: str) -> list[Any]:
    return [inputs.literal(part.strip()) for part in re.split(r"[,+]", text)]


def _blocks(text: str) -> list[int]:
    """``6-11`` or ``0,1,-1``."""
    found: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part)
        if span:
            first, last = int(span[1]), int(span[2])
            if first > last:
                raise ValueError(f"--layers: expected a range like 6-11, got {part.strip()!r}")
            found += range(first, last + 1)
        elif re.fullmatch(r"\s*-?\d+\s*", part):
            found.append(int(part))
        else:
            raise ValueError(f"--layers: expected numbers or ranges like 0,6-11, got {text!r}")
    return found


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text, re.IGNORECASE)
    if not found:
        raise ValueError(f"--memory: expected a size like 8GB or 500MB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].lower()])


@contextmanager
def _bar(*, quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """One bar over the whole search, in units of arithmetic, with the time left."""
    if quiet:
        yield None
        return
    from rich.progress import (
        BarColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("best {task.fields[best]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=show.console(stderr=True),
    )
    task = None

    def update(at: Progress) -> None:
        nonlocal task
        fields: dict[str, Any] = {"best": "-" if at.objective is None else f"{at.objective:.5f}"}
        text = f"{at.visit}/{at.visits} {at.matrix}" if at.visit else "the model as it is"
        if task is None:
            task = bar.add_task(text, total=1.0, **fields)
            bar.start()
        bar.update(task, completed=at.done, description=text, **fields)

    try:
        yield update
    finally:
        if task is not None:
            bar.stop()
