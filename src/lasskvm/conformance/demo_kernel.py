"""The kernel of the demonstration: finds LASS, makes every access without it, switches it on, makes every access again.

It talks to its VMM through memory only: a table of programs to enter, and a record for what became of each. Every
program ends in an exception or in ``INT 80H``; either way its handler writes the record and goes on with the next.
"""

from __future__ import annotations

from collections.abc import Mapping

from lasskvm.conformance.layout import DONE_VECTOR, KERNEL_STACK_TOP, UPPER
from lasskvm.x86.exceptions import has_error_code

__all__ = [
    "CASES_GPA",
    "CASE_WORDS",
    "CR2_UNTOUCHED",
    "FINAL_CR4",
    "FINISHED",
    "FOUND",
    "RECORDS_GPA",
    "RECORD_WORDS",
    "VARIABLES_GPA",
    "handled_vectors",
    "kernel_source",
]

VARIABLES_GPA, CASES_GPA, RECORDS_GPA = 0x60000, 0x61000, 0x62000
#: The variables: what CPUID said, CR4 at the end, the number of finished records, the case and its place in the table.
FOUND, FINAL_CR4, FINISHED, REMAINING, CASE = range(5)
#: A case: the frame for IRET, lowest word first (RIP, CS, RFLAGS, RSP, SS).
CASE_WORDS = 5
#: A record: vector, error code, RIP, CR2.
RECORD_WORDS = 4
#: CR2 before each access.
CR2_UNTOUCHED = 0xFFFF_8BAD_0000_0CE2

_WORD = 8
_EXCEPTIONS = 32
_CR4_LASS_BIT = 27
_CPUID_LASS_BIT = 6


def kernel_source(cases: int) -> str:
    """The kernel as assembly, for *cases* cases; ``vector_N`` are its handlers' labels."""
    return f"""
        # Does this processor have LASS? CPUID.(EAX=07H,ECX=1):EAX[6]
        mov eax, 7; mov ecx, 1; cpuid
        shr eax, {_CPUID_LASS_BIT}; and eax, 1
        mov r8, {UPPER + VARIABLES_GPA:#x}
        mov [r8 + {_WORD * FOUND}], rax
        call make_all_accesses
        mov r8, {UPPER + VARIABLES_GPA:#x}
        cmp dword [r8 + {_WORD * FOUND}], 0; je finished
        mov rax, cr4; bts rax, {_CR4_LASS_BIT}; mov cr4, rax
        call make_all_accesses
    finished:
        mov r8, {UPPER + VARIABLES_GPA:#x}
        mov rax, cr4; mov [r8 + {_WORD * FINAL_CR4}], rax
        hlt

    make_all_accesses:
        mov r8, {UPPER + VARIABLES_GPA:#x}
        mov qword [r8 + {_WORD * REMAINING}], {cases}
        mov rbx, {UPPER + CASES_GPA:#x}; mov [r8 + {_WORD * CASE}], rbx
    next_access:
        cmp qword [r8 + {_WORD * REMAINING}], 0; je all_accesses_made
        mov rax, {CR2_UNTOUCHED:#x}; mov cr2, rax
        mov rbx, [r8 + {_WORD * CASE}]
        {"; ".join(f"push qword [rbx + {_WORD * word}]" for word in reversed(range(CASE_WORDS)))}
        iretq
    all_accesses_made:
        ret

    # Here with vector, error code, RIP and the rest on the IST stack
    record:
        clac
        mov r8, {UPPER + VARIABLES_GPA:#x}
        mov rbx, [r8 + {_WORD * FINISHED}]
        imul rbx, rbx, {_WORD * RECORD_WORDS}
        mov rcx, {UPPER + RECORDS_GPA:#x}; add rbx, rcx
        pop qword [rbx]; pop qword [rbx + {_WORD}]; pop qword [rbx + {2 * _WORD}]
        mov rax, cr2; mov [rbx + {3 * _WORD}], rax
        inc qword [r8 + {_WORD * FINISHED}]
        add qword [r8 + {_WORD * CASE}], {_WORD * CASE_WORDS}
        dec qword [r8 + {_WORD * REMAINING}]
        # The return address of make_all_accesses is where it was.
        mov rsp, {KERNEL_STACK_TOP - _WORD:#x}
        jmp next_access

    {_handlers()}
    """


def _handlers() -> str:
    """An entry for each exception, and for the programs' way to say that they are done."""
    entries = []
    for vector in (*range(_EXCEPTIONS), DONE_VECTOR):
        error_code = "" if has_error_code(vector) else "push 0; "
        entries.append(f"vector_{vector}: {error_code}push {vector}; jmp record")
    return "\n".join(entries)


def handled_vectors(labels: Mapping[str, int]) -> dict[int, int]:
    """Vectors and the addresses of their handlers, from the kernel's *labels*."""
    prefix = "vector_"
    return {int(name.removeprefix(prefix)): at for name, at in labels.items() if name.startswith(prefix)}
