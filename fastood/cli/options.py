"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

_MODEL, _SPEED, _OUTPUT = "Model and prompts", "Encoding", "Output"

Model = Annotated[
    str,
    typer.Option(
        help="ViT-B-16/openai, hf-hub:org/name, hf:folder, timm:resnet50, fastood-tiny, or "
        "'none' if everything comes as features.",
        rich_help_panel=_MODEL,
    ),
]
Pretrained = Annotated[
    str | None,
    typer.Option(help="open_clip tag, if not in --model.", rich_help_panel=_MODEL),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(help="Local weights (safetensors).", rich_help_panel=_MODEL),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Also read .pt/.pth/.bin checkpoints, weights only.",
        rich_help_panel=_MODEL,
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(
        help="Class names: one a line, JSON list, or JSON {folder: name}. Default: the class "
        "folders of the ID set.",
        rich_help_panel=_MODEL,
    ),
]
ClassMatch = Annotated[
    str,
    typer.Option(
        help="Pair --classes with class folders by 'name', or by 'order': i-th name, i-th folder.",
        rich_help_panel=_MODEL,
    ),
]
Templates = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        help="Prompt with one {}, or a set by name (mcm, coop, openai-imagenet-80); several make "
        "an ensemble. Default: 'a photo of a {}'.",
        rich_help_panel=_MODEL,
    ),
]
TextFeatures = Annotated[
    str | None,
    typer.Option(
        help="Ready class features (npz with 'features' (K, D) and 'class_names').",
        rich_help_panel=_MODEL,
    ),
]
AllowDuplicates = Annotated[
    bool,
    typer.Option("--allow-duplicates", help="Let classes share a name.", rich_help_panel=_MODEL),
]
Negatives = Annotated[
    str | None,
    typer.Option(
        help="Negative labels for neg_label: one whole prompt a line.", rich_help_panel=_MODEL
    ),
]
Groups = Annotated[
    int,
    typer.Option(min=1, help="Groups the negative labels are split into.", rich_help_panel=_MODEL),
]
Train = Annotated[
    str | None,
    typer.Option(
        help="Labelled images or features that mahalanobis and knn are fitted to.",
        rich_help_panel=_MODEL,
    ),
]
Adapt = Annotated[
    list[str] | None,
    typer.Option(
        "--adapt",
        help="File of `fastood train`, or recipe of `fastood search setar`; repeat for several, in "
        "the order they were made.",
        rich_help_panel=_MODEL,
    ),
]
ScoreNames = Annotated[
    list[str] | None,
    typer.Option(
        "--score",
        help="mcm, gl_mcm, energy:tau=0.02, mine=delta_energy:c=2; repeat for more. Default: all "
        "that fit.",
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="At most this many images of each set, evenly spaced.")
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1. Default: a GPU if there is one.", rich_help_panel=_SPEED),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16.", rich_help_panel=_SPEED)]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Images per forward pass.", rich_help_panel=_SPEED)
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Decoding threads. Default: one per CPU.", rich_help_panel=_SPEED),
]
CacheFolder = Annotated[
    str | None,
    typer.Option(
        "--cache",
        help="Feature cache. Default: FASTOOD_CACHE or the user's cache.",
        rich_help_panel=_SPEED,
    ),
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Keep nothing between runs.", rich_help_panel=_SPEED)
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Read every file again instead of trusting size and time.",
        rich_help_panel=_SPEED,
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Fail on an unreadable image instead of skipping it.",
        rich_help_panel=_SPEED,
    ),
]
Tpr = Annotated[float, typer.Option(help="Share of ID images to accept (thresholds, FPR metrics).")]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=_OUTPUT)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress bars.", rich_help_panel=_OUTPUT)
]
