"""Which product: fastood's own kernel against torch.mm and oneDNN, whole and in row blocks.

    pytest bench/bench_gemm.py --benchmark-only

A score needs its cosines only while they are in cache, so what counts is not the fastest product
of whole matrices but the fastest one of a row block, followed by its row statistics.
``max_similarity`` with a prepared bank is such a product with next to nothing behind it; ``... in
blocks`` is what a fused score would cost if it called a library for 64 rows at a time and then took
the maximum. All on one thread: a fused score cuts its rows among the threads itself.

The rule this measures: fastood multiplies with its own kernel on every shape, because (1) a library
call per row block costs more than it does, (2) its sums have one order, so a row's score does not
depend on the batch, the block or the number of threads, which no library promises, and (3) it
behaves alike wherever torch was built without MKL. The rule stands while ``fastood`` stays near or
below the faster of the four on shapes of a score; a shape where it is not belongs in the results.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastood
from bench.bench_scores import cosines64, cost
from bench.limits import onednn_weight
from bench.shapes import PRODUCTS, Shape, features
from bench.suite import Work

BLOCK = 64
IMPLEMENTATIONS = ["torch.mm", "oneDNN", "torch.mm in blocks", "oneDNN in blocks", "fastood"]


def in_blocks(image: Tensor, multiply: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    blocks = image.split(BLOCK)
    return lambda: torch.cat([multiply(block).amax(dim=-1) for block in blocks])


def largest_cosine(shape: Shape) -> Work:
    f = features(shape)
    f = f._replace(image=F.normalize(f.image, dim=-1))
    bank = fastood.ClassBank(f.text, normalize=False)
    transposed, scratch = f.text.T, torch.empty(BLOCK, shape.k)
    return Work(
        name=f"product {shape}, one thread",
        calls={
            "torch.mm in blocks": in_blocks(
                f.image, lambda z: torch.mm(z, transposed, out=scratch[: len(z)])
            ),
            "oneDNN in blocks": in_blocks(f.image, onednn_weight(f.text, BLOCK)),
            "fastood": lambda: fastood.max_similarity(f.image, bank, impl="cpu"),
        },
        truth=lambda: cosines64(f).amax(dim=-1),
        product=(f.image, f.text),
        threads=1,
        **cost(shape),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)  # varies fastest: one shape after the other
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def bench_product(run, shape, impl):
    run(largest_cosine, impl, shape)
