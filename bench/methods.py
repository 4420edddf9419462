"""Every fine-tuning method on the tiny CLIP: ``python -m bench.methods``.

A check of the machinery, no evidence about the methods. In-distribution are the ten clothing
classes, eight shots of each from ``validation/``, tested on ``test/``: photographs that the tiny
model has never seen; of half the classes it has never seen any, and does not know the word. The
rest of ``validation/`` chooses Tip-Adapter's alpha and beta. SeTAR searches on the shots, and
SeTAR+FT trains on them what the search found. Out-of-distribution are CIFAR-10's test pictures and
Omniglot characters. Authors' recipes, three seeds, cached views where towers stay as they are.

Needs ``FASTOOD_TEST_DATA``. Writes ``results/methods.md``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import warnings
from pathlib import Path
from typing import Any

from fastood.data import load_images
from fastood.data.imageset import ImageSet
from fastood.features import FeatureCache
from fastood.models import load_model
from fastood.models.base import Encoder
from fastood.pipeline import Pipeline
from fastood.pipeline.finetune import FineTuned, fine_tune
from fastood.setar.run import Found, search
from fastood.tuning.fewshot import few_shot, take_images
from fastood.tuning.registry import method_class

SHOTS, VIEWS, SEEDS = 8, 8, (1, 2, 3)
METHODS = (
    "zoclip", "tip", "tip-f", "clip-adapter", "coop", "cocoop", "locoop", "ebm",
    "lora", "lora, 50 steps", "setar", "setar-ft", "setar-ft, 50 steps",
)  # fmt: skip
LONGER = ", 50 steps"
START = {"ctx_init": "a photo of a"}
CONTEXT = {"coop": START, "locoop": START, "ebm": START}
"""The tiny model has never seen a prompt of more than 15 tokens: CoOp's 16 are too many for it, and
from random ones the steps that eighty images make in the published epochs do not lead back."""
SCORES = ("max_similarity", "mcm", "msp", "gl_mcm", "delta_energy")
OUT = Path(__file__).parent / "results" / "methods.md"

HEAD = """# Fine-tuning methods on the tiny CLIP

**A check of the machinery, no evidence about the methods.** The model is `fastood-tiny`, 3.4
million parameters, which knows five of the ten classes. {shots} shots of each class and {test:,}
test photographs, none of them seen in its training; authors' recipes with {views} cached views;
learned contexts start from "a photo of a" (the model has never seen a prompt of more than 15
tokens, so CoOp's 16 random ones are too many for it). SeTAR searches all `up` matrices on the
shots, by its loss, and SeTAR+FT trains what was found on the same shots. The batches of LoRA and
SeTAR+FT hold all of them, which makes five steps; by batches of 8 it is 50, as many as published
for ImageNet. In those SeTAR+FT, whose factors start at full size, fits the shots (a loss of 3.0
becomes 1.3) and forgets what else this small model knew; LoRA, whose B starts at 0, hardly moves.
Tip-Adapter's alpha and beta are chosen on the {held} validation photographs that are no shots.
Mean and standard deviation over {seeds} seeds, in percent; AUROC is the mean over {ood}. Written
by `python -m bench.methods`.

"""


def rest_of(images: ImageSet, chosen: ImageSet) -> ImageSet:
    taken = {item.path for item in chosen}
    return take_images(images, [i for i, item in enumerate(images) if item.path not in taken])


def tune(
    method: str, encoder: Encoder, shots: ImageSet, held: ImageSet, seed: int, **options: Any
) -> FineTuned:
    name = method.removesuffix(LONGER)
    pixels = method_class(name).needs == "pixels"
    return fine_tune(
        encoder,
        name,
        shots,
        shots=None,
        seed=seed,
        validation=held if method.startswith("tip") else None,
        views=0 if pixels else VIEWS,
        recipe=None if name == method else {"batch_size": 8},
        **options,
    )


def searched(encoder: Encoder, shots: ImageSet) -> Found:
    """The search on these shots; the second method that wants it gets the first one's."""
    key = tuple(item.path for item in shots)
    if key not in _SEARCHES:
        _SEARCHES[key] = search(encoder, shots)
    return _SEARCHES[key]


_SEARCHES: dict[tuple[str, ...], Found] = {}


def made(
    method: str, encoder: Encoder, shots: ImageSet, held: ImageSet, seed: int, **options: Any
) -> tuple[Encoder, Any, Any]:
    """The model, class names and head of one row, from one draw of shots."""
    settings: dict[str, Any] | None = CONTEXT.get(method)
    if method.startswith("setar"):
        recipe = searched(encoder, shots).recipe
        if method == "setar":
            return recipe.apply(encoder), shots.class_names, None
        settings = {"picks": recipe}
    done = tune(method, encoder, shots, held, seed, settings=settings, **options).method
    if done.changes_towers:
        return done.adapted(encoder), done.class_names, None
    return encoder, done.class_names, done.head()


def what_was_found(searches: list[Found]) -> str:
    """What the searches did, in a sentence each."""
    lines = []
    for found in searches:
        recipe = found.recipe
        picks = ", ".join(f"{p.address} {p.ratio:.2f}" for p in recipe.changes) or "nothing"
        lines.append(
            f"{found.baseline.objective:.4f} to {found.final.objective:.4f} by dropping {picks}"
        )
    return "Losses of the searches on the shots: " + "; ".join(lines) + "."


def line(name: str, runs: list[dict[str, float]]) -> str:
    cells = [name]
    for key in runs[0]:
        values = [run[key] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--cache", default=None, help="feature cache")
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # words the tiny model does not know
    folder = Path(os.environ["FASTOOD_TEST_DATA"]) / "images"
    cache = FeatureCache(options.cache)
    clothing = folder / "clothing_cc0_96.tar"
    pool = load_images(clothing, split="validation", name="clothing, validation")
    test = load_images(clothing, split="test", name="clothing")
    ood = [
        load_images(folder / "cifar10_jpg.tar.gz", split="test", name="CIFAR-10", limit=1000),
        load_images(folder / "omniglot_small.tar.gz", name="Omniglot", limit=1000),
    ]
    found: dict[str, list[dict[str, float]]] = {}
    held = pool
    for method in options.methods:
        for seed in SEEDS:
            encoder = load_model("fastood-tiny")
            shots = few_shot(pool, SHOTS, seed)
            held = rest_of(pool, shots)
            changed, names, head = made(method, encoder, shots, held, seed, cache=cache)
            pipeline = Pipeline(changed, names, head=head, methods=list(SCORES), cache=cache)
            results = pipeline.evaluate(test, ood, resamples=0).results
            run = {"accuracy": 100 * results["id"]["accuracy"]["value"]}
            for score in SCORES:
                rows = [m for m in results["metrics"] if m["score"] == score]
                run[score] = 100 * next(m["AUROC"] for m in rows if m["set"] == "average")
            found.setdefault(method, []).append(run)
            print(method, seed, {k: round(v, 1) for k, v in run.items()}, flush=True)
    columns = ["", "accuracy", *(f"AUROC {s}" for s in SCORES)]
    others = " and ".join(f"{len(s):,} pictures of {s.name}" for s in ood)
    text = HEAD.format(
        shots=SHOTS, test=len(test), views=VIEWS, held=len(held), seeds=len(SEEDS), ood=others
    )
    text += f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    text += "\n".join(line(name, runs) for name, runs in found.items()) + "\n"
    if _SEARCHES:
        text += f"\n{what_was_found(list(_SEARCHES.values()))}\n"
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
