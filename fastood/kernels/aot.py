"""Compiles every committed configuration without a GPU, and says what each needs of one.

    python -m fastood.kernels.aot [--arch 80] [--arch 90] [--family rows] [--jobs 2] [--json FILE]

Signatures are not written down a second time. Each family's own launchers are called with tensors
of the CPU while a stand-in for the driver names the GPU: arguments go through Triton's own binder,
which finds types, alignments and constants just as for a real launch; the kernel is compiled and
not started. What a family (a module named like the ``family`` of its entries, or like the part of
it before the first underscore) has to define for this::

    def specialisations(
        precision: Precision, rows: int, width: int
    ) -> Iterator[tuple[str, Callable[[], object]]]:
        image = torch.empty(rows, width, dtype=...)
        text = Operand(precision, ...)
        for c in (1, 2, 4, 8):
            yield f"c={c}", partial(statistics, image, text, taus=(0.01,), c=c, ...)

that is: a label and a call for everything public that launches another kernel, or the same one with
other constants, at the sizes the entry is for: ``rows`` images (or B P patches) of ``width``, and
as many classes as it takes for every splitting and merging kernel (1,000 will do). The calls
take plain CPU tensors, uninitialised ones are good enough (nothing is computed: outputs keep what
``torch.empty`` left in them, so nothing may depend on their values); ``pick`` answers from the
table and ``processors`` as on an A100 or H100. Entries that no call picks are reported.
"""
