"""A row's score is the same bits whatever runs beside it: threads, batch, other scores."""

from __future__ import annotations

import pytest
import torch

import fastood
from fastood.ops.requests import Kind, Request
from fastood.ops.rows import row_statistics, similarity_statistics
from fastood.scores import ClassBank
from tests.conftest import clip_like
from tests.ops.rows import cosines, every_request, fresh, name_of, scores

# small batches are shared out by classes, others by rows, on either side of each limit
BATCHES = [1, 2, 13, 15, 29, 33, 57, 64, 100, 230]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@DTYPES
@pytest.mark.parametrize("k", [7, 255, 1057])
def test_threads_and_batches(instruction_set, threads, dtype, k):
    image, text, _ = clip_like(230, k, 72)
    image = image.to(dtype)
    requests = every_request(k, 0.01)
    bank = ClassBank(text)
    threads(1)
    whole = scores(requests, image=image, text=text)
    for count in (1, 2, 3):
        threads(count)
        for b in BATCHES:
            first = (230 - b) // 2
            part = image[first : first + b]
            got = scores(requests, image=part, text=bank if b % 2 else text)
            assert torch.equal(got, whole[:, first : first + b]), (count, b)


@DTYPES
def test_given_similarities(instruction_set, threads, dtype):
    s = cosines(120, 1057).to(dtype)
    requests = every_request(1057, 1.0)
    threads(1)
    whole = scores(requests, similarity=s)
    threads(2)
    assert torch.equal(scores(requests, similarity=s), whole)
    rows = torch.cat([scores(requests, similarity=row[None]) for row in s[::17]], dim=1)
    assert torch.equal(rows, whole[:, ::17])


@pytest.mark.parametrize("k", [3, 6, 40, 1100])
def test_scores_asked_alone_or_together(instruction_set, k):
    """How many values are held apart decides how the others are summed; nobody may notice."""
    s = cosines(60, k)
    image, text, _ = clip_like(60, k, 24)
    requests = tuple(
        dict.fromkeys(
            r
            for tau in (0.01, 1.0)
            for c in (1, 2, 4, 5, 9, 30)
            for r in every_request(k, tau, c=c)
        )
    )
    together = scores(requests, similarity=s)
    of_features = scores(requests, image=image, text=text)
    for i, request in enumerate(requests):
        assert torch.equal(scores((request,), similarity=s)[0], together[i]), name_of(request)
        alone = scores((request,), image=image, text=text)[0]
        assert torch.equal(alone, of_features[i]), name_of(request)


def test_the_nearest_class_costs_no_digit(instruction_set):
    from fastood.scores.compute import score_rows

    image, text, _ = clip_like(60, 90, 24)
    requests = every_request(90, 0.01)
    found = score_rows(requests, image, text, None, impl="cpu", classes=True)
    assert torch.equal(found.values, scores(requests, image=image, text=text))
    exact = image.double() @ torch.nn.functional.normalize(text.double(), dim=1).mT
    assert torch.equal(found.classes, exact.argmax(dim=1))


def test_score_and_its_functions_agree(kernels):
    image, text, _ = clip_like(40, 50, 24)
    methods = ["max_similarity", "mcm", "msp", "energy", "delta_energy", "neg_entropy", "margin"]
    together = fastood.score(image, text, methods=methods, impl="cpu")
    for name in methods:
        alone = getattr(fastood, name)(image, text, impl="cpu")
        assert torch.equal(alone, together[name]), name
    blocks = fastood.score(image, text, methods=methods, impl="cpu", rows=7)
    assert all(torch.equal(blocks[name], together[name]) for name in methods)


def test_patches(instruction_set, threads):
    local = clip_like(40 * 9, 50, 24)[0].view(40, 9, 24)
    text = clip_like(1, 50, 24)[1]
    threads(1)
    whole = fastood.l_mcm(local, text, impl="cpu")
    threads(2)
    assert torch.equal(fastood.l_mcm(local, text, impl="cpu"), whole)
    assert torch.equal(fastood.l_mcm(local[5:6], text, impl="cpu"), whole[5:6])


@pytest.mark.parametrize("k", [33, 1057])
def test_gradients_do_not_depend_on_threads(instruction_set, threads, k):
    """Sums over images go through fixed blocks of them, in a fixed order."""
    image, text, _ = clip_like(600, k, 40)
    requests = (Request(Kind.DELTA_ENERGY, 0.01, 2), Request(Kind.NEG_ENTROPY, 1.0))

    def gradients():
        z, t = image.clone().requires_grad_(), text.clone().requires_grad_()
        scores(requests, image=z, text=t).sum().backward()
        s = cosines(60, k).requires_grad_()
        scores(requests, similarity=s).sum().backward()
        return z.grad, t.grad, s.grad

    threads(1)
    one = gradients()
    threads(2)
    for mine, other in zip(gradients(), one, strict=True):
        assert torch.equal(mine, other)


def test_statistics_do_not_depend_on_threads(instruction_set, threads):
    image, text, _ = clip_like(200, 1100, 24)
    s = cosines(200, 1100)

    def everything():
        options = {"taus": [0.01, 1.0], "c": 6, "moments": True}
        return (*row_statistics(image, text, **options), *similarity_statistics(s, **options))

    threads(1)
    one = everything()
    threads(2)
    for mine, other in zip(everything(), one, strict=True):
        assert torch.equal(mine, other)


def test_python_threads_at_once(kernels, threads):
    """The interpreter's lock is released inside: scratch must belong to each thread."""
    from concurrent.futures import ThreadPoolExecutor

    threads(1)
    inputs = [clip_like(90, 20 + 70 * i, 40, seed=i)[:2] for i in range(8)]
    want = [fastood.mcm(z, t, tau=0.01, impl="cpu") for z, t in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda x: fastood.mcm(*x, tau=0.01, impl="cpu"), inputs)
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


# ------------------------------------------------------------------------------ processes


def test_a_forked_child_with_one_thread(kernels):
    done = fresh(
        """
        import os, torch, fastood
        torch.set_num_threads(2)
        z, t = torch.randn(300, 40), torch.randn(70, 40)
        want = fastood.mcm(z, t, tau=0.01, impl="cpu")
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            same = torch.equal(fastood.mcm(z, t, tau=0.01, impl="cpu"), want)
            x = z.clone().requires_grad_()
            fastood.delta_energy(x, t, c=2, impl="cpu").sum().backward()
            os._exit(0 if same and bool(torch.isfinite(x.grad).all()) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        OMP_NUM_THREADS="2",
    )
    assert done.stdout == "0\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("first_user", ["parent", "worker"])
def test_workers_of_a_dataloader(kernels, first_user):
    done = fresh(
        f"""
        import torch, fastood
        torch.manual_seed(0)
        z, t = torch.randn(64, 40), torch.randn(300, 40)

        class Scored(torch.utils.data.Dataset):
            def __len__(self): return len(z)
            def __getitem__(self, i): return fastood.mcm(z[i:i + 1], t, tau=0.01, impl="cpu")[0]

        torch.set_num_threads(2)
        if {first_user == "parent"}:
            fastood.mcm(z, t, impl="cpu")
        loader = torch.utils.data.DataLoader(Scored(), 16, num_workers=2)
        found = torch.cat(list(loader))
        print(torch.equal(found, fastood.mcm(z, t, tau=0.01, impl="cpu")))
        """,
        OMP_NUM_THREADS="2",
    )
    assert done.stdout == "True\n", done.stderr
