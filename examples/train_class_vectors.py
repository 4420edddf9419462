"""The energy-bound loss in a training loop: class vectors tuned on frozen features.

    python examples/train_class_vectors.py

A stand-in for prompt tuning that runs in seconds: instead of context tokens behind a text tower,
the class vectors themselves are trained. Features are synthetic, with a shift between training and
test images; the point is the loop and the head that evaluation accepts afterwards.
"""

from __future__ import annotations

import torch

import fastood


def make_features(seed: int, labels: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return classes[labels] + 2.5 * torch.randn(len(labels), classes.shape[1], generator=g)


def main() -> None:
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(10, 64, generator=g)
    start = truth + 2.0 * torch.randn(10, 64, generator=g)  # a rough text embedding of each class
    labels = torch.arange(160) % 10
    train, test = make_features(1, labels, truth), make_features(2, labels, truth)
    ood = 2.7 * torch.randn(160, 64, generator=g)

    vectors = start.clone().requires_grad_()
    optimiser = torch.optim.SGD([vectors], lr=0.5, momentum=0.9)
    for step in range(61):
        loss = fastood.ebm_loss(train, vectors, labels, tau=0.05, weight=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")

    for name, text in (("before", start), ("after", vectors.detach())):
        bank = fastood.ClassBank(text)
        accuracy = (bank.similarities(test).image.argmax(1) == labels).float().mean().item()
        found = fastood.metrics.evaluate(
            fastood.delta_energy(test, bank, tau=0.05), fastood.delta_energy(ood, bank, tau=0.05)
        )
        print(f"{name:6s}  accuracy {accuracy:.3f}  ΔEnergy AUROC {found['AUROC']:.3f}")


if __name__ == "__main__":
    main()
