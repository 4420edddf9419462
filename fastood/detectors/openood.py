"""A detector as OpenOOD's evaluators expect it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastood.detectors.detector import Detector
from fastood.detectors.encoding import split_batch
from fastood.detectors.heads import LogitsHead

__all__ = ["OpenOODPostprocessor", "as_openood_postprocessor"]


def as_openood_postprocessor(detector: Detector) -> OpenOODPostprocessor:
    """The detector with OpenOOD's interface: ``setup``, ``postprocess``, ``inference``, ...

    Where OpenOOD is installed the result also is an instance of its ``BasePostprocessor``, which
    its ``Evaluator`` asks for. See ``OpenOODPostprocessor`` for what ``net`` stands for.

    Example:
        >>> from fastood.detectors import MCM
        >>> view = as_openood_postprocessor(MCM(None, torch.eye(2)))
        >>> net = torch.nn.Identity()                       # stands for an image encoder
        >>> pred, conf = view.postprocess(net, torch.tensor([[0.0, 2.0]]))
        >>> pred.tolist(), round(conf.item(), 4)
        ([1], 0.7311)
    """
    if not isinstance(detector, Detector):
        raise TypeError(f"detector: expected a Detector, got {type(detector).__name__}")
    try:
        from openood.postprocessors import BasePostprocessor
    except ImportError:
        return OpenOODPostprocessor(detector)
    # its __init__ wants a config file's worth of settings; ours, first in line, replaces it
    member = type("OpenOODPostprocessor", (OpenOODPostprocessor, BasePostprocessor), {})
    return member(detector)


class OpenOODPostprocessor:
    """``postprocess(net, data)`` → class and confidence, **higher = ID**, on the model's device.

    ``net`` is OpenOOD's network. If the detector has an encoder of its own, ``net`` is not used
    and may be None. Otherwise ``net`` yields the features: the second part of ``net(data,
    return_feature=True)`` where its ``forward`` has that argument, else what ``net(data)`` returns.
    A detector with ``LogitsHead`` scores the logits ``net(data)`` instead.

    Attributes:
        detector: what it shows.
        APS_mode: False; set it to True and OpenOOD searches over ``args_dict``.
        hyperparam_search_done: set by OpenOOD.
        args_dict: the detector's ``hyperparameter_space``.
    """

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.config: Any = None
        self.APS_mode = False
        self.hyperparam_search_done = False
        self.args_dict = dict(detector.hyperparameter_space)

    def setup(self, net: Any, id_loader_dict: Any, ood_loader_dict: Any = None) -> None:
        """Fit on ``id_loader_dict["train"]`` if the detector has to be and is not fitted yet."""
        del ood_loader_dict
        if not self.detector.requires_fit or self.detector.fitted:
            return
        if "train" not in id_loader_dict:
            raise ValueError(
                f"id_loader_dict: {self.detector.score} is fitted on the loader 'train', "
                f"got {', '.join(id_loader_dict) or 'none'}"
            )
        if isinstance(net, nn.Module):
            net.eval()
        features, labels = [], []
        for batch in id_loader_dict["train"]:
            data, label = split_batch(batch)
            if label is None:
                raise ValueError("id_loader_dict['train']: expected batches with the key 'label'")
            features.append(self._features(net, data)[0])
            labels.append(torch.as_tensor(label).cpu())
        if not features:
            raise ValueError("id_loader_dict['train']: the loader is empty")
        self.detector.fit_features(torch.cat(features), torch.cat(labels))

    @torch.no_grad()
    def postprocess(self, net: Any, data: Tensor) -> tuple[Tensor, Tensor]:
        """``(pred (B,) int64, conf (B,) float32)`` of a batch of images."""
        features, local, logits = self._features(net, data)
        conf = self.detector.confidence_features(features, local)
        if logits is not None and self.detector.head is None:
            return logits.argmax(dim=-1), conf
        return self.detector.classify(features), conf

    def __call__(self, net: Any, data: Tensor) -> tuple[Tensor, Tensor]:
        return self.postprocess(net, data)

    def inference(
        self, net: Any, data_loader: Iterable[Any], progress: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``(pred, conf, label)`` of a whole loader in numpy; OOD labels stay as they are."""
        preds, confs, labels = [], [], []
        for batch in _tracked(data_loader, progress):
            data, label = split_batch(batch)
            if label is None:
                raise ValueError("data_loader: expected batches with the keys 'data' and 'label'")
            pred, conf = self.postprocess(net, data)
            preds.append(pred.cpu().numpy())
            confs.append(conf.cpu().numpy())
            labels.append(np.asarray(torch.as_tensor(label).cpu(), dtype=np.int64))
        if not preds:
            raise ValueError("data_loader: expected at least one batch, got none")
        return np.concatenate(preds), np.concatenate(confs), np.concatenate(labels)

    def set_hyperparam(self, hyperparam: Sequence[Any]) -> None:
        """Values in the order of ``args_dict``."""
        if len(hyperparam) != len(self.args_dict):
            raise ValueError(
                f"hyperparam: expected one value each for {list(self.args_dict)}, got {hyperparam}"
            )
        self.detector.set_hyperparameters(**dict(zip(self.args_dict, hyperparam, strict=True)))

    def get_hyperparam(self) -> list[Any]:
        """Current values in the order of ``args_dict``."""
        return list(self.detector.get_hyperparameters().values())

    @torch.no_grad()
    def _features(self, net: Any, data: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Features, patches if the score needs them, and the net's logits where it gives both."""
        if self.detector.encoder is not None:
            return *self.detector.encode(data), None
        if net is None:
            raise ValueError("net: this detector has no encoder; net must give the features")
        if isinstance(net, nn.Module):
            first = next(net.parameters(), None)
            data = data if first is None else data.to(first.device)
        if _offers_features(net) and not isinstance(self.detector.head, LogitsHead):
            logits, features = net(data, return_feature=True)
            return features, None, logits
        output = net(data)
        if isinstance(output, (tuple, list)):
            return output[0], output[1], None
        return output, None, None


def _offers_features(net: Any) -> bool:
    try:
        parameters = inspect.signature(getattr(net, "forward", net)).parameters
    except (TypeError, ValueError):  # builtins and some compiled modules tell nothing
        return False
    return "return_feature" in parameters


def _tracked(loader: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return loader
    from rich.console import Console
    from rich.progress import track

    return track(loader, "scoring", console=Console(stderr=True))
