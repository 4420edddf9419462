"""What each precision of the GPU kernels costs in accuracy: ``python -m bench.precision``.

The kernels themselves run, on a GPU or, without one, interpreted on the CPU: rounding of operands,
float32 sums and everything after them are the same there, only the order of sums within a product
is not. Beside them eager torch in the same formats. Writes ``results/precision.md``.

With ``FASTOOD_TEST_DATA``: 3,000 ImageNet features of CLIP ViT-B/32 (float16) and 1000 classes;
else features made to spread as CLIP's do.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from torch import Tensor

from bench import shapes
from fastood.kernels import configs, rows
from fastood.kernels.operands import prepare
from fastood.kernels.precision import PRECISIONS
from fastood.ops.requests import Kind, Request, reference_score

REQUESTS = {
    "largest logit": Request(Kind.MAX_LOGIT, 0.01),
    "MCM, tau 1": Request(Kind.MAX_SOFTMAX, 1.0),
    "ΔEnergy, tau .01, c 2": Request(Kind.DELTA_ENERGY, 0.01, 2),
    "ΔEnergy, tau 1, c 2": Request(Kind.DELTA_ENERGY, 1.0, 2),
}
"""What is computed; errors are absolute for the logit and relative for the rest."""


class Line(NamedTuple):
    name: str
    errors: list[float]
    distinct: list[int]


def features() -> tuple[Tensor, Tensor, str]:
    """Images, classes and where they are from."""
    folder = os.environ.get("FASTOOD_TEST_DATA")
    if folder is None:
        made = shapes.features(shapes.Shape(3000, 1000, 512))
        return (
            made.image,
            made.text,
            "3,000 images made to spread as CLIP's do, 1,000 classes, D = 512",
        )
    import numpy as np

    found = Path(folder) / "features" / "vitb32"
    with np.load(found / "imagenet_1shot_2shot.npz", allow_pickle=False) as file:
        image = torch.from_numpy(file["features"])
    with np.load(found / "text.npz", allow_pickle=False) as file:
        text = torch.from_numpy(file["imagenet1k_features"])
    return image, text, "3,000 ImageNet images and 1,000 classes, CLIP ViT-B/32, D = 512"


def unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def exact(image: Tensor, text: Tensor) -> list[Tensor]:
    s = unit(image.double()) @ unit(text.double()).mT
    return [reference_score(r, s) for r in REQUESTS.values()]


def compare(name: str, found: list[Tensor], want: list[Tensor]) -> Line:
    errors = []
    for request, x, y in zip(REQUESTS.values(), found, want, strict=True):
        error = (x.double() - y).abs()
        relative = request.kind != Kind.MAX_LOGIT
        errors.append(float((error / y.abs() if relative else error).max()))
    return Line(name, errors, [x.float().unique().numel() for x in found])


def kernels(image: Tensor, text: Tensor, device: str) -> Iterator[tuple[str, list[Tensor]]]:
    """Float32 features in every precision; half-precision ones as they are."""
    asked = tuple(REQUESTS.values())
    # interpreted, one program costs about the same whatever its size
    large = configs.Config(128, 256, 128, 4, 1, splits=1)
    pick = mock.patch("fastood.kernels.source.pick", lambda *_, **__: large)
    given = {"fp16": torch.float16, "bf16": torch.bfloat16}
    with pick if configs.INTERPRETED else mock.patch.dict({}):
        for precision in PRECISIONS:
            for dtype in dict.fromkeys([given.get(precision, torch.float32), torch.float32]):
                operand = prepare(text.float().to(device), precision, normalize=True)
                z = image.float().to(device=device, dtype=dtype)
                found, _ = rows.scores(asked, z, operand, normalize=True)
                of = str(dtype).removeprefix("torch.")
                yield f"fastood {precision}, {of} features", list(found.cpu())


def eager(image: Tensor, text: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
    """Normalise, multiply and score in one dtype, as one writes it."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        s = unit(image.to(dtype)) @ unit(text.to(dtype)).mT
        found = [
            (s / 0.01).amax(dim=-1),
            s.softmax(dim=-1).amax(dim=-1),
            *(_delta_energy(s, tau) for tau in (0.01, 1.0)),
        ]
        yield f"eager {str(dtype).removeprefix('torch.')}", found


def _delta_energy(s: Tensor, tau: float) -> Tensor:
    index = s.topk(2, dim=-1).indices
    whole = torch.logsumexp(s / tau, dim=-1)
    parts = [
        whole - torch.logsumexp(s.scatter(-1, i, 0.0) / tau, dim=-1) for i in index.split(1, -1)
    ]
    return parts[0] + parts[1]


def page(lines: list[Line], source: str, where: str) -> str:
    names = list(REQUESTS)
    head = [
        "# Error and resolution of each precision",
        "",
        f"{source}; {where}.",
        "Largest error against float64 (of the logit absolute, of the scores relative), and how",
        "many different values the images have. Written by `python -m bench.precision`.",
        "",
        "| | " + " | ".join(f"{name} | distinct" for name in names) + " |",
        "|---|" + "---|" * 2 * len(names),
    ]
    body = []
    for line in lines:
        errors = [f"{e:.1e}" if e else "" for e in line.errors]
        cells = [f"{e} | {n}" for e, n in zip(errors, line.distinct, strict=True)]
        body.append(f"| {line.name} | " + " | ".join(cells) + " |")
    return "\n".join([*head, *body]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/precision.md")
    out = parser.parse_args().out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "kernels interpreted on a CPU"
    image, text, source = features()
    want = exact(image, text)
    lines = [compare("float64, rounded to float32", want, want)]
    lines += [compare(name, found, want) for name, found in kernels(image, text, device)]
    lines += [compare(name, found, want) for name, found in eager(image, text)]
    text_out = page(lines, source, where)
    out.write_text(text_out, encoding="utf-8")
    print(text_out)


if __name__ == "__main__":
    main()
