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
    json: o.Json = False,
) -> None:
    """Compile the CPU kernels now rather than at first use."""
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


def kernels() -> dict[str, Any]:
    """What runs the scores on the CPU and why, for ``fastood info``; compiles nothing."""
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
    if found.path is not None:
        content |= {"kind": found.kind, "path": str(found.path)}
    content["key"] = found.key
    for name in ("bytes", "seconds", "torch", "cflags"):
        if name in found.info:
            content[name] = found.info[name]
    if found.info.get("compiler"):
        content["compiler"] = found.info["compiler"]
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
    return lines
