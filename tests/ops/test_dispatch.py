"""impl= and FASTOOD_IMPL: obeyed or refused; without a compiler, one warning and the reference."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastood
from fastood.ops import fused
from fastood.ops.dispatch import choose
from tests.conftest import clip_like
from tests.ops.rows import cosines, fresh

IMAGE, TEXT, _ = clip_like(6, 7, 8)
LOCAL = clip_like(18, 7, 8, seed=4)[0].view(6, 3, 8)

CALLS = {
    "features": lambda **o: fastood.mcm(IMAGE, TEXT, **o),
    "bank": lambda **o: fastood.energy(IMAGE, fastood.ClassBank(TEXT), **o),
    "per image": lambda **o: fastood.mcm(IMAGE, TEXT.expand(6, -1, -1), **o),
    "similarity": lambda **o: fastood.margin(similarity=cosines(6, 7), **o),
    "gradients": lambda **o: fastood.mcm(IMAGE.clone().requires_grad_(), TEXT, **o),
    "local": lambda **o: fastood.l_mcm(LOCAL, TEXT, **o),
    "local per image": lambda **o: fastood.l_mcm(LOCAL, TEXT.expand(6, -1, -1), **o),
    "local similarity": lambda **o: fastood.l_mcm(similarity=LOCAL, **o),
    "both": lambda **o: fastood.gl_mcm(IMAGE, LOCAL, TEXT, **o),
    "many": lambda **o: fastood.score(IMAGE, TEXT, methods=["mcm", "energy"], **o)["mcm"],
}
EVERY = pytest.mark.parametrize("name", CALLS)


@pytest.fixture
def fused_calls(monkeypatch):
    """Which functions of the fused kernels were called."""
    called = []
    for name in ("feature_scores", "similarity_scores", "feature_graph", "similarity_graph"):
        original = getattr(fused, name)

        def watched(*args, _name=name, _original=original, **options):
            called.append(_name)
            return _original(*args, **options)

        monkeypatch.setattr(fused, name, watched)
    return called


@EVERY
def test_open_and_cpu_take_the_kernels(kernels, monkeypatch, fused_calls, name):
    monkeypatch.delenv("FASTOOD_IMPL", raising=False)
    CALLS[name]()
    open_calls = list(fused_calls)
    assert open_calls
    CALLS[name](impl="cpu")
    assert fused_calls == 2 * open_calls
    monkeypatch.setenv("FASTOOD_IMPL", "cpu")
    CALLS[name]()
    assert fused_calls == 3 * open_calls


@EVERY
def test_the_reference_is_plain_torch(monkeypatch, fused_calls, name):
    monkeypatch.setattr("fastood.ops.loader.cpu", lambda: pytest.fail("asked for kernels"))
    monkeypatch.setattr("fastood.ops.loader.try_cpu", lambda: pytest.fail("asked for kernels"))
    monkeypatch.setenv("FASTOOD_IMPL", "reference")
    forced = CALLS[name]()
    if name != "bank":  # a bank is prepared by what is in use when it is made
        monkeypatch.delenv("FASTOOD_IMPL")
    assert torch.equal(CALLS[name](impl="reference"), forced)
    assert not fused_calls


@EVERY
def test_cuda_is_for_tensors_that_are_there(monkeypatch, name):
    with pytest.raises(ValueError, match=r"^impl: 'cuda' takes CUDA tensors, got one on cpu"):
        CALLS[name](impl="cuda")
    monkeypatch.setenv("FASTOOD_IMPL", "cuda")
    with pytest.raises(ValueError, match=r"^FASTOOD_IMPL: 'cuda' takes CUDA tensors"):
        CALLS[name]()


@EVERY
def test_triton_takes_cpu_tensors_only_when_interpreted(monkeypatch, name):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"^impl: 'triton' takes CUDA tensors, got one on cpu"):
        CALLS[name](impl="triton")
    monkeypatch.setenv("FASTOOD_IMPL", "triton")
    with pytest.raises(ValueError, match=r"^FASTOOD_IMPL: 'triton' takes CUDA tensors"):
        CALLS[name]()


@EVERY
@pytest.mark.parametrize("impl", [None, "cpu", "reference"])
def test_on_the_cpu_products_are_float32(kernels, name, impl):
    assert torch.equal(CALLS[name](impl=impl, precision="fp32"), CALLS[name](impl=impl))
    for precision in ("fp16", "bf16", "tf32", "fp16x3"):
        message = f"^precision: '{precision}' is for the kernels of a GPU; .* in float32"
        with pytest.raises(ValueError, match=message):
            CALLS[name](impl=impl, precision=precision)


@EVERY
def test_unknown_precisions_are_refused(name):
    message = "^precision: expected None or one of 'fp16', 'bf16', 'tf32', 'fp16x3', 'fp32', got"
    with pytest.raises(ValueError, match=message):
        CALLS[name](precision="half")


@EVERY
def test_unknown_names_are_refused(monkeypatch, name):
    message = ": expected one of 'reference', 'cpu', 'triton', 'cuda', got 'fast'"
    with pytest.raises(ValueError, match="^impl" + message):
        CALLS[name](impl="fast")
    monkeypatch.setenv("FASTOOD_IMPL", "fast")
    with pytest.raises(ValueError, match="^FASTOOD_IMPL" + message):
        CALLS[name]()


def test_the_argument_goes_before_the_environment(kernels, monkeypatch, fused_calls):
    monkeypatch.setenv("FASTOOD_IMPL", "reference")
    CALLS["features"](impl="cpu")
    assert fused_calls
    monkeypatch.setenv("FASTOOD_IMPL", "fast")
    CALLS["features"](impl="reference")
    monkeypatch.setenv("FASTOOD_IMPL", "")
    CALLS["features"]()


def test_float64_takes_the_reference(kernels, monkeypatch, fused_calls):
    monkeypatch.delenv("FASTOOD_IMPL", raising=False)
    for image, text in ((IMAGE.double(), TEXT), (IMAGE, TEXT.double())):
        assert fastood.mcm(image, text).dtype == torch.float64
        with pytest.raises(ValueError, match=r"^impl: 'cpu' computes in float32, got a float64"):
            fastood.mcm(image, text, impl="cpu")
    with pytest.raises(ValueError, match="float64"):
        fastood.mcm(similarity=cosines(2, 3).double(), impl="cpu")
    with pytest.raises(ValueError, match="float64"):
        fastood.l_mcm(LOCAL.double(), TEXT, impl="cpu")
    assert not fused_calls


def test_shapes_without_values_take_the_reference(kernels, monkeypatch, fused_calls):
    monkeypatch.delenv("FASTOOD_IMPL", raising=False)
    for out in (
        fastood.mcm(IMAGE.to("meta"), TEXT.to("meta")),
        fastood.delta_energy(similarity=torch.zeros(6, 7, device="meta"), c=2),
        fastood.l_mcm(LOCAL.to("meta"), TEXT.to("meta")),
    ):
        assert out.is_meta and out.shape == (6,)
    with pytest.raises(ValueError, match="'cpu' takes CPU tensors, got one on meta"):
        fastood.mcm(IMAGE.to("meta"), TEXT.to("meta"), impl="cpu")
    assert not fused_calls


def test_half_precision_of_every_mixture(kernels):
    types = (torch.float32, torch.bfloat16, torch.float16)
    for a in types:
        for b in types:
            assert choose(None, IMAGE.to(a), TEXT.to(b)) == "cpu"
            got = fastood.mcm(IMAGE.to(a), TEXT.to(b), impl="cpu")
            want = fastood.mcm(IMAGE.to(a), TEXT.to(b), impl="reference")
            assert got.dtype == want.dtype == torch.float32
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_without_a_compiler(tmp_path):
    """impl=None: one warning and the numbers of the reference; impl="cpu": an error, each time."""
    done = fresh(
        """
        import os, warnings, torch, fastood
        from fastood.errors import BuildError
        z, t = torch.randn(5, 8), torch.randn(6, 8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [fastood.mcm(z, t), fastood.mcm(z, t), fastood.mcm(similarity=z)]
            x = z.clone().requires_grad_()
            fastood.energy(x, t).sum().backward()
            graph = torch.compile(lambda v: fastood.mcm(v, t), fullgraph=True, backend="eager")
            found.append(graph(z))
        ours = [w for w in caught if issubclass(w.category, RuntimeWarning)]
        assert len(ours) == 1, ours
        print(ours[0].message)
        want = fastood.mcm(z, t, impl="reference")
        assert torch.equal(found[0], want) and torch.equal(found[1], want)
        torch.testing.assert_close(found[3], want)
        for _ in range(2):
            try:
                fastood.mcm(z, t, impl="cpu")
            except BuildError as error:
                print("BuildError:", error)
        os.environ["FASTOOD_IMPL"] = "cpu"
        try:
            fastood.mcm(z, t)
        except BuildError:
            print("refused")

        # the operators are there all the same
        found = torch.ops.fastood.row_statistics(z, t, None, [0.1], 2, True)
        s = z @ t.T
        for one, other in zip(found, torch.ops.fastood.similarity_statistics(s, [0.1], 2, True)):
            torch.testing.assert_close(one, other)
        torch.library.opcheck(
            torch.ops.fastood.row_statistics.default,
            (z.clone().requires_grad_(), t.clone().requires_grad_(), None, [0.1], 2, True),
        )
        torch.library.opcheck(
            torch.ops.fastood.similarity_statistics.default, (s.requires_grad_(), [0.1], 2, True)
        )
        """,
        CXX="/nonexistent/g++",
        FASTOOD_CACHE=str(tmp_path),
        FASTOOD_IMPL="",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "/nonexistent/g++" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == ["BuildError", "BuildError", "refused"]


def test_an_instruction_set_that_is_not_there_is_refused_every_time(kernels):
    script = """
import torch, fastood
for _ in range(2):
    try:
        fastood.mcm(torch.rand(2, 8), torch.rand(3, 8))
    except ValueError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "FASTOOD_ISA": "mmx"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    assert lines[0].startswith("FASTOOD_ISA: instruction set: expected") and "mmx" in lines[0]
