"""Any callable as the image tower: your own network, your own class vectors, fastood's scores.

    python examples/own_encoder.py

Uses the photographs that ship with fastood and an untrained network, so the numbers mean nothing;
replace ``tower``, ``preprocess`` and ``class_vectors`` by yours.
"""

from __future__ import annotations

import torch
from torch import nn

import fastood
from fastood.demo import ID_CLASSES, photo_folder
from fastood.models import CallableEncoder


def preprocess(image):
    """PIL image (RGB) to a (3, 32, 32) tensor."""
    pixels = torch.frombuffer(bytearray(image.resize((32, 32)).tobytes()), dtype=torch.uint8)
    return pixels.view(32, 32, 3).permute(2, 0, 1).float() / 255


def main() -> None:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 64))
    class_vectors = torch.randn(len(ID_CLASSES), 64)

    encoder = CallableEncoder(
        tower,
        preprocess,
        embed_dim=64,
        logit_scale=50.0,
        name="my network",
        preprocess_id="squash to 32x32, divide by 255",  # part of what cached features depend on
    )
    pipeline = fastood.Pipeline(
        encoder, ID_CLASSES, text=class_vectors, methods=["mcm", "msp", "delta_energy"]
    )
    found = pipeline.evaluate(
        fastood.load_images(photo_folder("id"), name="clothing"),
        [fastood.load_images(photo_folder("far-omniglot"), name="letters")],
        resamples=200,
    )
    for score in ("mcm", "msp", "delta_energy"):
        print(f"{score:13s} AUROC {found.metric('letters', score, 'AUROC'):.3f}")


if __name__ == "__main__":
    main()
