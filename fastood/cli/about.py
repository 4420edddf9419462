"""``fastood models``, ``fastood info`` and ``fastood cache``."""

from __future__ import annotations

import os
import platform
from typing import Annotated, Any

import typer

from fastood._version import __version__, installed
from fastood.cli import options as o
from fastood.cli import show
from fastood.cli.build import kernel_lines, kernels

__all__ = ["cache_app", "info", "models"]

cache_app = typer.Typer(no_args_is_help=True, help="The feature cache.")

_PACKAGES = (
    "torch", "triton", "open_clip_torch", "transformers", "timm", "safetensors",
    "numpy", "pillow",
)  # fmt: skip


def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name.")] = "",
    cached: Annotated[
        bool, typer.Option("--cached", help="Only those whose weights are on this machine.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Models known by name, and which of them need no download."""
    from fastood.models import list_models

    found = [m for m in list_models(cached_only=cached) if pattern.lower() in m.name.lower()]
    if json:
        show.print_json([{"name": m.name, "source": m.source, "cached": m.cached} for m in found])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "here", "weights from"):
        table.add_column(column)
    for m in found:
        table.add_row(m.name, "yes" if m.cached else "", m.source)
    out = show.console()
    out.print(table)
    out.print(
        f"models listed: {len(found)}. Also: a local checkpoint (--checkpoint), hf-hub:org/name, "
        "hf:org/name or hf:folder, timm:name."
    )


def info(json: o.Json = False) -> None:
    """Versions, device, and which kernels are active."""
    import torch

    versions = {"fastood": __version__}
    versions |= {package: installed(package) or "not installed" for package in _PACKAGES}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    content: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus,
        "kernels": kernels(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("FASTOOD_")},
    }
    if json:
        show.print_json(content)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")  # a path cut short is no path
    table.add_row("python", f"{content['python']} on {content['platform']}")
    for package, version in versions.items():
        table.add_row(package, version)
    table.add_row("cpu", f"{content['cpu']}, {content['threads']} threads")
    table.add_row("gpu", ", ".join(gpus) or "none")
    for i, line in enumerate(kernel_lines(content["kernels"])):
        table.add_row("" if i else "kernels", Text(line))
    for name, value in content["environment"].items():
        table.add_row(name, value)
    show.console().print(table)


@cache_app.command("info")
def cache_info(cache: o.CacheFolder = None, json: o.Json = False) -> None:
    """Where the cache is and what it holds."""
    from fastood.features import FeatureCache

    content = FeatureCache(cache).info()
    if json:
        show.print_json(content)
        return
    out = show.console()
    out.print(f"{content['folder']}: {_size(content['bytes'])}, {content['images']:,} images")
    for name, part in content["models"].items():
        out.print(f"  {name}: {part['images']:,} images, {_size(part['bytes'])}", markup=False)


@cache_app.command("clear")
def cache_clear(
    cache: o.CacheFolder = None,
    older_than: Annotated[
        float | None, typer.Option(help="Only what was not used for this many days.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Delete what the cache wrote, and nothing else."""
    from fastood.features import FeatureCache

    seconds = None if older_than is None else older_than * 86400
    content = FeatureCache(cache).clear(older_than=seconds)
    if json:
        show.print_json(content)
        return
    show.console().print(f"{content['files']} files deleted, {_size(content['bytes'])} freed")


def _size(count: float) -> str:
    unit = "B"
    for larger in ("kB", "MB", "GB"):
        if count < 1000:
            break
        count, unit = count / 1000, larger
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
