"""The inner loops of attention suit the register file of the processor that they are compiled for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import llvmlite.binding as llvm
import pytest
import torch

from attention_cases import Case
from radixkv.kernels import numba_cpu
from radixkv.kernels.numba_cpu import MAX_ROWS, attention_tiles, rows_of_extends, tile_of
from radixkv.kernels.numba_modes import MODES
from radixkv.kernels.processor import Processor, processor_of

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
PROCESSORS = {  # by the name that LLVM has for it
    "haswell": (X86, Processor(8, 16, widens_f16=True, multiplies_bf16=False, looks_up_bytes=True)),  # AVX2
    "skylake-avx512": (X86, Processor(16, 32, widens_f16=True, multiplies_bf16=False, looks_up_bytes=True)),
    "znver4": (X86, Processor(16, 32, widens_f16=True, multiplies_bf16=True, looks_up_bytes=True)),
    "sapphirerapids": (X86, Processor(16, 32, widens_f16=True, multiplies_bf16=True, looks_up_bytes=True)),
    "x86-64": (X86, Processor(4, 16, widens_f16=False, multiplies_bf16=False, looks_up_bytes=False)),
    "neoverse-n1": (ARM, Processor(4, 32, widens_f16=True, multiplies_bf16=False, looks_up_bytes=False)),
    "apple-m1": ("arm64-apple-darwin", Processor(4, 32, widens_f16=True, multiplies_bf16=False, looks_up_bytes=False)),
}
MULTIPLY_AND_ADD = {X86: r"\bvfmadd\w*ps\b", ARM: r"\bfmla\b.*\.4s"}
ON_STACK = {X86: r"\(%rsp.*[yz]mm|[yz]mm.*\(%rsp", ARM: r"\b(ldr|str|ldp|stp)\b\s+q.*\[sp"}
KEPT_IN_REGISTERS = [("f32", 4), ("f32", 5), ("f32", 8), ("bf16", 8)]


@pytest.fixture(scope="module", autouse=True)
def all_targets() -> None:
    """LLVM generates code for other processors, too."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_is_known_by_the_code_that_it_gets(name: str) -> None:
    triple, expected = PROCESSORS[name]
    assert processor_of(triple, name) == expected


@pytest.mark.parametrize("name", PROCESSORS)
def test_sums_fit_into_the_registers(name: str) -> None:
    processor = PROCESSORS[name][1]
    for mode, rows in product(MODES, range(1, MAX_ROWS + 1)):
        tile = tile_of(mode, rows, processor)
        for sums_of_row in (tile.groups, tile.vectors * tile.mode.parts):
            turns = tile.turns(sums_of_row)
            assert [row for turn in turns for row in turn] == list(range(rows)), (mode, rows)
            most = max(len(turn) for turn in turns)
            assert most * sums_of_row < processor.vectors, (mode, rows)
            assert most * sums_of_row <= tile.sums or most == 1, (mode, rows)


def test_extends_take_as_many_rows_as_have_their_sums_in_registers() -> None:
    taken = {name: rows_of_extends("f32", processor) for name, (_, processor) in PROCESSORS.items()}
    assert taken == {
        "haswell": 6,
        "skylake-avx512": 8,
        "znver4": 8,
        "sapphirerapids": 8,
        "x86-64": 3,
        "neoverse-n1": 6,
        "apple-m1": 6,
    }
    assert rows_of_extends("bf16", PROCESSORS["haswell"][1]) == 8


@pytest.mark.parametrize("kind", ["score_block", "value_block"])
@pytest.mark.parametrize(("mode", "rows"), KEPT_IN_REGISTERS)
def test_inner_loops_multiply_and_add_vectors_and_spill_nothing(
    kind: str, mode: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba_cpu, "can_cache", lambda: False)  # what comes from the cache cannot be looked at
    sources: dict[object, str] = {}
    for name in ("haswell", "skylake-avx512", "neoverse-n1"):
        triple, processor = PROCESSORS[name]
        tile = tile_of(mode, rows, processor)
        if tile not in sources:
            sources[tile] = numba_cpu.compile_tiles(kind, tile).inspect_llvm()
        inner = busiest_block(assembly_of(sources[tile], triple, name), MULTIPLY_AND_ADD[triple])
        per_vector = 16 // processor.lanes
        sums_of_row = tile.groups if kind == "score_block" else tile.vectors * tile.mode.parts
        wanted = len(tile.turns(sums_of_row)[0]) * sums_of_row * tile.mode.values // tile.mode.parts * per_vector
        assert len(re.findall(MULTIPLY_AND_ADD[triple], inner)) >= wanted, name
        assert not re.search(ON_STACK[triple], inner), f"{name}:\n{inner}"


def assembly_of(source: str, triple: str, name: str) -> str:
    """The code of another processor for the LLVM IR that Numba made for this one."""
    source = re.sub(r'target (triple|datalayout) = "[^"]*"', "", source)
    source = re.sub(r'"target-(cpu|features)"="[^"]*"', "", source)
    module = llvm.parse_assembly(source)
    module.triple = triple
    return str(llvm.Target.from_triple(triple).create_target_machine(cpu=name, opt=3).emit_assembly(module))


def busiest_block(assembly: str, instruction: str) -> str:
    """What stands from a label to the last `instruction` before the next label, where there are the most of them: of
    several such blocks, that which jumps back by the fewest, as an inner loop does."""
    blocks = re.split(r"^(?=\.?L\w+:)", assembly, flags=re.MULTILINE)
    places = {block.split(":")[0]: place for place, block in enumerate(blocks)}
    most = max(len(re.findall(instruction, block)) for block in blocks)

    def jumped_back(place: int) -> int:
        targets = [
            places[label] for label in re.findall(r"\s(\.?L\w+)\s*$", blocks[place], re.MULTILINE) if label in places
        ]
        return min((place - target for target in targets if target <= place), default=len(blocks))

    busiest = [place for place, block in enumerate(blocks) if len(re.findall(instruction, block)) == most]
    block = blocks[min(busiest, key=jumped_back)]
    return block[: max(match.end() for match in re.finditer(instruction, block))]


@pytest.fixture
def tiles_of_another() -> Iterator[None]:
    attention_tiles.cache_clear()
    yield
    attention_tiles.cache_clear()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("haswell", dtype) for dtype in (torch.float32, torch.bfloat16)),
        ("skylake-avx512", torch.bfloat16),
        pytest.param("skylake-avx512", torch.float32, marks=pytest.mark.stress),
        ("x86-64", torch.float32),
        pytest.param(
            "x86-64", torch.bfloat16, marks=pytest.mark.stress
        ),  # without such vectors it takes 4 s to compile
    ],
)
@pytest.mark.usefixtures("tiles_of_another")
def test_tiles_made_for_other_processors_compute_the_same(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = PROCESSORS[name][1]
    monkeypatch.setattr(numba_cpu, "this_processor", lambda: processor)
    case = Case([(20, 21), (37, 38), (15, 33), (3, 40)], num_q_heads=6, num_kv_heads=2, head_dim=80, dtype=dtype)
    case.check("numba", case.params())
