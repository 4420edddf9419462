"""The OpenOOD view: its evaluator's calls, its batches, its idea of a network."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from fastood import detectors
from fastood.detectors import LogitsHead, as_openood_postprocessor
from tests.detectors.toys import D, K, Tower, encoder, images, text


def batches(n: int = 24, size: int = 7, seed: int = 1) -> list[dict]:
    x, y = images(n, seed)
    return [{"data": x[i : i + size], "label": y[i : i + size]} for i in range(0, n, size)]


class Net(nn.Module):
    """An OpenOOD classifier: logits, and features on request."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = Tower(), nn.Linear(D, K)

    def forward(self, x, return_feature=False):
        z = self.tower(x)
        return (self.head(z), z) if return_feature else self.head(z)


def test_own_encoder_needs_no_net():
    model, (x, y) = encoder(Tower()), images(24)
    detector = detectors.MCM(model, text())
    view = as_openood_postprocessor(detector)
    view.setup(None, {}, {})
    pred, conf, label = view.inference(None, batches(), progress=False)
    np.testing.assert_allclose(conf, detector.confidence(x).numpy(), rtol=1e-5)
    cosines = nn.functional.normalize(model(x)) @ nn.functional.normalize(text()).T
    np.testing.assert_array_equal(pred, cosines.argmax(-1).numpy())
    np.testing.assert_array_equal(label, y.numpy())
    assert conf.dtype == np.float32
    assert pred.dtype == label.dtype == np.int64


@pytest.mark.parametrize("net", [Net(), Tower()], ids=["return_feature", "features"])
def test_net_gives_the_features(net):
    x, _ = images(6)
    z = getattr(net, "tower", net)(x).detach()
    detector = detectors.MCM(None, text())
    pred, conf = as_openood_postprocessor(detector).postprocess(net, x)
    assert torch.equal(conf, detector.confidence_features(z))
    assert torch.equal(pred, detector.classify(z))
    assert not conf.requires_grad


def test_logits_head_scores_the_logits():
    net, (x, _) = Net(), images(6)
    pred, conf = as_openood_postprocessor(detectors.MSP(None, LogitsHead())).postprocess(net, x)
    best = net(x).softmax(-1).max(-1)
    torch.testing.assert_close(conf, best.values.detach())
    assert torch.equal(pred, best.indices)


def test_patches_come_as_a_pair():
    tower, (x, _) = Tower(patches=True), images(6)
    z, local = tower(x)
    detector = detectors.GLMCM(None, text())
    _, conf = as_openood_postprocessor(detector).postprocess(tower, x)
    assert torch.equal(conf, detector.confidence_features(z.detach(), local.detach()))


def test_setup_fits_on_the_training_loader():
    net, (x, y) = Net().train(), images(24)
    detector = detectors.KNN(k=2)
    view = as_openood_postprocessor(detector)
    with pytest.raises(ValueError, match="'train'"):
        view.setup(net, {"test": batches()}, {})
    view.setup(net, {"train": batches()}, {})
    assert not net.training
    with torch.no_grad():
        z = net.tower(x)
    expected = detectors.KNN(k=2).fit_features(z, y)
    pred, conf = view(net, x)
    torch.testing.assert_close(conf, expected.confidence_features(z), rtol=1e-5, atol=1e-6)
    assert torch.equal(pred, net(x).argmax(-1))  # no head of ours: the net's classes
    fitted = detector.key
    view.setup(net, {"train": batches(seed=5)}, {})  # already fitted: left alone
    assert detector.key == fitted
    own = as_openood_postprocessor(detectors.KNN(Tower(), k=1))
    own.setup(None, {"train": batches()})
    pred, _ = own.postprocess(None, x)
    assert torch.equal(pred[y >= 0], y[y >= 0])  # every sample is its own nearest neighbour


def test_hyperparameters_in_order():
    detector = detectors.DeltaEnergy(None, text())
    view = as_openood_postprocessor(detector)
    assert not view.APS_mode
    assert not view.hyperparam_search_done
    assert list(view.args_dict) == ["tau", "c"]
    view.set_hyperparam([0.5, 2])
    assert view.get_hyperparam() == [0.5, 2]
    assert (detector.options["tau"], detector.options["c"]) == (0.5, 2)
    with pytest.raises(ValueError, match="one value each"):
        view.set_hyperparam([0.5])


def test_is_a_member_where_openood_is_installed(monkeypatch):
    class BasePostprocessor:
        def __init__(self, config):
            self.config = config

    package, module = ModuleType("openood"), ModuleType("openood.postprocessors")
    module.BasePostprocessor = BasePostprocessor
    package.postprocessors = module
    monkeypatch.setitem(sys.modules, "openood", package)
    monkeypatch.setitem(sys.modules, "openood.postprocessors", module)
    view = as_openood_postprocessor(detectors.MCM(None, text()))
    assert isinstance(view, BasePostprocessor)
    pred, conf = view.postprocess(Tower(), images(3)[0])
    assert pred.shape == conf.shape == (3,)


def test_bad_input():
    with pytest.raises(TypeError, match="Detector"):
        as_openood_postprocessor(Tower())
    view = as_openood_postprocessor(detectors.MCM(None, text()))
    with pytest.raises(ValueError, match="net"):
        view.postprocess(None, images(2)[0])
    with pytest.raises(ValueError, match="batch"):
        view.inference(Tower(), [], progress=False)
    with pytest.raises(ValueError, match="label"):
        view.inference(Tower(), [images(2)[0]], progress=False)
    view = as_openood_postprocessor(detectors.KNN(None, k=1).fit_features(torch.eye(D)))
    with pytest.raises(ValueError, match="classes"):
        view.postprocess(Tower(), images(2)[0])


def test_progress_goes_to_stderr(capsys):
    view = as_openood_postprocessor(detectors.MCM(None, text()))
    view.inference(Tower(), batches(), progress=True)
    assert capsys.readouterr().out == ""
