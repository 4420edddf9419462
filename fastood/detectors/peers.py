"""pytorch-ood recognises our detectors as its own, without being imported by us."""

from __future__ import annotations

import sys

__all__ = ["PytorchOODMember"]


class PytorchOODMember:
    """Base of what ``isinstance(x, pytorch_ood.api.Detector)`` shall accept.

    pytorch-ood's benchmark and grid search ask ``isinstance``. Deriving from its class would cost
    every user its import (over two seconds), so we register with it instead. It may be imported
    long after the detector was made: the one moment that is never too late is the question itself,
    which looks at ``__class__``.
    """

    _peer_base = "Detector"
    """Name in ``pytorch_ood.api`` to be an instance of; subclasses may narrow it."""

    def _class(self) -> type:
        api = sys.modules.get("pytorch_ood.api")
        for owner in type(self).__mro__:
            name = owner.__dict__.get("_peer_base")
            base = None if name is None else getattr(api, name, None)
            if base is not None and not issubclass(owner, base):
                base.register(owner)
        return type(self)

    __class__ = property(_class)
