"""A threshold of the pipeline (and so of the command line) decides for a detector."""

from __future__ import annotations

import pytest
import torch

import fastood
from fastood import detectors
from fastood.features import encode_classes
from fastood.features.featureset import FeatureChunk, FeatureSet
from fastood.models import CallableEncoder
from fastood.pipeline import Pipeline
from tests.detectors.toys import D, K, P, Tower, images, text

NAMES = ("ant", "bee", "cat", "dog", "elk")
TEMPLATES = ("a photo of a {}.", "a sketch of a {}.")


@pytest.fixture(scope="module")
def model() -> CallableEncoder:
    vectors = {
        t.format(n): text()[i] + j for j, t in enumerate(TEMPLATES) for i, n in enumerate(NAMES)
    }
    return CallableEncoder(
        Tower(patches=True),
        lambda image: torch.zeros(3, 4, 4),
        preprocess_id="zeros",
        embed_dim=D,
        patches=P,
        text=vectors,
        logit_scale=20.0,
    )


@pytest.mark.parametrize(
    ("score", "make"),
    [
        ("mcm", detectors.MCM),
        ("msp", detectors.MSP),
        ("delta_energy", detectors.DeltaEnergy),
        ("gl_mcm", detectors.GLMCM),
        ("neg_entropy", detectors.NegEntropy),
    ],
)
def test_keys_and_scores_agree(model, score, make):
    x, _ = images(40)
    z, local = model.encode_image(x, local=True)
    origin = {"fingerprint": model.fingerprint}
    chunk = FeatureChunk(0, z, local)
    stored = FeatureSet("id", tuple(map(str, range(40))), None, None, (chunk,), provenance=origin)
    pipeline = Pipeline(model, NAMES, templates=TEMPLATES, methods=[score])
    scored = pipeline.score(stored).scores[score]
    classes = encode_classes(model, NAMES, templates=TEMPLATES)
    assert classes.features.shape == (K, D)
    detector = make(model, classes)
    assert detector.key == scored.key
    torch.testing.assert_close(detector.confidence(x), torch.from_numpy(scored.values))
    threshold = fastood.calibrate(scored, tpr=0.8)
    assert detector.is_ood(x, threshold).tolist() == detector.is_ood(stored, threshold).tolist()
    assert detector.is_ood(x, threshold).sum() == threshold.is_ood(scored).sum() > 0
    with pytest.raises(ValueError, match="prompts"):
        make(model, encode_classes(model, NAMES, templates=TEMPLATES[:1])).is_ood(x, threshold)


def test_bare_class_features_stand_for_their_prompts():
    z = text()[:3] + 0.1
    threshold = fastood.calibrate(detectors.MCM(None, text()).scores(z), tpr=0.5)
    assert detectors.MCM(None, text().clone()).is_ood(z, threshold).any()
    for other in (text() + 1, text().flip(0), text()[:-1]):
        with pytest.raises(ValueError, match="prompts"):
            detectors.MCM(None, other).is_ood(z, threshold)
    bank = fastood.calibrate(detectors.MCM(None, fastood.ClassBank(text())).scores(z), tpr=0.5)
    with pytest.raises(ValueError, match="prompts"):
        detectors.MCM(None, fastood.ClassBank(text() + 1)).is_ood(z, bank)


def test_negatives_and_their_groups_are_part_of_the_prompts(model):
    negatives = torch.randn(12, D, generator=torch.Generator().manual_seed(7))
    for classes in (text(), encode_classes(model, NAMES, templates=TEMPLATES)):

        def key(negatives, groups=3, seed=0, classes=classes):
            return detectors.NegLabel(None, classes, negatives, groups=groups, seed=seed).key

        assert key(negatives) == key(negatives.clone())
        for other in (key(negatives + 1), key(negatives, 2), key(negatives, 3, 1)):
            assert other.prompts != key(negatives).prompts
