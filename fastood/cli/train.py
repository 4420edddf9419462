"""``fastood train``: a method and a folder of labelled images in, an adaptation out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from fastood.cli import adapting, inputs, labelled, show
from fastood.cli import options as o

if TYPE_CHECKING:
    from fastood.tuning.history import Progress

__all__ = ["train"]

_RECIPE = "Recipe (default: the authors')"

_FILE = "picks="
"""The setting that is a file."""


def train(
    method: Annotated[
        str,
        typer.Argument(
            help="coop, cocoop, locoop, ebm, tip, tip-f, clip-adapter, lora, setar-ft or zoclip; "
            "with settings: coop:n_ctx=4,position=middle, lora:kinds=q+v,rank=8, "
            "setar-ft:picks=recipe.json (of 'fastood search setar')."
        ),
    ],
    id: Annotated[
        str,
        typer.Option(
            help="Labelled training images: a folder with a subfolder for each class, a list, a "
            "CoOp split file (drawn as CoOp draws), or features."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the result. Default: fastood-METHOD."),
    ] = None,
    model: o.Model = "ViT-B-16/openai",
    shots: Annotated[
        str, typer.Option(help="Images of each class, drawn with --seed; or 'all'.")
    ] = "16",
    seed: Annotated[int, typer.Option(help="Of draw, order, augmentation, initial values.")] = 1,
    val: Annotated[
        str | None,
        typer.Option(help="Validation images of the same classes; never the test set."),
    ] = None,
    select: Annotated[
        str, typer.Option(help="Keep the 'last' epoch (as published) or the best on 'validation'.")
    ] = "last",
    views: Annotated[
        int,
        typer.Option(
            min=0,
            help="0: fresh augmentation, the image tower runs in every step. N: encode N "
            "augmented views once and take them in turn (much faster, an approximation); 1: as is.",
        ),
    ] = 0,
    epochs: Annotated[int | None, typer.Option(rich_help_panel=_RECIPE)] = None,
    step_images: Annotated[
        int | None, typer.Option("--step-images", help="Images per step.", rich_help_panel=_RECIPE)
    ] = None,
    lr: Annotated[float | None, typer.Option(rich_help_panel=_RECIPE)] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            help="Anything else of it: optimizer=adamw, weight_decay=0, warmup_epochs=0, ...",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    amp: Annotated[
        bool, typer.Option("--amp", help="Mixed precision.", rich_help_panel=_RECIPE)
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write curves for TensorBoard.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again where another run lies.")
    ] = False,
    adapt: o.Adapt = None,
    classes: o.Classes = None,
    class_match: o.ClassMatch = "name",
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
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Fine-tune a model on a few images of each class; `--adapt` then uses the result.

    An interrupted run continues where it stopped when the same command is given again. Start it
    with `torchrun --nproc-per-node N -m fastood ...` to share the work.
    """
    from fastood.features import FeatureCache
    from fastood.models import load_model
    from fastood.pipeline.asked import check_given, recipe_of
    from fastood.pipeline.finetune import ADAPTATION, fine_tune
    from fastood.tuning.loop import CHECKPOINT
    from fastood.tuning.parallel import World
    from fastood.tuning.registry import method_class

    name, settings = _method(method)
    count = labelled.read_shots(shots)
    if select not in ("last", "validation"):
        raise ValueError(f"--select: expected 'last' or 'validation', got {select!r}")
    if select == "validation" and val is None and not labelled.is_drawn(id):
        raise ValueError("--select validation: expected validation images, got none; give --val")
    kind = method_class(name)
    check_given(kind, settings)
    changes = {**_pairs("--recipe", recipe), "epochs": epochs, "batch_size": step_images, "lr": lr}
    recipe_of(kind, shots=count, **changes)
    folder = Path(f"fastood-{name}") if out is None else out
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: expected a folder, got a file")
    images, names, held = labelled.read_training(id, val, classes, class_match, limit, count, seed)
    world = World.from_environment()
    encoder = load_model(
        model,
        pretrained=pretrained,
        checkpoint=checkpoint,
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
    )
    encoder = adapting.changed(encoder, adapt)
    first = world.rank == 0
    if overwrite and first:  # now that the model is there
        for old in (CHECKPOINT, ADAPTATION):
            (folder / old).unlink(missing_ok=True)
    world.barrier()
    hidden = quiet or not first
    with ExitStack() as encoding, _steps(hidden, encoding.close) as steps:
        bar = encoding.enter_context(show.progress(quiet=hidden))
        done = fine_tune(
            encoder,
            name,
            images,
            class_names=names,
            settings=settings,
            shots=count,  # of a CoOp split drawn already, that takes all there are
            seed=seed,
            validation=held,
            select=cast(Literal["last", "validation"], select),
            recipe={k: v for k, v in changes.items() if v is not None},
            views=views,
            out=folder,
            resume=True,
            cache=None if no_cache else FeatureCache(cache),
            batch_size=batch_size,
            workers=workers,
            amp=amp,
            tensorboard=tensorboard,
            encoding=bar,
            progress=steps,
            log=None if quiet or not first else show.note,
        )
    if not first:
        return
    if json:
        show.print_json({"file": str(done.file), **done.history.as_dict()})
        return
    for line in done.history.notes:
        warnings.warn(line, RuntimeWarning, stacklevel=1)  # shown once, also if it was before
    show.line(f"adaptation: {done.file}")
    adapting.say_how_to_use(
        [*(adapt or ()), done.file],
        model=model,
        pretrained=pretrained,
        checkpoint=checkpoint,
        allow_pickle=allow_pickle,
        dtype=dtype,
    )


def _method(text: str) -> tuple[str, dict[str, Any]]:
    """``coop:n_ctx=4`` to its name and settings."""
    name, _, tail = text.partition(":")
    pieces: list[str] = []
    for piece in tail.split(",") if tail else ():
        if pieces and pieces[-1].lstrip().startswith(_FILE) and "=" not in piece:
            pieces[-1] += f",{piece}"  # a comma in the name of a file
        else:
            pieces.append(piece)
    return name.strip(), _pairs(f"{text!r}", pieces or None)


def _pairs(what: str, texts: list[str] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise ValueError(f"{what}: expected name=value, got {text!r}")
        if key in found:
            raise ValueError(f"{what}: {key!r} is given twice")
        if f"{key}=" == _FILE:  # no number and no list, whatever it is called
            found[key] = value.strip()
            continue
        parts = [inputs.literal(part.strip()) for part in value.split("+")]
        found[key] = parts if "+" in value else parts[0]
    return found


@contextmanager
def _steps(quiet: bool, begin: Callable[[], None]) -> Iterator[Callable[[Progress], None] | None]:
    """A bar over the steps of all epochs, with loss, accuracy and time left.

    ``begin`` is called before it appears: two bars at a time would overwrite each other.
    """
    if quiet:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}, accuracy {task.fields[accuracy]:.1%}"),
        TimeElapsedColumn(),
        TextColumn("left {task.fields[left]}"),
        console=show.console(stderr=True),
    )
    task = None

    def update(at: Progress) -> None:
        nonlocal task
        fields: dict[str, Any] = {
            "epoch": f"{at.epoch}/{at.epochs}",
            "loss": at.loss,
            "accuracy": at.accuracy,
            "left": show.duration(at.eta_seconds),
        }
        total = at.epochs * at.steps
        if task is None:
            begin()
            task = bar.add_task("", total=total, **fields)
            bar.start()
        bar.update(task, completed=(at.epoch - 1) * at.steps + at.step, **fields)

    try:
        yield update
    finally:
        if task is not None:
            bar.stop()
