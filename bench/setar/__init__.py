"""SeTAR searches: ``python -m bench.setar`` (time), ``python -m bench.setar.parity`` (same picks).

``__main__.py`` runs a whole search beside ``peers.py`` (plain re-evaluation, the authors'
structure) and counts multiply-adds. ``parity.py`` runs the authors' repository in an environment of
its own (``parity_authors.py`` runs there) on the jobs of ``parity_jobs.py`` and compares every
candidate, the weights, and a few steps of fine-tuning (``parity_ft.py``).
"""
