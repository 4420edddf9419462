"""What a search refuses, and when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastood.data import load_images
from fastood.errors import DataError, ModelError
from fastood.models import OpenClipEncoder
from fastood.setar import search
from fastood.setar.evaluate import Evaluator
from tests.models import tiny
from tests.setar.searches import NAMES, OPTIONS, encoder_of, preprocess


def refused(images, match: str, error=ValueError, encoder=None, **options) -> None:
    with pytest.raises(error, match=match):
        search(encoder or encoder_of(), images, **{**OPTIONS, **options})


def test_what_is_refused_before_any_image_is_read(images, monkeypatch):
    monkeypatch.setattr(Evaluator, "__init__", None)  # nothing gets that far
    refused(images, r"chunk: expected 1 <= chunk, got 0", chunk=0)
    refused(images, r"chunk: expected an integer .* got 1.5", chunk=1.5)
    refused(images, r"memory: expected 0 <= memory, got -1", memory=-1)
    refused(images, r"encoder: .* got CLIP; wrap", TypeError, encoder_of().model)
    refused(["a.png"], r"images: expected an ImageSet .* got list", TypeError)
    refused(images, r"class_names: expected a list of names, got the text", TypeError,
            class_names="abcde")  # fmt: skip
    refused(images, r"ratios: .*share in \[0, 1\), got 1.5", ratios=(0, 1.5))
    refused(images, r"ratios: .*share in \[0, 1\), got -0.1", ratios=(-0.1,))
    refused(images, r"ratios: .*nan", ratios=(float("nan"),))
    refused(images, "ratios: expected shares or numbers.*both", ratios=(0.1, 5))
    refused(images, r"directions <= min\(m, n\) = 32, got 33", ratios=(33,))
    refused(images, "ratios: expected at least one that drops", ratios=(0,))
    refused(images, "ratios: expected a list", ratios=0.1)
    refused(images, r"image.proj .*: 0.99 drops all 16 directions", ratios=(0.99,), kinds="proj")
    refused(images, "kinds: .*got 'mlp'", kinds="mlp")
    refused(images, "kinds: .*did you mean 'W_up'", kinds="W_upp")
    refused(images, "layers: expected numbers in -4..3", layers=[7])
    refused(images, "order: .*did you mean 'exhaustive'", order="exhaustiv")
    refused(images, "top_k", top_k=5)
    refused(images, "top_k", top_k=0)
    refused(images, "partition: expected one of reference, global", partition="batches")
    refused(images, "batch_size", batch_size=0)
    refused(images, "id_set: voc has 14 classes, got 5", id_set="voc")
    refused(images, "id_set: expected one of imagenet, voc", id_set="cifar")
    refused(images, "score", metric="auroc")
    refused(images, "metric", metric="f1")
    refused(images, "label 4 has no name", class_names=NAMES[:4])


def test_unlabelled_images_are_refused(images, tmp_path):
    for item in list(images)[:3]:
        (tmp_path / Path(item.path).name).write_bytes(item.read())
    refused(load_images(tmp_path), "have no label", class_names=NAMES)


def test_weights_that_are_not_finite_are_refused(images):
    encoder = encoder_of()
    with torch.no_grad():
        encoder.model.transformer.resblocks[1].mlp.c_fc.weight[3, 4] = float("nan")
    refused(images, r"text.1.up has NaN or Inf", ModelError, encoder)


def test_weights_that_are_computed_from_others_are_refused(images):
    encoder = encoder_of()
    block = encoder.model.visual.transformer.resblocks[0]
    torch.nn.utils.parametrizations.weight_norm(block.mlp.c_fc)
    with pytest.raises(ModelError, match=r"image\.0\.up: .* computed from other parameters"):
        search(encoder, images, **OPTIONS)


def test_resnets_are_excluded_with_the_reason(images):
    model = tiny.clip(tiny.RESNET)
    encoder = OpenClipEncoder(model, preprocess, tiny.TOKENIZER)
    refused(images, "ResNets are excluded", ModelError, encoder)


def test_an_image_that_cannot_be_read_is_named(images, tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"no picture" if name == "cat" else b"")
    for item in list(images)[::2]:
        if "cat" not in item.path:
            (tmp_path / item.path).write_bytes(item.read())
    refused(load_images(tmp_path), "cat/0.png", DataError)
