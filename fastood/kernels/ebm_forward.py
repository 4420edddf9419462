"""The energy-bound loss forward, in two launches.

``_states``: a block of images and a part of the classes give a state of each image (best class,
largest and sum of the rest) and the label's similarity. ``_finish``: a few images each, the states
become one, the product with the best class's row gives the mask and the edited similarity, and with
them the image's share of the loss and what the backward needs of it. Whichever program is through
last adds the shares up, in order of images: the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastood.kernels.configs import pick, shares
from fastood.kernels.ebm_common import (
    BASE,
    BEST,
    CHANGED,
    COUNTER,
    EDITED,
    FIELD_COUNT,
    FIELDS,
    INVERSE,
    LABEL,
    LARGEST,
    LOG,
    LOSS,
    OTHERS,
    OWN,
    RISE,
    SCALAR_COUNT,
    SCALARS,
    SCALE,
    SIZE,
    SURE,
    Inputs,
    Options,
    cosines,
    same_sign,
)
from fastood.kernels.launch import launch
from fastood.kernels.source import row_scales
from fastood.kernels.state import empty_top, push

__all__ = ["forward"]

_LOG2E = tl.constexpr(1.4426950408889634)


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (), its diagnostics (2,) and what the backward needs."""
    image, text, _ = inputs
    (b, d), k, device = image.shape, text.shape[0], image.device
    config = pick("ebm", options.precision, rows=b, width=d)
    splits, share = shares(config, b, k, device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    diagnostics = torch.empty(2, dtype=torch.float32, device=device)
    saved = torch.empty((FIELDS + 4 * splits) * b + k + SCALARS, dtype=torch.float32, device=device)
    launch(
        _states,
        (-(-b // config.rows), splits),
        *inputs.arguments,
        saved,
        1.0 / options.tau,
        b,
        k,
        share // config.columns,
        splits,
        BB=config.rows,
        BN=config.columns,
        BD=config.depth,
        device=device,
        **inputs.constants(options),
        **config.options,
    )
    launch(
        _finish,
        (-(-b // 2),),
        *inputs.arguments,
        saved,
        loss,
        diagnostics,
        1.0 / options.tau,
        options.weight,
        b,
        k,
        splits,
        D=d,
        SPLITS=triton.next_power_of_2(splits),
        BY_LABEL=options.by_label,
        CE_ORIGINAL=options.ce_original,
        RENORM=options.renorm,
        BB=2,
        BD=min(512, triton.next_power_of_2(d)),
        device=device,
        num_warps=8,
    )
    return loss, diagnostics, saved


@triton.jit(do_not_specialize=["B", "K", "tiles", "splits"])
def _states(
    image,
    image_stride,
    text,
    text_stride,
    labels,
    label_stride,
    saved,
    inverse_tau,
    B,
    K,
    tiles,  # of classes, for each program
    splits,
    D: tl.constexpr,
    MODE: tl.constexpr,
    FIRST_IMAGE: tl.constexpr,
    FIRST_TEXT: tl.constexpr,
    NORMALIZE_IMAGE: tl.constexpr,
    NORMALIZE_TEXT: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    split = tl.program_id(1)
    own = tl.program_id(0) * BB + tl.arange(0, BB)
    here = own < B
    rows = tl.minimum(own, B - 1)
    of_classes = saved + FIELD_COUNT * B
    of_parts = of_classes + K + SCALAR_COUNT
    if (tl.program_id(0) == 0) & (split == 0):
        tl.store(of_classes + K + COUNTER, 0.0)
    scales = row_scales(image, image_stride, rows, D, BD, MODE, NORMALIZE_IMAGE)
    first_of_row = tl.where(split == 0, B, 0)
    tl.store(saved + INVERSE * B + rows, scales, mask=own < first_of_row)
    first_of_class = tl.where(tl.program_id(0) == 0, K, 0)
    y = tl.load(labels + rows.to(tl.int64) * label_stride).to(tl.int64)

    scale = inverse_tau * _LOG2E
    values, classes = empty_top(BB, 1)
    shift = tl.full((BB,), float("-inf"), tl.float32)
    z = tl.zeros((BB, 1), tl.float32)
    for i in range(tiles):
        first = (split * tiles + i) * BN
        columns = first + tl.arange(0, BN)
        inside = tl.minimum(columns, K - 1)
        of_text = row_scales(text, text_stride, inside, D, BD, MODE, NORMALIZE_TEXT)
        tl.store(of_classes + inside, of_text, mask=columns < first_of_class)
        s = cosines(
            image, image_stride, rows, scales, text, text_stride, inside, of_text,
            D, BD, MODE, FIRST_IMAGE, FIRST_TEXT,
        )  # fmt: skip
        of_label = tl.sum(tl.where(columns[None, :] == y[:, None], s, 0.0), axis=1)
        is_here = here & (y >= first) & (y < first + BN) & (y < K)
        tl.store(saved + LABEL * B + rows, of_label, mask=is_here)
        s = tl.where((columns < K)[None, :], s, float("-inf"))
        values, classes, shift, z = push(
            values, classes, shift, z, s, columns, (scale,), tl.zeros((1,), tl.float32) + scale,
            1, 1, 1,
        )  # fmt: skip

    to = of_parts + rows * (4 * splits) + split
    tl.store(to, tl.max(values, axis=1), mask=here)
    tl.store(to + splits, tl.max(classes, axis=1).to(tl.float32, bitcast=True), mask=here)
    tl.store(to + 2 * splits, shift, mask=here)
    tl.store(to + 3 * splits, tl.sum(z, axis=1), mask=here)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _merged(parts, rows, here, K, splits, scale, SPLITS: tl.constexpr):
    """Best similarity and class of rows, the largest of the rest and the sum relative to it."""
    at = tl.arange(0, SPLITS)
    inside = here[:, None] & (at < splits)[None, :]
    parts = parts + rows[:, None] * (4 * splits) + at[None, :]
    tops = tl.load(parts, mask=inside, other=float("-inf"))
    classes = tl.load(parts + splits, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    shifts = tl.load(parts + 2 * splits, mask=inside, other=float("-inf"))
    sums = tl.load(parts + 3 * splits, mask=inside, other=0.0)
    top = tl.max(tops, axis=1)
    nobody = 2147483647
    best = tl.min(tl.where(tops == top[:, None], classes, nobody), axis=1)
    beaten = tl.where((classes == best[:, None]) & (tops == top[:, None]), float("-inf"), tops)
    shift = tl.maximum(tl.max(shifts, axis=1), tl.max(beaten, axis=1))
    shift = tl.where(shift > float("-inf"), shift, 0.0)
    z = tl.sum(sums * tl.exp2((shifts - shift[:, None]) * scale), axis=1)
    z += tl.sum(tl.exp2((beaten - shift[:, None]) * scale), axis=1)
    return top, tl.minimum(best, K - 1), shift, z  # rows of NaN have nobody


@triton.jit(do_not_specialize=["B", "K", "splits"])
def _finish(
    image,
    image_stride,
    text,
    text_stride,
    labels,
    label_stride,
    saved,
    loss,
    diagnostics,
    inverse_tau,
    weight,
    B,
    K,
    splits,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BY_LABEL: tl.constexpr,
    CE_ORIGINAL: tl.constexpr,
    RENORM: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    own = tl.program_id(0) * BB + tl.arange(0, BB)
    here = own < B
    rows = tl.minimum(own, B - 1)
    of_classes = saved + FIELD_COUNT * B
    y = tl.load(labels + rows.to(tl.int64) * label_stride).to(tl.int64)
    known = (y >= 0) & (y < K)
    y = tl.where(known, y, 0).to(tl.int32)
    parts = of_classes + K + SCALAR_COUNT
    top, best, base, rest = _merged(parts, rows, here, K, splits, inverse_tau * _LOG2E, SPLITS)
    right = y == best

    # what the mask keeps; the signs of the rows as they are decide
    own_row = image + rows.to(tl.int64)[:, None] * image_stride
    best_row = text + best.to(tl.int64)[:, None] * text_stride
    mask_row = text + tl.where(BY_LABEL, y, best).to(tl.int64)[:, None] * text_stride
    product = tl.zeros((BB,), tl.float64)
    squares = tl.zeros((BB,), tl.float64)
    for start in tl.static_range(0, D, BD):
        k = start + tl.arange(0, BD)
        inside = (k < D)[None, :]
        a = tl.load(own_row + k[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(best_row + k[None, :], mask=inside, other=0.0).to(tl.float32)
        if BY_LABEL:
            c = tl.load(mask_row + k[None, :], mask=inside, other=0.0).to(tl.float32)
        else:
            c = b
        keep = same_sign(a, c)
        a = tl.where(keep, a, 0.0).to(tl.float64)
        product += tl.sum(a * tl.where(keep, b, 0.0).to(tl.float64), axis=1)
        if RENORM:
            squares += tl.sum(a * a, axis=1)
    inverse = tl.load(saved + INVERSE * B + rows).to(tl.float64)
    changed = product * inverse * tl.load(of_classes + best).to(tl.float64)
    scale = tl.full((BB,), 1.0, tl.float64)
    if RENORM:
        norm = tl.sqrt(squares) * inverse
        scale = 1.0 / tl.where(norm < 1e-12, 1e-12, norm)
    changed *= scale

    # logits relative to the largest: the best class has 0, edited it has ``gap``
    per = tl.zeros((BB,), tl.float64) + inverse_tau
    s = top.to(tl.float64)
    of_label = tl.load(saved + LABEL * B + rows).to(tl.float64)
    of_label = tl.where(right, 0.0, (of_label - s) * per)
    gap = (changed - s) * per
    alone = rest == 0.0  # K = 1
    log_rest = tl.log(tl.where(alone, 1.0, rest).to(tl.float64))
    others = tl.where(alone, float("-inf"), (base.to(tl.float64) - s) * per + log_rest)
    lse_before = _softplus(others)
    lse_rise = _softplus(others - gap)  # over the edited logit
    lse_after = gap + lse_rise
    entropy = tl.where(right, lse_rise, lse_after - of_label)
    if CE_ORIGINAL:
        entropy = lse_before - of_label
    w = tl.zeros((BB,), tl.float64) + weight
    value = entropy + w * (lse_after - lse_before)

    # gradients of the logits; p - 1 is taken from the others' share, which may be tiny
    p = tl.exp(-lse_before)
    q = tl.exp(-lse_rise)
    p_others = tl.exp(others - lse_before)
    q_others = tl.exp(others - lse_after)
    miss = tl.where(right, -q_others, q)
    if CE_ORIGINAL:
        to_others = (1.0 - w) * p_others + w * q_others
        to_own = tl.where(right, -p_others, p) - w * p
        to_edited = w * q
    else:
        to_others = (1.0 + w) * q_others - w * p_others
        to_own = -w * p
        to_edited = miss + w * q
    size = tl.maximum(tl.abs(to_own), tl.abs(to_edited))
    size = tl.maximum(size, tl.abs(to_others) + tl.where(right, 0.0, 1.0))

    fine = known & (tl.abs(top) < float("inf"))
    nan = float("nan")
    at = saved + rows
    tl.store(at + BASE * B, base, mask=here)
    tl.store(at + LOG * B, (log_rest * _LOG2E).to(tl.float32), mask=here)
    tl.store(at + OTHERS * B, tl.where(fine, to_others, nan).to(tl.float32), mask=here)
    tl.store(at + OWN * B, tl.where(fine, to_own, nan).to(tl.float32), mask=here)
    tl.store(at + EDITED * B, tl.where(fine, to_edited, nan).to(tl.float32), mask=here)
    tl.store(at + CHANGED * B, changed.to(tl.float32), mask=here)
    tl.store(at + SCALE * B, scale.to(tl.float32), mask=here)
    tl.store(at + BEST * B, best.to(tl.float32, bitcast=True), mask=here)
    tl.store(at + LOSS * B, tl.where(fine, value, nan).to(tl.float32), mask=here)
    tl.store(at + SURE * B, p.to(tl.float32), mask=here)
    tl.store(at + RISE * B, (changed - s).to(tl.float32), mask=here)
    tl.store(at + SIZE * B, size.to(tl.float32), mask=here)

    tl.debug_barrier()  # the whole program has stored before one of its threads says so
    before = tl.atomic_add(of_classes + K + COUNTER, 1.0, sem="acq_rel")
    if before == tl.num_programs(0) - 1:
        _means(saved, of_classes + K + LARGEST, loss, diagnostics, B)


@triton.jit
def _means(saved, largest, loss, diagnostics, B):
    BLOCK: tl.constexpr = 256
    value = tl.zeros((BLOCK,), tl.float64)
    sure = tl.zeros((BLOCK,), tl.float64)
    rise = tl.zeros((BLOCK,), tl.float64)
    size = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, B, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        here = rows < B
        at = saved + rows  # past the first cache, which belongs to one processor
        value += tl.load(at + LOSS * B, mask=here, other=0.0, cache_modifier=".cg")
        sure += tl.load(at + SURE * B, mask=here, other=0.0, cache_modifier=".cg")
        rise += tl.load(at + RISE * B, mask=here, other=0.0, cache_modifier=".cg")
        own = tl.load(at + SIZE * B, mask=here, other=0.0, cache_modifier=".cg")
        size = tl.maximum(size, own)
    count = tl.cast(B, tl.float64)
    tl.store(loss, (tl.sum(value, axis=0) / count).to(tl.float32))
    tl.store(diagnostics, (tl.sum(sure, axis=0) / count).to(tl.float32))
    tl.store(diagnostics + 1, (tl.sum(rise, axis=0) / count).to(tl.float32))
    found = tl.max(size, axis=0)
    tl.store(largest, tl.where(found > 0, found, 1.0))
