"""What the assembler made of the CUDA kernels in the built extension, by the cuobjdump that comes with Triton."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.*?) *;")


@dataclass
class Kernel:
    """One kernel for one architecture.

    Attributes:
        name: as mangled.
        target: 90 for sm_90.
        instructions: opcode and operands of each, without predicates.
        registers: of a thread.
        stack: bytes of a thread, which is where what has no register is spilled to.
    """

    name: str
    target: int
    instructions: list[str]
    registers: int
    stack: int

    def count(self, opcode: str) -> int:
        """How many instructions have an opcode that this pattern matches from its beginning."""
        return sum(bool(re.match(opcode, text)) for text in self.instructions)

    def loads_in_flight(self, opcode: str) -> list[int]:
        """How many 16-byte loads of this opcode are issued before one of them is waited for, time after time."""
        groups: list[int] = []
        waiting: list[int] = []  # first registers of loads that nothing has used
        issued = 0
        for text in self.instructions:
            name, _, operands = text.partition(" ")
            registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
            if re.match(opcode, name):
                waiting.append(registers[0])
                issued += 1
                continue
            sources = registers if name.startswith("ST") else registers[1:]
            used = {first for first in waiting if any(first <= r < first + 4 for r in sources)}
            if used:
                waiting = [first for first in waiting if first not in used]
                if issued:
                    groups.append(issued)
                    issued = 0
        return groups


def cuobjdump() -> str | None:
    """Where it is, or None."""
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(path) if path.exists() else None


def kernels_in(binary: Path) -> list[Kernel]:
    """All kernels in a library or object file."""
    tool = cuobjdump()
    assert tool is not None
    usage = {}
    for target, name, text in _functions(_run(tool, "--dump-resource-usage", binary), r"Function (\S+):"):
        found = re.search(r"REG:(\d+) STACK:(\d+)", text)
        assert found is not None
        usage[target, name] = int(found[1]), int(found[2])
    return [
        Kernel(name, target, INSTRUCTION.findall(text), *usage[target, name])
        for target, name, text in _functions(_run(tool, "-sass", binary), r"Function : (\S+)")
    ]


def _functions(text: str, heading: str) -> list[tuple[int, str, str]]:
    functions = []
    for part in re.split(r"^arch = sm_", text, flags=re.MULTILINE)[1:]:
        target = re.match(r"\d+", part)
        assert target is not None
        pieces = re.split(heading, part)[1:]
        functions += [(int(target[0]), name, body) for name, body in zip(pieces[::2], pieces[1::2], strict=True)]
    return functions


def _run(tool: str, option: str, binary: Path) -> str:
    return subprocess.run([tool, option, str(binary)], capture_output=True, text=True, check=True).stdout
