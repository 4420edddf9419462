"""The frame of every page: one environment for templates, one way to say numbers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from fastood.report.metricview import percent

if TYPE_CHECKING:
    import jinja2

__all__ = ["number", "options", "render_page", "signed", "when"]


def render_page(template: str, *, version: str, fingerprint: str | None, **values: Any) -> str:
    """A page that extends ``base.html``, complete in itself; all text from data is escaped.

    Args:
        template: file of this package.
        version, fingerprint: of fastood and of the model, for the foot of the page.
        values: what the template reads.
    """
    from markupsafe import Markup

    found: str = (
        _environment()
        .get_template(template)
        .render(css=Markup(_read("report.css")), version=version, fingerprint=fingerprint, **values)
    )
    return found


def _read(name: str) -> str:
    return resources.files("fastood.report").joinpath(name).read_text("utf-8")


@cache
def _environment() -> jinja2.Environment:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_read),
    )
    environment.filters.update(
        percent=percent, svg=Markup, number=number, options=options, signed=signed, when=when
    )
    return environment


def number(value: Any) -> str:
    """Counts with thousands separators, other numbers short."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def signed(value: float) -> str:
    """Five decimals, with a proper minus."""
    return f"{value:.5f}".replace("-", "−")


def options(given: Mapping[str, Any] | None) -> str:
    """``c = 2, tau = 0.01``."""
    return ", ".join(f"{k} = {number(v)}" for k, v in (given or {}).items()) or "–"


def when(text: Any) -> str:
    """An ISO time as people write it; other text unchanged."""
    try:
        moment = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return str(text)
    zone = f" {moment.tzname()}" if moment.tzinfo else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"
