"""Differential fuzzing: random instructions in random states, executed on two paths that must agree.

:mod:`~lasskvm.fuzz.generator` draws a :class:`~lasskvm.fuzz.case.Case`, :mod:`~lasskvm.fuzz.paths` runs it,
:mod:`~lasskvm.fuzz.comparison` says where the end states differ, :mod:`~lasskvm.fuzz.known_defects` which of that is
known, :mod:`~lasskvm.fuzz.shrinking` makes the rest small, and :mod:`~lasskvm.fuzz.campaign` does all that many times.
``docs/fuzzing.md`` is the guide.
"""
