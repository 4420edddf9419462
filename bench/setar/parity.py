"""SeTAR searches compared with the authors' code, candidate by candidate.

    python -m bench.setar.parity --authors ~/SeTAR --python ~/their-env/bin/python

``--authors`` is a clone of their repository, run unedited by ``--python``, an environment in which
it works (torch, torchvision, transformers 4.37, scikit-learn, pandas, psutil, accelerate). Random
models and images are made there (``parity_authors.py``), searched by their ``Searcher.run``,
and searched again here from the same safetensors and files. Writes ``results/setar-parity.md``;
exit status 1 if anything differs by more than it may.

What may differ: nothing in float64 but the last digits (losses 1e-6, weights 1e-10); in float32 a
pick, if the two losses are within 1e-5. No times are compared: the models are toys. The
transformers here must take CLIPs in float64 (5.x does, 4.57 does not).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench.setar.parity_jobs import jobs
from fastood.data.imageset import ImageItem, ImageSet
from fastood.models.base import Encoder
from fastood.models.matrices import list_matrices
from fastood.setar.lowrank import count_of
from fastood.setar.matching import network_of
from fastood.setar.objective import Value
from fastood.setar.recipe import Recipe
from fastood.setar.run import Found, search

__all__ = ["compare", "main"]

HERE = Path(__file__).resolve().parent
LOSSES = {"float64": 1e-6, "float32": 1e-5}
WEIGHTS = {"float64": 1e-10, "float32": 1e-5}

METRICS = {"locoop_loss": "loss", "loss_id": "cross_entropy", "loss_ood": "patches"}
SCORES = {
    "mcm_score": "mcm", "l_mcm_score": "l_mcm", "gl_mcm_score": "gl_mcm",
    "energy_score": "energy", "entropy_score": "entropy", "var_score": "variance",
}  # fmt: skip
PARTS = {"small": "minor", "large": "principal"}
NORMALISE = {
    "CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "SwinTransformerV2": ((0.4850, 0.4560, 0.4060), (0.2290, 0.2240, 0.2250)),
}


class Preprocess:
    """Theirs, in the precision of the model; the images of CLIPs have its size already."""

    def __init__(self, kind: str, size: int, dtype: torch.dtype) -> None:
        from torchvision.transforms import functional as F

        self._f, self._kind, self._size, self._dtype = F, kind, size, dtype

    def __call__(self, image: Any) -> torch.Tensor:
        f = self._f
        if self._kind != "CLIP":
            image = f.resize(image, int(self._size / 0.9), f.InterpolationMode.BICUBIC)
            image = f.center_crop(image, self._size)
        x = f.pil_to_tensor(image).to(self._dtype) / 255
        return f.normalize(x, *NORMALISE[self._kind])


def load_encoder(job: dict[str, Any], folder: Path, names: list[str]) -> Encoder:
    """Their model in fastood, from the same file."""
    import transformers

    dtype = getattr(torch, job["dtype"])
    preprocess = Preprocess(job["model_type"], job["vision"]["image_size"], dtype)
    where = folder / "model"
    state = load_file(where / "model.safetensors")
    network: Any
    if job["model_type"] == "CLIP":
        from fastood.models.hf import HFEncoder

        config = transformers.CLIPConfig.from_pretrained(where)
        network = transformers.CLIPModel(config).to(dtype)
        network.load_state_dict(state, strict=False)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(where)
        return HFEncoder(network, preprocess, tokenizer, name=job["name"], preprocess_id="theirs")
    from fastood.models.hf_classifier import HFClassifierEncoder

    config = transformers.Swinv2Config.from_pretrained(where)
    network = transformers.Swinv2ForImageClassification(config).to(dtype)
    network.load_state_dict(state, strict=False)
    return HFClassifierEncoder(
        network, preprocess, class_names=names, name=job["name"], preprocess_id="theirs"
    )


def load_images(job: dict[str, Any], folder: Path, names: list[str]) -> ImageSet:
    root = folder / "data" / job["id_dataset"] / "val"
    files = sorted(root.glob("*/*.png"))
    folders = sorted({f.parent.name for f in files})
    # ImageNet's folders are numbered by their order, the others' are found by name
    by_order = job["id_dataset"] == "ID_ImageNet1K"
    items = tuple(
        ImageItem(
            str(f.relative_to(root)),
            f.read_bytes,
            f,
            folders.index(f.parent.name) if by_order else names.index(f.parent.name),
        )
        for f in files
    )
    return ImageSet(job["name"], str(root), items, tuple(names))


def ours(job: dict[str, Any], encoder: Encoder, images: ImageSet) -> Found:
    """The same search with fastood."""
    scored = job["best_scorer"] != "loss"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # class names of random models
        return search(
            encoder,
            images,
            order=job["searcher"],
            kinds=job["weight_type"],
            ratios=job["ratios"],
            projections=not job["freeze_proj"],
            part=PARTS[job["prune"]],  # type: ignore[arg-type]
            metric=job["best_metric"] if scored else METRICS[job["best_metric"]],
            score=SCORES[job["best_scorer"]] if scored else None,
            weight=job["weight"],
            top_k=job["top_k"],
            temperature=job["temperature"],
            pred_label=job["pred_label"],
            batch_size=job["batch_size"],
            templates=["a photo of a {}"],
        )


@dataclass
class Compared:
    """One search, both ways."""

    job: dict[str, Any]
    theirs: dict[str, Any]
    picks: int = 0
    same: int = 0
    evaluations: int = 0
    loss: float = 0.0
    """Largest difference of any number of any candidate both evaluated, percentages as shares."""
    weights: float = 0.0
    """Largest difference of the model with their picks, theirs and ``Recipe.apply``."""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    failed: bool = False
    weights_only: bool = False


def numbers(metrics: dict[str, Any], value: Value) -> list[tuple[float, float]]:
    """Theirs and ours of each number both have."""
    pairs = []
    if "loss" in metrics:
        loss = metrics["loss"]
        pairs += [(loss[theirs], getattr(value, mine)) for theirs, mine in METRICS.items()]
    for theirs, mine in SCORES.items():
        if theirs in metrics:
            found = value.scores[mine]
            pairs += [(metrics[theirs][m] / 100, found[m]) for m in ("auroc", "aupr", "fpr")]
    return pairs


def address(setting: list[Any], depths: list[int] | None) -> str:
    tower, kind, layer, _ = setting
    tower = {"visual": "image"}.get(tower, tower)
    if kind == "W_p":
        return f"{tower}.proj"
    if isinstance(layer, list):
        assert depths is not None
        layer = sum(depths[: layer[0]]) + layer[1]
    return f"{tower}.{layer}.{kind.removeprefix('W_')}"


def compare(job: dict[str, Any], folder: Path) -> Compared:
    """Search with fastood what they searched, and compare."""
    theirs = json.loads((folder / "result.json").read_text())
    names = theirs["names"]
    encoder, images = load_encoder(job, folder, names), load_images(job, folder, names)
    seen = Compared(job, theirs, weights_only=job["weights_only"])
    check_exchange(seen, encoder, images, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        compare_weights(seen, encoder, folder)
    if seen.weights_only:
        return seen
    depths = job["vision"].get("depths")

    start = time.perf_counter()
    found = ours(job, encoder, images)
    seen.seconds = time.perf_counter() - start
    seen.evaluations = len(found.rows)
    if found.baseline.empty_batches:
        seen.notes.append(
            f"{found.baseline.empty_batches} of {len(theirs['batches'])} batches of the first "
            "model have no OOD patch"
        )
    sizes = {m.address: min(m.shape) for m in list_matrices(network_of(encoder))}
    mine = {row.key: row.value for row in found.rows}  # shares of one number are tried once

    picks = [(p.address, float(p.ratio)) for p in found.recipe.picks]
    wanted = [(address(p, depths), float(p[3])) for p in theirs["picks"]]
    seen.picks = len(wanted)
    seen.same = sum(a == b for a, b in zip(picks, wanted, strict=True))
    agree = next((i for i, (a, b) in enumerate(zip(picks, wanted, strict=True)) if a != b), None)
    last = len(wanted) if agree is None else agree + 1  # comparable until the first other pick

    for one in theirs["evaluations"]:
        visit = len(one["before"]) + 1
        name = address(one["setting"], depths)
        key = (visit, name, count_of(float(one["setting"][3]), sizes[name]))
        if visit > last:
            continue
        value = found.baseline if visit == 1 and not key[2] else mine.get(key)
        if value is None:
            if key[2]:
                raise ValueError(f"{job['name']}: fastood did not evaluate {key}")
            continue  # ratio 0 after the first visit repeats the best; it is not evaluated again
        for a, b in numbers(one["metrics"], value):
            seen.loss = max(seen.loss, abs(a - b))
    seen.failed |= seen.loss > LOSSES[job["dtype"]]
    if agree is not None:
        explain(seen, agree, picks[agree], wanted[agree], sizes, mine, found)
    return seen


def check_exchange(seen: Compared, encoder: Encoder, images: ImageSet, folder: Path) -> None:
    """The same pixels, labels and tokens, before anything is compared."""
    from fastood.data.decode import decode

    exchange = load_file(folder / "exchange.safetensors")
    pixels = torch.stack([encoder.preprocess(decode(item.read())) for item in images])
    labels = torch.tensor([item.label for item in images])
    gap = float((pixels - exchange["pixels"]).abs().max())
    same = torch.equal(labels, exchange["labels"])
    if "tokens" in exchange:
        tokens = encoder.tokenize([f"a photo of a {c}" for c in seen.theirs["names"]])
        assert tokens is not None
        same = same and torch.equal(
            tokens[:, : exchange["tokens"].shape[1]], exchange["tokens"].to(tokens.dtype)
        )
    if not same or gap > WEIGHTS[seen.job["dtype"]]:
        raise ValueError(f"{seen.job['name']}: pixels ({gap:.1e}), labels or tokens differ")


def explain(
    seen: Compared,
    place: int,
    pick: tuple[str, float],
    wanted: tuple[str, float],
    sizes: dict[str, int],
    mine: dict[tuple[int, str, int], Value],
    found: Found,
) -> None:
    """The first other pick, with our values of both."""
    before = found.recipe.picks[place - 1].objective if place else found.baseline.objective
    values = []
    for name, ratio in (pick, wanted):
        value = mine.get((place + 1, name, count_of(ratio, sizes[name])))
        values.append(before if value is None else value.objective)
    gap = abs((values[0] or 0.0) - (values[1] or 0.0))
    seen.failed |= seen.job["dtype"] != "float32" or gap > LOSSES["float32"]
    seen.notes.append(
        f"another pick {place + 1}: fastood {pick[0]} {pick[1]:g} ({values[0]:.8f}), "
        f"authors {wanted[0]} {wanted[1]:g} ({values[1]:.8f}); {gap:.1e} apart"
    )


def compare_weights(seen: Compared, encoder: Encoder, folder: Path) -> None:
    """Their ``apply_svd_prune`` of their picks against ``Recipe.apply`` of the imported list."""
    recipe = Recipe.from_lora_settings(seen.theirs["picks"])
    recipe = Recipe(recipe.picks, part=PARTS[seen.job["prune"]])  # type: ignore[arg-type]
    changed: Any = recipe.apply(encoder)
    mine = changed.model.state_dict()
    compared = set()
    for name, weight in load_file(folder / "pruned.safetensors").items():
        name = name.removeprefix("base_model.model.")  # their model stays wrapped
        if weight.is_floating_point():
            seen.weights = max(seen.weights, float((mine[name] - weight).abs().max()))
            compared.add(name)
    assert compared >= {name for name, _ in changed.model.named_parameters()}
    seen.failed |= seen.weights > WEIGHTS[seen.job["dtype"]]


def run_theirs(job: dict[str, Any], folder: Path, given: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file, result = folder / "job.json", folder / "result.json"
    if given.reuse and result.exists() and _finished(job, folder):
        before = json.loads(result.read_text())["job"]
        if all(job[name] == value for name, value in before.items() if name in job):
            return
    file.write_text(json.dumps(job))
    script = HERE / "parity_authors.py"
    command = [given.python, str(script), "--authors", str(given.authors), "--job", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"{job['name']}: their code stopped\n{done.stderr[-2000:]}")


def _finished(job: dict[str, Any], folder: Path) -> bool:
    return not job["ft_steps"] or (folder / "finetune.json").exists()


def main(arguments: list[str] | None = None) -> int:
    from bench.setar.parity_ft import compare_finetune, counts, lines
    from bench.setar.parity_report import write

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--authors", type=Path, required=True, help="clone of their repository")
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs it")
    parser.add_argument("--work", type=Path, default=Path("setar-parity"), help="scratch folder")
    parser.add_argument("--only", nargs="*", help="names of searches")
    parser.add_argument("--reuse", action="store_true", help="keep their results of an earlier run")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "setar-parity.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, tuned = [], []
    for job in json.loads(json.dumps(jobs())):  # as their side reads it: lists, no tuples
        if given.only and job["name"] not in given.only:
            continue
        folder = given.work.resolve() / job["name"]
        run_theirs(job, folder, given)
        row = compare(job, folder)
        rows.append(row)
        print(
            f"{job['name']:22} picks {row.same}/{row.picks}  loss {row.loss:.1e}  "
            f"weights {row.weights:.1e}  {'FAILED' if row.failed else 'ok'}  {row.seconds:.1f} s",
            *row.notes,
            sep="\n    ",
            flush=True,
        )
        if job["ft_steps"]:
            names = row.theirs["names"]
            encoder, images = load_encoder(job, folder, names), load_images(job, folder, names)
            tuned.append(compare_finetune(job, folder, encoder, images))
            print("   ", tuned[-1], flush=True)
    counted = counts(given.authors)
    extra = lines(tuned, counted)
    write(rows, given.out, complete=not given.only, extra=extra)
    wrong = any(mine != theirs for _, mine, theirs in counted)
    return int(wrong or any(x.failed for x in (*rows, *tuned)))


if __name__ == "__main__":
    raise SystemExit(main())
