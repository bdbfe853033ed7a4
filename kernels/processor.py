"""What the processor has that the CPU's kernels are compiled for: asked of the code that LLVM makes for it.

Names of features differ from one architecture to the next, and tell nothing about a processor that is only named
(`NUMBA_CPU_NAME=haswell` makes a newer one generate, and run, the code of an older one). So a few lines of LLVM IR are
compiled, and what stands in the assembly is what there is.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

import llvmlite.binding as llvm
import numba as nb

from radixkv.kernels.numba_emitter import LANES

PROBE = """
define <16 x float> @add(<16 x float> %x, <16 x float> %y) {
  %sum = fadd <16 x float> %x, %y
  ret <16 x float> %sum
}
define <16 x float> @widen(<16 x half> %x) {
  %wide = fpext <16 x half> %x to <16 x float>
  ret <16 x float> %wide
}
define <8 x i32> @shift(<8 x i32> %x, <8 x i32> %by) {
  %shifted = lshr <8 x i32> %x, %by
  ret <8 x i32> %shifted
}
define <16 x bfloat> @narrow(<16 x float> %x) {
  %short = fptrunc <16 x float> %x to <16 x bfloat>
  ret <16 x bfloat> %short
}
"""
REGISTER_FILES = (  # what a line with a sum of vectors shows: lanes of float32, and registers
    (r"\bvaddps\b.*%zmm", (16, 32)),
    (r"\bvaddps\b.*%ymm", (8, 16)),
    (r"\bfadd\b.*\.4s", (4, 32)),  # NEON
    (r"\baddps\b.*%xmm", (4, 16)),
)


class Processor(NamedTuple):
    """Of one kind.

    Attributes:
        lanes: numbers of 4 bytes in a register of vectors.
        registers: of vectors.
        widens_f16: whether it makes vectors of float32 of float16.
        multiplies_bf16: whether it multiplies pairs of bfloat16 and adds both products, for 16 lanes at once.
        looks_up_bytes: whether it looks 32 bytes up in a table at once: x86 with AVX2 does, and with it came shifts of
            each lane by a number of its own.
    """

    lanes: int
    registers: int
    widens_f16: bool
    multiplies_bf16: bool
    looks_up_bytes: bool

    @property
    def vectors(self) -> int:
        """How many vectors of 16 lanes its registers hold."""
        return self.registers * self.lanes // LANES


@cache
def this_processor() -> Processor:
    """The one that Numba compiles for."""
    name, features = nb.config.CPU_NAME, nb.config.CPU_FEATURES
    if name in (None, "host"):
        name = llvm.get_host_cpu_name()
        features = llvm.get_host_cpu_features().flatten() if features is None else features
    return processor_of(llvm.get_default_triple(), name, features or "")


def processor_of(triple: str, name: str, features: str = "") -> Processor:
    """The one of that name, as LLVM calls it, for instance processor_of("x86_64-unknown-linux-gnu", "haswell")."""
    target = llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=features)
    module = llvm.parse_assembly(PROBE)
    module.triple = triple
    assembly = target.emit_assembly(module)
    found = (file for pattern, file in REGISTER_FILES if re.search(pattern, assembly))
    lanes, registers = next(found, (4, 16))
    return Processor(
        lanes,
        registers,
        widens_f16=re.search(r"\b(vcvtph2psx?|fcvtl2?)\b", assembly) is not None,
        multiplies_bf16=re.search(r"\bvcvtneps2bf16\b.*%zmm", assembly) is not None,
        looks_up_bytes=re.search(r"\bvpsrlvd\b.*%ymm", assembly) is not None,
    )
