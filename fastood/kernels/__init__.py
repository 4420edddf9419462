"""Triton kernels, one family per file. Imported when the first of them runs, never by ``fastood``.

Reading order: ``precision`` and ``operands`` (what is multiplied), ``products`` (tiles of cosines),
``state`` (what is kept of a row), then a family: ``rows``, ``grouped``, ``patches``, ``ebm``.
``configs`` picks tile sizes from a committed table, ``launch`` starts kernels.
"""
