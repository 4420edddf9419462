"""The table of ``parity.py``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.setar.parity import Compared

__all__ = ["write"]

INTRO = """\
# SeTAR against the authors' code

Written by `python -m bench.setar.parity` (which see). Their repository, unedited, and fastood
search the same random models: weights, images and prompts are exchanged as files. *Blocks*: of the
image and the text tower, stages of a Swin. *Picks*: the same ratio at the same matrix, of all
visits. *Losses*: the largest difference of any number (loss and its two terms; AUROC, AUPR and FPR
as shares) of any candidate that both evaluated, up to the first other pick. *Weights*: of the whole
model with their picks, `apply_svd_prune` against `Recipe.apply`. *Not 0*: picks that drop
something. Allowed: {losses}.

fastood evaluates no ratio of 0 after the first model, and ratios that mean the same number of
directions once, so it has fewer candidates. No times are compared: the models are toys.

Set from outside their code: the default dtype (float64), no worker processes in their data loaders,
`Tensor.cuda` without a GPU (their loss calls it when a batch has no OOD patch), loaded models cast
to float64 (a buffer of Swins).
"""

NOT_COMPARED = """\
Not compared: their interleaved search with projections, which comes back to both projections at
every block and lets a later ratio of 0 undo the pick while the best loss stays that of the pick;
fastood visits them once. The picks it ends with are applied by both (`woven-proj`). Random
directions: theirs depend on the state of the global generator.
"""


def write(rows: list[Compared], out: Path, *, complete: bool, extra: list[str]) -> None:
    """One line a search; what differs is spelled out below."""
    from bench.setar.parity import LOSSES, WEIGHTS

    allowed = "; ".join(
        f"losses {LOSSES[d]:.0e}, weights {WEIGHTS[d]:.0e} in {d}" for d in LOSSES
    )  # fmt: skip
    text = [INTRO.replace("{losses}", allowed)]
    versions = rows[0].theirs["versions"]
    text.append(
        f"Theirs ran with torch {versions['torch']}, transformers {versions['transformers']}; "
        f"fastood {here()}.\n"
    )
    searched = [row for row in rows if not row.weights_only]
    for dtype in LOSSES:
        own = [row for row in searched if row.job["dtype"] == dtype]
        if own:
            same = sum(row.same for row in own)
            text.append(
                f"**{dtype}: {len(own)} searches, {same} of {sum(row.picks for row in own)} picks "
                f"the same, losses within {max(row.loss for row in own):.1e}, weights within "
                f"{max(row.weights for row in own):.1e}.**\n"
            )
    text += [
        "| search | blocks | order | weights | objective | batches | candidates theirs / ours "
        "| picks | not 0 | losses | weights |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    text += [line(row) for row in rows]
    noted = [f"- {row.job['name']}: {note}" for row in rows for note in row.notes]
    text += ["", *noted] if noted else []
    text += ["", NOT_COMPARED, *extra]
    if not complete:
        text.append("\nOnly some searches were run for this table.")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(text).rstrip() + "\n")


def line(row: Compared) -> str:
    job = row.job
    vision: dict[str, Any] = job["vision"]
    blocks = "+".join(map(str, vision.get("depths", ())))
    if not blocks:
        blocks = f"{vision['num_hidden_layers']}, {job['text']['num_hidden_layers']}"
    kind = job["weight_type"] + ("" if job["freeze_proj"] else ", W_p")
    kind += " (principal)" if job["prune"] == "large" else ""
    objective = job["best_metric"]
    if job["best_scorer"] != "loss":
        objective += f" of {job['best_scorer'].removesuffix('_score')}"
    objective += ", predicted labels" if job["pred_label"] else ""
    some = sum(p[3] > 0 for p in row.theirs["picks"])
    sizes = row.theirs["batches"]
    batches = f"{len(sizes)} x {sizes[0]}" if len(set(sizes)) == 1 else "+".join(map(str, sizes))
    if len(batches) > 24:
        batches = f"{len(sizes)}, of {sizes[0]}"
    cells = [
        job["name"], blocks, job["searcher"], kind, objective, batches,
        f"{len(row.theirs['evaluations'])} / {row.evaluations or '-'}",
        "-" if row.weights_only else f"{row.same}/{row.picks}",
        some,
        "-" if row.weights_only else f"{row.loss:.1e}",
        f"{row.weights:.1e}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def here() -> str:
    import torch
    import transformers

    return f"with torch {torch.__version__}, transformers {transformers.__version__}"
