"""The patch term of the LoCoOp loss: value, ranks and gradients.

Over the OOD patches, those with at least ``top_k`` classes above the image's label, the mean of
h = Σ_k p_k log(p_k + 1e-5). ``locoop_value`` finds it in two passes over the patches and classes,
``locoop_gradient`` its gradients in a third. Nothing is read back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastood.kernels.configs import pick
from fastood.kernels.locoop_gradient import gradients
from fastood.kernels.locoop_value import Job, patch_value
from fastood.kernels.operands import native, prepare, scaled_first
from fastood.kernels.patches import scale_of
from fastood.kernels.precision import Precision

__all__ = ["patch_entropy", "specialisations"]


def patch_entropy(
    local: Tensor,
    text: Tensor,
    labels: Tensor,
    top_k: int,
    tau: float,
    normalize: bool,
    text_gradient: bool,
    local_gradient: bool,
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator ``fastood::patch_entropy``: value, rank, d_text, d_local.

    Args:
        local: (B, P, D) of any float dtype and strides (copied unless the last is 1).
        text: (K, D) unit rows; labels: (B,) int64.
        normalize: divide the patches by their norms; ``d_local`` is then with respect to the
            divided ones.
        precision: of all products; None is ``fp16x3``, float32 grade.
    Returns:
        Scalar float32, (B, P) int32, (K, D) and (B, P, D) float32 gradients of the value, empty
        where not asked for. All but the ranks are NaN if a feature is not finite, a patch to be
        normalised is zero or a label is outside 0..K-1 (of ``d_local`` the rows concerned).
    """
    precision = precision or "fp16x3"
    local = local.detach()
    if local.stride(-1) != 1:
        local = local.contiguous()
    b, p, d = local.shape
    classes = prepare(text, precision, normalize=False)
    config = pick("locoop", precision, rows=b * p, width=d)
    tiles = {"BB": config.rows, "BN": config.columns, "BD": config.depth}
    job = Job(
        local=local,
        operands=(classes.high, classes.high if classes.low is None else classes.low),
        config=config,
        scale=scale_of(tau),
        products={
            "FIRST": scaled_first(local, precision),
            "NORMALIZE": normalize,
        },
        tiles={"D": d, "MODE": precision, **tiles, **config.options},
    )
    gradient = text_gradient or local_gradient
    value = patch_value(job, labels.contiguous(), top_k, tau, gradient=gradient)
    of_text, of_local = gradients(
        job, value, text_gradient=text_gradient, local_gradient=local_gradient
    )
    return value.value, value.rank, of_text, of_local


def specialisations(
    precision: Precision, rows: int, width: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What ``aot`` compiles for an entry of the table."""
    local = torch.empty((rows // 64, 64, width), dtype=native(precision))
    text, labels = torch.empty((1000, width)), torch.empty(rows // 64, dtype=torch.int64)

    def call(normalize: bool, gradient: bool) -> Callable[[], object]:
        return lambda: patch_entropy(
            local, text, labels, 200, 0.01, normalize, gradient, gradient, precision
        )

    yield "training", call(True, True)
    yield "value", call(False, False)
