"""Global scores as requests, their exact values, and what plain torch makes of them in float32."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap

import torch
from torch import Tensor

from fastood.ops.requests import Kind, Request
from fastood.scores.compute import score_rows
from tests.conftest import clip_like
from tests.scores import oracle


def every_request(k: int, tau: float, c: int = 3, reset: float = 0.0) -> tuple[Request, ...]:
    """Each global score of K classes at one temperature."""
    requests = [
        Request(Kind.MAX_SIMILARITY),
        Request(Kind.MAX_LOGIT, tau),
        Request(Kind.MAX_SOFTMAX, tau),
        Request(Kind.ENERGY, tau),
        Request(Kind.ENERGY, tau, flag=True),
        Request(Kind.NEG_ENTROPY, tau),
        Request(Kind.VARIANCE, tau),
        Request(Kind.DELTA_ENERGY, tau, 1, reset),
        Request(Kind.DELTA_ENERGY, tau, min(c, k), reset),
        Request(Kind.DELTA_ENERGY, tau, min(c, k), reset, True),
    ]
    if k > 1:
        requests += [Request(Kind.MARGIN, c=2), Request(Kind.MARGIN, tau, c=2, flag=True)]
    return tuple(dict.fromkeys(requests))


def name_of(request: Request) -> str:
    return f"{request.kind.name.lower()}(tau={request.tau:g}, c={request.c}, flag={request.flag})"


def exact(request: Request, s: Tensor) -> Tensor:
    """From the definition, in float64."""
    s, tau = s.double(), request.tau
    if request.kind == Kind.MAX_SIMILARITY:
        return oracle.max_similarity(s)
    if request.kind == Kind.MAX_LOGIT:
        return oracle.max_similarity(s) / tau
    if request.kind == Kind.MAX_SOFTMAX:
        return oracle.max_softmax(s, tau)
    if request.kind == Kind.ENERGY:
        return oracle.lse(s / tau) if request.flag else oracle.energy(s, tau)
    if request.kind == Kind.NEG_ENTROPY:
        return oracle.neg_entropy(s, tau)
    if request.kind == Kind.VARIANCE:
        return oracle.variance(s, tau)
    if request.kind == Kind.MARGIN:
        return oracle.margin((s / tau).softmax(-1)) if request.flag else oracle.margin(s)
    reset = float(torch.tensor(request.reset))  # float32, as the similarities are
    return oracle.delta_energy(s, tau, request.c, reset, request.flag)


def eager(request: Request, s: Tensor) -> Tensor:
    """As one writes it in a line of torch, in the dtype of ``s``."""
    tau = request.tau
    if request.kind == Kind.MAX_SIMILARITY:
        return s.max(-1).values
    if request.kind == Kind.MAX_LOGIT:
        return (s / tau).max(-1).values
    if request.kind == Kind.MAX_SOFTMAX:
        return (s / tau).softmax(-1).max(-1).values
    if request.kind == Kind.ENERGY:
        return torch.logsumexp(s / tau, -1) * (1 if request.flag else tau)
    if request.kind == Kind.NEG_ENTROPY:
        log_p = (s / tau).log_softmax(-1)
        return math.log(s.shape[-1]) + (log_p.exp() * log_p).sum(-1)
    if request.kind == Kind.VARIANCE:
        return (s / tau).softmax(-1).var(-1, unbiased=False)
    if request.kind == Kind.MARGIN:
        top = ((s / tau).softmax(-1) if request.flag else s).topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]
    index = s.topk(request.c, dim=-1).indices
    groups = [index] if request.flag else index.split(1, dim=-1)
    whole = torch.logsumexp(s / tau, -1)
    return sum(whole - torch.logsumexp(s.scatter(-1, g, request.reset) / tau, -1) for g in groups)


def scores(requests: tuple[Request, ...], *, impl: str = "cpu", **inputs: object) -> Tensor:
    """(R, B): several scores in one pass, of ``image`` and ``text`` or ``similarity``."""
    given = {"image": None, "text": None, "similarity": None, **inputs}
    return score_rows(requests, impl=impl, **given).values


def cosines(b: int, k: int, *, seed: int = 0) -> Tensor:
    """(B, K) float32 cosines spread as CLIP's are."""
    image, text, _ = clip_like(b, k, seed=seed)
    return oracle.cosine(image, text).float()


def relative(got: Tensor, want: Tensor) -> float:
    """The largest relative error."""
    error = (got.double() - want).abs() / want.abs().clamp_min(1e-300)
    return float(error.max()) if error.numel() else 0.0


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new Python process; with the kernels of this machine's cache unless told otherwise."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
