"""Every kernel family once, at small odd sizes: for a memory or race checker.

    compute-sanitizer --tool memcheck python -m bench.gpu.small
    compute-sanitizer --tool racecheck python -m bench.gpu.small

Checkers slow a kernel down a hundredfold, so sizes are just beyond one tile in each direction.
``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` gives every tensor an allocation of its own, behind which the
checker sees a read too far.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import fastood
from bench.gpu.training import top_k_of
from bench.shapes import Shape, features

__all__ = ["families", "main"]

_FULL = Shape(67, 261, 72, p=5, m=330, g=11)
_TINY = Shape(5, 19, 24, p=3, m=22, g=4)


def families(device: torch.device) -> dict[str, Callable[[], object]]:
    """One call of each family and precision."""
    shape = _FULL if device.type == "cuda" else _TINY
    f = features(shape)
    image, text, local, negatives = (x.to(device) for x in (f.image, f.text, f.local, f.negatives))
    labels = f.labels.to(device)
    bank = fastood.ClassBank(
        text, negatives=negatives, groups=shape.g, remainder="spread", impl="reference"
    )
    calls: dict[str, Callable[[], object]] = {}
    for precision in ("fp16", "bf16", "tf32", "fp16x3", "fp32"):
        kind = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
        z, zl = image.to(kind), local.to(kind)
        options = {"impl": "triton", "precision": precision}
        calls |= {
            f"delta_energy {precision}": lambda z=z, o=options: fastood.delta_energy(
                z, bank, c=3, **o
            ),
            f"neg_label {precision}": lambda z=z, o=options: fastood.neg_label(z, bank, **o),
            f"gl_mcm {precision}": lambda z=z, zl=zl, o=options: fastood.gl_mcm(z, zl, bank, **o),
            f"ebm_loss {precision}": lambda z=z, o=options: _backward(
                lambda t: fastood.ebm_loss(z, t, labels, **o), text
            ),
            f"locoop_loss {precision}": lambda z=z, zl=zl, o=options: _backward(
                lambda t: fastood.locoop_loss(z, zl, t, labels, top_k=top_k_of(shape.k), **o), text
            ),
        }
    s = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    calls["similarity triton"] = lambda: fastood.delta_energy(similarity=s, c=2, impl="triton")
    if device.type == "cuda":
        calls["similarity cuda"] = lambda: fastood.delta_energy(similarity=s, c=2, impl="cuda")
    calls["low_rank"] = lambda: _low_rank(device)
    return calls


def _backward(loss: Callable[[torch.Tensor], torch.Tensor], text: torch.Tensor) -> object:
    t = text.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(t), t)


def _low_rank(device: torch.device) -> object:
    from bench.gpu.lowrank import by_fastood, weights_of

    return by_fastood(weights_of(3, 75, 33, device), [1, 7, 20])


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.small", description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="stop starting calls then")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    options = parser.parse_args(given)
    if not torch.cuda.is_available() and not options.dry_run:
        print("no CUDA device (--dry-run runs on the CPU)", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    end, failed, left_out = time.monotonic() + options.seconds, 0, []
    for name, call in families(device).items():
        if time.monotonic() > end:
            left_out.append(name)
            continue
        try:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            print(f"ran {name}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    if left_out:
        print(f"no time for {', '.join(left_out)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
