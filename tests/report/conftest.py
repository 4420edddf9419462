"""A realistic evaluation from seeded arrays: results, per-image table, and pictures."""

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fastood.report.table import ScoreTable

NASTY_CLASS = '<script>alert("class")</script> & \u05e9\u05dc\u05d5\u05dd'
NASTY_FILES = (
    "<script>alert('file')</script>.jpg",
    'a"b & c<d>.png',
    "naïve/été 照片 🦉.jpg",
    "\u202eevil gpj.exe\u202c.jpg",
    "line\nbreak, comma;\ttab.png",
)
CLASSES = ["shirt", "dress", "hat", "shoes", "pants", NASTY_CLASS]
SCORES = {
    "mcm": {"name": "mcm", "options": {"tau": 1.0}, "higher": "id", "formula": "max softmax(s/τ)"},
    "delta_energy": {"name": "delta_energy", "options": {"tau": 0.01, "c": 2}, "higher": "id"},
    "gl_mcm": {"name": "gl_mcm", "options": {"tau": 1.0, "weight": 1.0}, "higher": "id"},
    "energy": {"name": "energy", "options": {"tau": 0.01, "scale": "tau"}, "higher": "id"},
}


@dataclass
class Sample:
    results: dict[str, Any]
    table: ScoreTable
    pictures: dict[tuple[str, str], bytes] = field(default_factory=dict)

    def open_image(self, set_name: str, path: str) -> bytes | None:
        return self.pictures.get((set_name, path))


def auroc(pos: np.ndarray, neg: np.ndarray) -> float:
    below = (neg[None] < pos[:, None]).mean() if len(neg) else 0.0
    return float(below + 0.5 * (neg[None] == pos[:, None]).mean())


def fpr(pos: np.ndarray, neg: np.ndarray) -> float:
    at = np.sort(pos)[int(np.floor(0.05 * len(pos)))]
    return float((neg >= at).mean())


def picture(rng: np.random.Generator, fmt: str = "JPEG") -> bytes:
    top, bottom = rng.integers(30, 225, (2, 3))
    ramp = np.linspace(0, 1, 120)[:, None, None]
    pixels = (top * (1 - ramp) + bottom * ramp).repeat(160, 1).astype(np.uint8)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    x, y, r = rng.integers(30, 130), rng.integers(30, 90), rng.integers(14, 40)
    draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(v) for v in rng.integers(60, 255, 3)))
    out = io.BytesIO()
    image.save(out, fmt)
    return out.getvalue()


