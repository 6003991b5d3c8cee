"""Direct execution: Unicorn's translator, with every access checked in compiled Python at the TLB fill.

The parts: :mod:`~lasskvm.engine.native` compiles; :mod:`~lasskvm.engine.private` is the only module that knows
Unicorn's private fields, :mod:`~lasskvm.engine.calibration` checks them; :mod:`~lasskvm.engine.fill` is the TLB fill,
:mod:`~lasskvm.engine.hooks`, :mod:`~lasskvm.engine.ports` and :mod:`~lasskvm.engine.timing` are the other callbacks,
:mod:`~lasskvm.engine.entry` is VM entry and exit; and
:mod:`~lasskvm.engine.engine` puts them together.
"""
