"""The benchmark on a GPU: ``python -m bench.gpu``, or all of it by ``bench/gpu.sh``.

``cases.py`` (what is measured, and the goals), ``inputs.py`` (features, several copies), one file a
family that says who computes it (``scores.py``, ``training.py``, ``lowrank.py``), ``accuracy.py``
(against float64, before anything is timed), ``clock.py`` (GPU time and wall time), ``ceilings.py``
(what the chip can do), ``launches.py``, ``measure.py`` (one case), ``store.py`` and ``page.py``
(results). ``small.py`` is for memory and race checkers, ``tune.py`` for the table of tile sizes.
Needs torch, Triton and NumPy beside the checkout.
"""
