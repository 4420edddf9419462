"""Fused scores never keep the (B, K) similarities: so says the high-water mark of a new process."""

from __future__ import annotations

import textwrap

import pytest

from tests.ops.rows import fresh

LIMIT_KIB = 32 * 1024
"""65,536 x 1,000 similarities are 256 MB; a sixth of the last-level caches of two cores is used."""

PROLOGUE = """
import torch, fastood
torch.set_num_threads(2)
torch.manual_seed(0)

# not ru_maxrss: a child starts with what its parent had
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

def grown(work, small):
    work(small)  # code, threads, scratch
    before = peak()
    return lambda large: (work(large), peak() - before)[1]
"""


def growth(code: str) -> int:
    done = fresh(PROLOGUE + textwrap.dedent(code), OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


SCORES = """
image, text = torch.randn(65_536, 16), torch.randn(1000, 16)
methods = {methods!r}

def work(z):
    with torch.no_grad():
        fastood.score(z, text, methods=methods, impl={impl!r})

print(grown(work, image[:300])(image))
"""


TWO = ["mcm", "delta_energy"]
ALL = ["max_similarity", *TWO, "msp", "energy", "neg_entropy", "variance", "margin"]


@pytest.mark.parametrize("methods", [TWO, ALL])
def test_scores_of_65536_images(kernels, methods):
    assert growth(SCORES.format(impl="cpu", methods=methods)) < LIMIT_KIB


def test_the_reference_fails_the_same_test():
    assert growth(SCORES.format(impl="reference", methods=TWO)) > LIMIT_KIB


@pytest.mark.slow
def test_half_precision_makes_no_float32_copy(kernels):
    code = """
        image, text = torch.randn(65_536, 128, dtype=torch.bfloat16), torch.randn(1000, 128)
        work = lambda z: fastood.mcm(z, text, impl="cpu")
        print(grown(work, image[:300])(image))
    """
    assert growth(code) < 8 * 1024  # as float32 the features are 32 MB


@pytest.mark.slow
def test_strided_and_expanded_features_are_not_copied(kernels):
    code = """
        image, text = torch.randn(65_536, 256)[:, :128], torch.randn(1000, 128)
        work = lambda z: fastood.mcm(z, text, impl="cpu")
        step = grown(work, image[:300])
        print(step(image) + step(image[:1].expand(65_536, -1)))
    """
    assert growth(code) < 8 * 1024


@pytest.mark.slow
def test_given_similarities_cost_nothing_more(kernels):
    code = """
        s = torch.randn(65_536, 500, dtype=torch.float16)
        work = lambda s: fastood.delta_energy(similarity=s, c=3, impl="cpu")
        print(grown(work, s[:300])(s))
    """
    assert growth(code) < 8 * 1024  # as float32 they are 131 MB


@pytest.mark.slow
def test_patches(kernels):
    code = """
        local, text = torch.randn(256, 196, 16), torch.randn(1000, 16)
        work = lambda z: fastood.l_mcm(z, text, impl="cpu")
        print(grown(work, local[:2])(local))
    """
    assert growth(code) < LIMIT_KIB  # 200 MB of similarities


def test_gradients_of_65536_images(kernels):
    code = """
        image, text = torch.randn(65_536, 8), torch.randn(1000, 8)
        text.requires_grad_()

        def work(z):
            z = z.detach().requires_grad_()
            fastood.delta_energy(z, text, c=2, impl="cpu").sum().backward()

        print(grown(work, image[:300])(image))
    """
    # a few numbers of float64 for every image, and the gradient itself; similarities are 256 MB
    assert growth(code) < 2 * LIMIT_KIB
