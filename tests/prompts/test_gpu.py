"""A training step as a CUDA graph: no synchronisation, no shape that depends on data."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.prompts.towers import context_of, learned, open_clip_encoder, relative
from tests.tolerances import PROMPT_RTOL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_a_captured_step_trains_as_an_ordinary_one(position, chunk):
    encoder = open_clip_encoder(dtype=torch.float32)
    encoder.model.cuda()
    encoder.device = torch.device("cuda")
    prompts = learned(encoder, n_ctx=4, position=position, chunk=chunk)
    context = context_of(prompts, dtype=torch.float32).detach().cuda().requires_grad_()
    image = F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    image, labels = image.cuda(), torch.arange(8, device="cuda") % 6

    def gradient() -> torch.Tensor:
        logits = 10 * image @ F.normalize(prompts(context), dim=-1).T
        return torch.autograd.grad(F.cross_entropy(logits, labels), context)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradient()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradient()
    for seed in range(3):
        with torch.no_grad():
            context.copy_(context_of(prompts, seed=seed, dtype=torch.float32))
        graph.replay()
        assert relative(captured, gradient()) < PROMPT_RTOL
