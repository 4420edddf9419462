"""Turn a training checkpoint into the files the package ships, and measure them as shipped.

    python examples/export_tiny_clip.py --data IMAGES --run RUN [--out fastood/models/tiny]

Writes ``model.safetensors`` (float16, token rows of the training prompts only),
``fastood-tiny.json`` (the open_clip configuration), ``config.json``, ``metrics.json`` and
``MODEL_CARD.md``. Accuracies come from the written files, through the loader users get, on pictures
that training never read.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from safetensors.torch import save_file
from tiny_clip_sets import (
    CIFAR_NAMES,
    PASS,
    SPLIT_SEED,
    class_table,
    every_prompt,
    glyphs,
    pictures,
)
from train_tiny_clip import CONFIG, make_model

from fastood.demo import ID_CLASSES
from fastood.models.tiny_clip import FOLDER, IDS, ROWS, TABLE, load_tiny

UNTRAINED = {"seed": 20, "std": 0.02}  # 0.02 is what open_clip starts token rows from
PREPROCESS = {
    "size": CONFIG["vision_cfg"]["image_size"],
    "mean": OPENAI_DATASET_MEAN,
    "std": OPENAI_DATASET_STD,
    "resize_mode": "shortest",
    "interpolation": "bicubic",
}
CARD = Path(__file__).with_name("tiny_clip_card.md")
Sample = tuple[Image.Image, int]


def write(run: Path, out: Path) -> dict[str, Any]:
    """The weights and configuration; returns how they were trained."""
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    state = {k: v.detach() for k, v in checkpoint["master"].items()}
    make_model().load_state_dict(state, strict=True)
    tokenizer = open_clip.SimpleTokenizer()
    words = {token for prompt in every_prompt() for token in tokenizer.encode(prompt)}
    ids = torch.tensor(sorted(words | {tokenizer.sot_token_id, tokenizer.eot_token_id}))
    table = state.pop(TABLE)
    kept = {name: tensor.half().contiguous() for name, tensor in state.items()}
    kept |= {ROWS: table[ids].half().contiguous(), IDS: ids.int()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it private to its writer
    dump(out / "fastood-tiny.json", CONFIG)
    dump(out / "config.json", {"preprocess_cfg": PREPROCESS, "untrained_rows": UNTRAINED})
    return {
        "steps": checkpoint["step"],
        "images": checkpoint["seen"],
        "passes": round(checkpoint["seen"] / sum(PASS.values()), 1),
        "minutes": round(checkpoint["elapsed"] / 60, 1),
        "arguments": checkpoint["arguments"],
        "parameters": sum(t.numel() for n, t in kept.items() if n != IDS),
        "token_rows": len(ids),
        "bytes": (out / "model.safetensors").stat().st_size,
    }


def dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def held_out(data: Path) -> Iterator[tuple[str, str, list[Sample]]]:
    """Set, part and its pictures with class numbers within the set."""

    def read(file: str, split: str, classes: list[str]) -> list[Sample]:
        rows = sorted(pictures(data / file, split, classes))
        return [(Image.open(io.BytesIO(body)).convert("RGB"), label) for _, body, label in rows]

    yield "cifar10", "test split", read("cifar10_jpg.tar.gz", "test", list(CIFAR_NAMES))
    for split in ("test", "validation"):
        samples = read("clothing_cc0_96.tar", split, list(ID_CLASSES))
        yield "clothing", f"{split} split, ID classes", samples
    for name in ("mnist", "notmnist"):
        images, labels = glyphs(data / f"{name}_10k.npz", "held_out")
        pairs = zip(images, labels.tolist(), strict=True)
        samples = [(Image.fromarray(i.numpy()).convert("RGB"), label) for i, label in pairs]
        yield name, "1,000 held-out glyphs", samples


@torch.no_grad()
def measure(out: Path, data: Path) -> list[dict[str, Any]]:
    """Zero-shot accuracy, among the classes of the set and among those of all sets."""
    model, preprocess, tokenizer = load_tiny(out)
    names, where = class_table()
    text = model.encode_text(tokenizer([f"a photo of a {n[0]}" for n in names]), normalize=True)
    rows = []
    for name, part, samples in held_out(data):
        classes = where[name]
        target = torch.tensor([label for _, label in samples]) + classes.start
        features = []
        for start in range(0, len(samples), 250):
            chunk = torch.stack([preprocess(image) for image, _ in samples[start : start + 250]])
            features.append(model.encode_image(chunk))
        similarity = F.normalize(torch.cat(features), dim=-1) @ text.T
        own = similarity[:, classes.start : classes.stop].argmax(1) + classes.start
        right = own == target
        rows.append(
            {
                "set": name,
                "part": part,
                "images": len(samples),
                "classes": len(classes),
                "accuracy": round(right.float().mean().item(), 4),
                "accuracy_all_classes": round(
                    (similarity.argmax(1) == target).float().mean().item(), 4
                ),
                "per_class": {
                    names[c][0]: round(right[target == c].float().mean().item(), 4) for c in classes
                },
            }
        )
        print(name, part, rows[-1]["accuracy"], rows[-1]["accuracy_all_classes"], flush=True)
    return rows


def card(training: dict[str, Any], rows: list[dict[str, Any]], scale: float) -> str:
    """The model card, its figures filled in."""
    table = [
        f"| {r['set']} | {r['part']} | {r['images']:,} | {r['classes']} "
        f"| {100 * r['accuracy']:.1f} % | {100 * r['accuracy_all_classes']:.1f} % |"
        for r in rows
    ]
    arguments = training["arguments"]
    fill = {
        "TABLE": "\n".join(table),
        "ALL": str(len(class_table()[0])),
        "CIFAR": f"{100 * rows[0]['accuracy']:.1f} %",
        "PARAMETERS": f"{training['parameters'] / 1e6:.2f} million",
        "ROWS": str(training["token_rows"]),
        "MEGABYTES": f"{training['bytes'] / 1e6:.1f} MB",
        "STEPS": f"{training['steps']:,}",
        "IMAGES": f"{training['images'] / 1e6:.2f} million",
        "PASSES": f"{training['passes']:.0f}",
        "MINUTES": f"{training['minutes']:.0f}",
        "SCALE": f"{scale:.1f}",
        "ID": ", ".join(ID_CLASSES),
        "SPLIT_SEED": str(SPLIT_SEED),
        **{key.upper(): str(arguments[key]) for key in ("lr", "muon_lr", "weight_decay", "seed")},
        "BATCH": str(round(training["images"] / training["steps"])),
        "SMOOTHING": str(arguments["smoothing"]),
        "DROPOUT": f"{100 * arguments['patch_dropout']:.0f} %",
        "FULL_FROM": f"{100 * (1 - arguments['full_from']):.0f} %",
    }
    text = CARD.read_text(encoding="utf-8")
    for key, value in fill.items():
        text = text.replace(f"[[{key}]]", value)
    if "[[" in text:
        raise ValueError(f"{CARD}: a placeholder has no value: {text[text.index('[[') :][:40]}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the shipped tiny CLIP from a checkpoint.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    training = write(args.run, args.out)
    rows = measure(args.out, args.data)
    dump(args.out / "metrics.json", {"prompt": "a photo of a {}", "held_out": rows, **training})
    scale = math.exp(float(load_tiny(args.out)[0].state_dict()["logit_scale"]))
    (args.out / "MODEL_CARD.md").write_text(card(training, rows, scale), encoding="utf-8")


if __name__ == "__main__":
    main()
