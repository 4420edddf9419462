"""Text that every file and terminal can hold."""

from __future__ import annotations

__all__ = ["visible"]


def visible(text: str) -> str:
    """``text`` with what is not UTF-8 shown as escapes (``\\udcff``).

    File names in other encodings arrive as lone surrogates, which no JSON or Arrow file can hold.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
