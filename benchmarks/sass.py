"""What compiled code says of itself: resources, matrix instructions, loads, main loop. Text in, facts out.

Texts: PTX and amdgcn from Triton, `cuobjdump --dump-resource-usage` and `nvdisasm -c` from its package.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# In PTX and amdgcn.
MATRIX = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma.sync": r"\bmma\.sync",
    "mfma": r"v_mfma_",
}
LOADS = {
    "TMA": r"cp\.async\.bulk\.tensor",
    "cp.async": r"cp\.async\.c[ag]\b",
    "buffer": r"buffer_load",
}

# In SASS, by the start of an instruction's name: the first class that fits.
CLASSES = {
    "matrix": "HGMMA UTCHMMA UTCOMMA UTCQMMA QGMMA IGMMA HMMA",
    "TMA": "UTMA",
    "cp.async": "LDGSTS",
    "barrier": "BAR SYNCS DEPBAR LDGDEPBAR WARPSYNC WARPGROUP UTCBAR FENCE ARRIVES NANOSLEEP",
    "global": "LDG STG LD. ST.",
    "shared": "LDS STS",
    "local": "LDL STL",
    "branch": "BRA BSSY BSYNC EXIT ELECT VOTE PLOP3 UPLOP3",
    "address": "IMAD UIMAD IADD UIADD LEA ULEA VIADD SHF USHF LOP3 ULOP3 ISETP UISETP SEL USEL",
    "float": "FFMA FMUL FADD MUFU HFMA2 F2F",
}
STARTS = {kind: tuple(starts.split()) for kind, starts in CLASSES.items()}
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
LABEL = re.compile(r"^(\.L_\w+):")
JUMP = re.compile(r"\bBRA\S*\s.*`\((\.L_\w+)\)")


@dataclass(frozen=True, slots=True)
class Resources:
    """registers of a thread; bytes of stack, and of local memory besides; registers spilled into memory."""

    registers: int
    stack: int = 0
    local: int = 0
    spills: int = 0


@dataclass(frozen=True, slots=True)
class Loop:
    """The main loop of a kernel: its instructions, by class."""

    counts: dict[str, int]
    stores_to_shared: int

    @property
    def instructions(self) -> int:
        """How many, of every class."""
        return sum(self.counts.values())

    @property
    def matrix_share(self) -> float:
        """Which part of them multiplies matrices."""
        return self.counts.get("matrix", 0) / self.instructions


def kinds(text: str, patterns: dict[str, str]) -> tuple[str, ...]:
    """Which of MATRIX or LOADS occur in a text."""
    return tuple(name for name, pattern in patterns.items() if re.search(pattern, text))


def nvidia_resources(text: str) -> Resources:
    """From `cuobjdump --dump-resource-usage`."""
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(found["REG"], found["STACK"], found["LOCAL"])


def amd_resources(text: str) -> Resources:
    """From amdgcn: vector registers, accumulators included. Spilled scalars go into vector registers."""
    found = {
        name: int(number) for name, number in re.findall(r"^\s*\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)
    }
    return Resources(
        found["vgpr_count"], local=found["private_segment_fixed_size"], spills=found["vgpr_spill_count"]
    )


def main_loop(sass: str) -> Loop | None:
    """The loop with the largest share of matrix instructions, from a label to a jump back to it.

    A jump back from a block behind the loop, where a barrier is waited for, spans the whole epilogue too; so
    does an outer loop. Their shares are smaller.
    """
    names, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := INSTRUCTION.search(line):
            names.append(instruction[1])
            if (jump := JUMP.search(line)) and jump[1] in labels:
                loops.append(_loop(names[labels[jump[1]] :]))
    best = max(loops, key=lambda loop: loop.matrix_share, default=None)
    return best if best and best.matrix_share else None


def _loop(names: Sequence[str]) -> Loop:
    return Loop(dict(Counter(map(class_of, names))), sum(name.startswith("STS") for name in names))


def class_of(name: str) -> str:
    """The class of a SASS instruction, such as HGMMA.64x128x16.F32.BF16."""
    return next((kind for kind, starts in STARTS.items() if name.startswith(starts)), "other")
