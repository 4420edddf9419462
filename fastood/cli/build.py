"""``fastood build``, and what ``fastood info`` says of kernels."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from fastood.cli import options as o
from fastood.cli import show

__all__ = ["build", "kernel_lines", "kernels"]


def build(
    force: Annotated[
        bool, typer.Option("--force", help="Compile even if a finished build is there.")
    ] = False,
    cuda: Annotated[
        bool, typer.Option("--cuda", help="The CUDA kernels instead of those for the CPU.")
    ] = False,
    arch: Annotated[
        str | None,
        typer.Option(
            help="GPU architectures for --cuda, as 8.0,9.0; by default those of the GPUs here, "
            "without any 8.0 and 9.0."
        ),
    ] = None,
    json: o.Json = False,
) -> None:
    """Compile the kernels now rather than at first use."""
    if cuda or arch is not None:
        _build_cuda(arch, force=force, json=json)
        return
    from fastood.ops import loader

    before = loader.status()
    start = time.monotonic()
    content: dict[str, Any]
    if before.kind == "prebuilt" and not force:
        content = {"compiled": False, "kind": "prebuilt", "path": str(before.path), **before.info}
    else:
        built = loader.cpu_build(force=force)
        content = {
            "compiled": force or before.path != built.path,
            "kind": "built",
            "path": str(built.path),
            "log": str(built.log),
            **built.info,
        }
    content["took"] = round(time.monotonic() - start, 1)
    if json:
        show.print_json(content)
        return
    if content["compiled"]:
        show.line(f"compiled in {content['took']} s with {content['compiler']}")
    else:
        show.line("nothing to compile: " + before.why)
    show.line(f"{content['path']} ({content['bytes'] / 1e6:.1f} MB)")
    if content["compiled"] and before.kind == "prebuilt":
        show.note("the prebuilt kernels fit too and go first")


def _build_cuda(arch: str | None, *, force: bool, json: bool) -> None:
    from fastood.ops import loader

    content: list[dict[str, Any]] = []
    for wanted in _architectures(arch):
        before = loader.cuda_status(wanted)
        start = time.monotonic()
        built = loader.cuda_build(wanted, force=force)
        content.append(
            {
                "compiled": force or before.path != built.path,
                "path": str(built.path),
                "log": str(built.log),
                **built.info,
                "took": round(time.monotonic() - start, 1),
            }
        )
        if json:
            continue
        if content[-1]["compiled"]:
            took, compiler = content[-1]["took"], built.info["compiler"]
            show.line(f"compiled for {wanted} in {took} s with {compiler}")
        else:
            show.line(f"nothing to compile for {wanted}")
        show.line(f"{built.path} ({built.info['bytes'] / 1e6:.1f} MB)")
    if json:
        show.print_json(content)


def _architectures(asked: str | None) -> list[str]:
    if asked is not None:
        return [word.strip() for word in asked.split(",") if word.strip()]
    return _present() or ["8.0", "9.0"]


def _present() -> list[str]:
    """The architectures of the GPUs of this machine."""
    import torch

    from fastood.ops import loader

    if not torch.cuda.is_available():
        return []
    return sorted({loader.cuda_arch(i) for i in range(torch.cuda.device_count())})


def _cuda_kernels() -> list[dict[str, Any]]:
    """The CUDA kernels for each kind of GPU here (or what is compiled already); builds nothing."""
    from fastood.ops import loader

    here = _present()
    content = []
    for arch in here or ["8.0", "9.0"]:
        found = loader.cuda_status(arch)
        if not here and found.path is None:
            continue
        part: dict[str, Any] = {"arch": arch, "state": found.state, "why": found.why}
        if found.path is not None:
            part |= {"path": str(found.path)}
            part |= {n: found.info[n] for n in ("bytes", "compiler") if n in found.info}
        content.append(part)
    return content


def kernels() -> dict[str, Any]:
    """What runs the scores and why, for ``fastood info``; compiles nothing."""
    from fastood.errors import BuildError
    from fastood.ops import loader
    from fastood.ops.dispatch import asked

    found = loader.status()
    content: dict[str, Any] = {"active": "reference", "why": found.why, "state": found.state}
    if found.state in ("ready", "loaded"):
        try:
            module = loader.cpu()
        except BuildError as error:
            content |= {"why": str(error), "state": "unavailable"}
        except ValueError as error:  # FASTOOD_ISA: every score raises it
            content |= {"active": "none", "why": str(error)}
        else:
            content["active"] = "cpu"
            for name in ("instruction_sets", "active_instruction_set"):
                if hasattr(module, name):
                    content[name] = getattr(module, name)()
            for name in ("openmp", "compiler"):
                content[name] = getattr(module, name, None)
    elif found.state == "to compile":
        content["active"] = "cpu"
    try:
        forced = asked(None)
    except ValueError as error:
        content |= {"active": "none", "why": str(error)}
    else:
        if forced == "reference":
            why = f"FASTOOD_IMPL={forced}; otherwise: {content['why']}"
            content |= {"active": forced, "why": why}
        elif forced in ("triton", "cuda"):
            content |= _forced_to_gpu(forced)
    if found.path is not None:
        content |= {"kind": found.kind, "path": str(found.path)}
    content["key"] = found.key
    for name in ("bytes", "seconds", "torch", "cflags"):
        if name in found.info:
            content[name] = found.info[name]
    if found.info.get("compiler"):
        content["compiler"] = found.info["compiler"]
    content["cuda"] = _cuda_kernels()
    content["gpu"] = _on_gpus()
    return content


def _forced_to_gpu(forced: str) -> dict[str, str]:
    """``FASTOOD_IMPL`` names kernels of a GPU: tensors elsewhere are refused."""
    from fastood.ops.dispatch import triton_refuses

    if not _present():
        return {"active": "none", "why": f"FASTOOD_IMPL={forced}, but there is no CUDA device"}
    refused = triton_refuses(0) if forced == "triton" else None
    if refused is not None:
        return {"active": "none", "why": f"FASTOOD_IMPL={forced}, but {refused}"}
    return {"active": forced, "why": f"FASTOOD_IMPL={forced}: tensors on a GPU only"}


def _on_gpus() -> list[dict[str, str]]:
    """What takes a batch of float16 features on each GPU; computes nothing."""
    import torch

    from fastood.ops.explain import explain

    content = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        image, text = (
            torch.empty(n, 512, device=f"cuda:{i}", dtype=torch.float16) for n in (1024, 1000)
        )
        content.append({"device": f"cuda:{i}", "scores": explain(image, text, prepared=True)})
    return content


def kernel_lines(content: dict[str, Any]) -> list[str]:
    """``kernels()`` for people."""
    lines = [f"{content['active']} ({content['why']})"]
    if "active_instruction_set" in content:
        others = [s for s in content["instruction_sets"] if s != content["active_instruction_set"]]
        also = f" (this machine also has {', '.join(others)})" if others else ""
        threads = "OpenMP" if content["openmp"] else "no OpenMP: one thread"
        lines.append(f"{content['active_instruction_set']}{also}, {threads}")
    if "path" in content:
        size = f", {content['bytes'] / 1e6:.1f} MB" if "bytes" in content else ""
        compiler = f", {content['compiler']}" if content.get("compiler") else ""
        lines.append(f"{content['path']}{size}{compiler}")
    for part in content["gpu"]:
        lines.append(f"{part['device']}: {part['scores']}")
    for part in content["cuda"]:
        where = f", {part['path']}" if "path" in part else ""
        lines.append(f"CUDA {part['arch']}: {part['state']} ({part['why']}){where}")
    return lines
