"""Speed and memory, this package against QEMU's TCG, both sides in one run: ``python -m benchmarks``.

Each benchmark is a module with ``run(context) -> list[Row]``, listed in :mod:`benchmarks.__main__`. What they
share: :mod:`.rows` (results and their bars), :mod:`.context` (what to boot and how often), :mod:`.console` (a
VMM as a subprocess, its console with time stamps), :mod:`.machines` (the command lines of the two VMMs).
"""