def make_sample(n_id: int = 240, sets: int = 2, seed: int = 0, scores: Any = None) -> Sample:
    rng = np.random.default_rng(seed)
    scores = SCORES if scores is None else scores
    names = ["near: other clothing", "far: textures & <i>shapes</i>", "digits", "places", "letters"]
    names = names[:sets]
    sizes = [n_id, *(int(n_id * f) for f in (0.6, 0.9, 0.5, 1.0, 0.7)[:sets])]
    label = rng.integers(0, len(CLASSES), n_id)
    guess = np.where(rng.random(n_id) < 0.72, label, rng.integers(0, len(CLASSES), n_id))
    columns: dict[str, list[Any]] = {
        k: [] for k in ("set", "role", "path", "label", "class_name", "predicted")
    }
    raw: dict[str, list[np.ndarray]] = {k: [] for k in scores}
    for i, (name, n) in enumerate(zip(["clothing", *names], sizes, strict=True)):
        columns["set"] += [name] * n
        columns["role"] += ["id" if i == 0 else "ood"] * n
        files = [f"{'photos' if i else 'test'}/{j:05d}.jpg" for j in range(n)]
        files[: len(NASTY_FILES)] = NASTY_FILES
        columns["path"] += files
        if i == 0:
            columns["label"] += [int(v) for v in label]
            columns["class_name"] += [CLASSES[v] for v in label]
            columns["predicted"] += [CLASSES[v] for v in guess]
        else:
            columns["label"] += [None] * n
            columns["class_name"] += [None] * n
            columns["predicted"] += [CLASSES[v] for v in rng.integers(0, len(CLASSES), n)]
        common = rng.normal(0, 0.7, n)
        for k, score in enumerate(scores):
            spread = 1.0 + 0.8 * (k % 3 == 2) * (i > 0)
            shift = 0 if i == 0 else 1.1 + 0.7 * i + 0.35 * (k % 3)
            x = common + rng.normal(0, 1, n) * spread - shift
            if score == "mcm":
                x = 0.17 + 0.004 * x
            elif score == "energy":
                x = 30 + 0.8 * x
            raw[score].append(x.astype(np.float32))
    arrays = {k: np.concatenate(v) for k, v in raw.items()}
    table = ScoreTable.from_columns(**columns, scores=arrays)
    # The first score's extremes carry the awkward names, so that the galleries must show them.
    metrics = []
    for score in scores:
        rows = []
        pos = table.values(score, role="id")
        for name in names:
            neg = table.values(score, role="ood", set=name)
            values = {
                "AUROC": auroc(pos, neg),
                "AUPR-IN": 0.6 + 0.4 * auroc(pos, neg) / 1.1,
                "AUPR-OUT": 0.5 + 0.45 * auroc(pos, neg) / 1.1,
                "FPR95-ID": fpr(pos, neg),
                "FPR95-OOD": fpr(-neg, -pos),
            }
            rows.append({"set": name, "score": score, "n_id": n_id, "n_ood": len(neg), **values})
        if sets > 1:
            mean = {k: float(np.mean([r[k] for r in rows])) for k in values}
            total = sum(r["n_ood"] for r in rows)
            rows.append({"set": "average", "score": score, "n_id": n_id, "n_ood": total, **mean})
        for row in rows:
            row["intervals"] = {
                k: [max(0.0, row[k] - 0.02), min(1.0, row[k] + 0.02)] for k in values
            }
        metrics += rows
    accuracy = float((label == guess).mean())
    pictures = {}
    if n_id <= 1000:
        for i in range(len(table)):
            if i % 7:  # every seventh file is gone
                pictures[table.set[i], table.path[i]] = picture(rng, "PNG" if i % 3 else "JPEG")
        first = int(np.argmin(table.scores[next(iter(scores))][:n_id]))
        pictures[table.set[first], table.path[first]] = b"not an image at all"
    results: dict[str, Any] = {
        "schema": 1,
        "fastood": "0.1.0",
        "created": "2026-03-14T09:26:53+00:00",
        "command": "fastood eval --id clothing --ood near --ood far --model ViT-B-16/openai",
        "model": {
            "name": "ViT-B-16/openai",
            "fingerprint": "9f2c1a7be01d44aa",
            "logit_scale": 100.0,
            "logit_bias": None,
            "embed_dim": 512,
            "device": "cpu",
            "dtype": "float32",
            "preprocess": "resize 224 bicubic, centre crop, normalise",
        },
        "prompts": {
            "templates": ["a photo of a {}.", "a picture of <b>{}</b>"],
            "class_names": CLASSES,
            "digest": "51b0c2d7",
            "warnings": ['class names "shirt" and "t-shirt" share a synonym'],
        },
        "scores": scores,
        "id": {
            "name": "clothing",
            "root": "/data/clothing/test",
            "layout": "class folders",
            "images": n_id + 2,
            "encoded": n_id,
            "skipped": [
                {"path": "hat/<img src=x onerror=alert(1)>.jpg", "reason": "cannot identify image"},
                {"path": "dress/cut.jpg", "reason": "image file is truncated (12 bytes missing)"},
            ],
            "accuracy": {
                "value": accuracy,
                "n": n_id,
                "interval": [accuracy - 0.05, accuracy + 0.05],
            },
        },
        "ood": [
            {
                "name": name,
                "root": f"/data/ood/{i}",
                "layout": "flat folder",
                "images": sizes[i + 1],
                "encoded": sizes[i + 1],
                "skipped": [],
            }
            for i, name in enumerate(names)
        ],
        "metrics": metrics,
        "thresholds": {
            s: {
                "tpr": 0.95,
                "threshold": float(np.quantile(table.values(s, role="id"), 0.05)),
                "n": n_id,
                "source": "validation split",
            }
            for s in scores
        },
        "notes": ["Negative labels need a large vocabulary; neg_label was left out."],
        "warnings": ["2 of 242 ID files could not be read & were skipped."],
        "versions": {"python": "3.11.9", "torch": "2.6.0", "open_clip": "2.30.0"},
        "seconds": {"encode": 12.25, "score": 0.4},
    }
    return Sample(results, table, pictures)


@pytest.fixture(scope="session")
def sample() -> Sample:
    return make_sample()


@pytest.fixture(scope="session")
def build():
    return make_sample
