"""What a probe is, and what probes are made of.

A probe says what a feature is good for: programs with results that the manual gives. The other half says what there is
without the feature. Where that is a matter of the CPUID bit alone, because every processor of this VMM can do it or
because the feature is a promise about time or speed, it says why, and the same programs have to work without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from legacy_machine import LegacyMachine

from lasskvm.conformance import layout
from lasskvm.conformance.guest import Guest
from lasskvm.conformance.layout import HIGH_SUPERVISOR, LOW_USER
from lasskvm.kvm import ExecutionEngine, HltExit, Regs
from lasskvm.x86.cpu_models import parse_cpu
from lasskvm.x86.cpuid import FEATURES, cr4_allowed, efer_allowed
from lasskvm.x86.exceptions import GP, UD
from lasskvm.x86.registers import EFER_LMA, MASK32

#: Guest-physical pages of the layout's pages to access.
LOW_USER_PAGE, HIGH_SUPERVISOR_PAGE = layout.DATA_GPA, layout.DATA_GPA + 0xC000
#: Where :func:`result_of` has its result, behind the operands.
RESULT = 0x100
_FEW_OPERANDS = RESULT // 16

Judgement = Callable[[Guest], None]


@dataclass(frozen=True)
class Probe:
    """How one feature is tested.

    *works* asserts what a guest with the feature can do, *gone* what one without it cannot. *only_cpuid* is there
    instead of *gone* when nothing else is lost: it says why. *runs_anyway* says why direct execution executes the
    instructions of the feature in a guest without it (``docs/differences.md``). *levels* and *irqchip* are those of
    the guests.
    """

    works: Judgement
    gone: Judgement | None = None
    only_cpuid: str = ""
    runs_anyway: str = ""
    levels: int = layout.DEFAULT_LEVELS
    irqchip: bool = False

    def __post_init__(self) -> None:
        if (self.gone is None) != bool(self.only_cpuid):
            raise ValueError("a probe says either what is gone without the feature, or why nothing is")


def make_guest(engine: ExecutionEngine, cpu: str, *, levels: int, irqchip: bool) -> Guest:
    """A guest whose control registers hold what its CPUID allows of the usual ones."""
    return prepared(Guest(cpu, engine=engine, levels=levels, irqchip=irqchip))


def prepared(guest: Guest) -> Guest:
    """*guest* as it was at the start."""
    guest.reset()
    guest.cr4 &= cr4_allowed(guest.vcpu.cpuid)
    guest.efer &= efer_allowed(guest.vcpu.cpuid) | EFER_LMA
    return guest


def cpu_with(model: str, name: str) -> str:
    """The model with the feature."""
    return model if name in parse_cpu(model).features else f"{model},+{name}"


# ----------------------------------------------------------------------------------------------- running programs


def completed(guest: Guest, source: str, *, cpl: int = 0, rflags: int = 0, **registers: int) -> Regs:
    """The registers when the program *source* has run to its end."""
    outcome = guest.execute(source, cpl=cpl, rflags=rflags, handlers=None, **registers)
    assert outcome.completed, f"{source}: {outcome}"
    return outcome.registers


def faults(
    guest: Guest,
    source: str,
    vector: int,
    error_code: int | None = None,
    *,
    cpl: int = 0,
    rflags: int = 0,
    **registers: int,
) -> None:
    """The instruction of *source* labelled ``fault`` (without a label: its first one) raises exception *vector*."""
    if "fault:" not in source:
        source = f"fault: {source}"
    outcome = guest.execute(source, cpl=cpl, rflags=rflags, handlers=None, **registers)
    assert (outcome.vector, outcome.error_code, outcome.label) == (vector, error_code, "fault"), (
        f"{source}: {outcome}"
    )


def result_of(guest: Guest, source: str, *operands: bytes, **registers: int) -> bytes:
    """The 16 bytes that a user program leaves at RDI; *operands* lie at RBX, 16 bytes apart."""
    assert len(operands) < _FEW_OPERANDS
    for number, operand in enumerate(operands):
        guest.write(LOW_USER + 16 * number, operand)
    guest.write(LOW_USER + RESULT, bytes(16))
    completed(guest, source, cpl=3, rbx=LOW_USER, rdi=LOW_USER + RESULT, **registers)
    return guest.memory.read(LOW_USER_PAGE + RESULT, 16)


def sse_result_of(guest: Guest, instruction: str, *operands: bytes) -> bytes:
    """What *instruction* leaves in XMM0; *operands* are in XMM0 and XMM1."""
    return result_of(
        guest, f"movups xmm0, [rbx]; movups xmm1, [rbx + 16]; {instruction}; movups [rdi], xmm0", *operands
    )


def in_protected_mode(guest: Guest, source: str, *, cr4: int = 0, **registers: int) -> Regs | int:
    """Run *source*, which ends with HLT, in 32-bit protected mode: its registers, or the vector that it raised."""
    machine = LegacyMachine(guest)
    exit_reason = machine.run_protected(source, cr4=cr4, **registers)
    assert isinstance(exit_reason, HltExit), f"{source}: {exit_reason}"
    regs = machine.regs
    is_handler = layout.HANDLERS_GPA <= regs.rip < layout.HANDLERS_GPA + layout.VECTORS * layout.HANDLER_BYTES
    return machine.vector if is_handler else regs


# ------------------------------------------------------------------------------------------- what guests may ask for


def shows(guest: Guest, name: str) -> bool:
    """Whether the CPUID instruction shows the feature to the guest."""
    place = FEATURES[name]
    found = in_protected_mode(guest, "cpuid; hlt", rax=place.leaf, rcx=place.subleaf)
    assert isinstance(found, Regs)
    register = (found.rax, found.rbx, found.rcx, found.rdx)[place.register]
    return bool(register >> place.bit & 1)


def _written_cr4(guest: Guest, bits: int) -> Regs | int:
    return in_protected_mode(
        guest, f"mov eax, cr4; mov esi, eax; or eax, {bits:#x}; mov cr4, eax; mov eax, cr4; hlt"
    )


def accepts_cr4(guest: Guest, bits: int) -> bool:
    """Whether the guest can set *bits* in CR4 outside IA-32e mode, and reads them back."""
    found = _written_cr4(guest, bits)
    return isinstance(found, Regs) and found.rax & MASK32 == found.rsi & MASK32 | bits


def refuses_cr4(bits: int) -> Judgement:
    """*bits* of CR4 are reserved: #GP(0)."""

    def judge(guest: Guest) -> None:
        assert _written_cr4(guest, bits) == GP

    return judge


def is_undefined(*sources: str, registers: Mapping[str, int] | None = None) -> Judgement:
    """Each of *sources* raises #UD; RBX points to a supervisor page."""

    def judge(guest: Guest) -> None:
        for source in sources:
            faults(guest, source, UD, **{"rbx": HIGH_SUPERVISOR, **(registers or {})})

    return judge


def has_no_msr(*indices: int) -> Judgement:
    """RDMSR and WRMSR of each of *indices* are #GP(0)."""

    def judge(guest: Guest) -> None:
        for index in indices:
            for source in ("rdmsr", "wrmsr"):
                faults(guest, f"xor eax, eax; xor edx, edx; fault: {source}", GP, 0, rcx=index)

    return judge


def all_of(*judgements: Judgement) -> Judgement:
    """All *judgements*, one after the other."""

    def judge(guest: Guest) -> None:
        for judgement in judgements:
            judgement(prepared(guest))

    return judge
