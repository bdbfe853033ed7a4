"""Codes of 4 bits with a scale for each 16: what a dull quantiser says, in torch and in the compiled kernels."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from llvmlite import ir
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig

from attention_cases import Case
from prompts import random_prompts
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.attention.backend import choose_backend
from radixkv.errors import ConfigError, UnsupportedBackendError
from radixkv.kernels import numba_codes, numba_fp4, triton_device
from radixkv.kernels.numba_emitter import IVEC, Emitter
from radixkv.kernels.processor import Processor
from radixkv.memory.fp4_codes import BLOCK, GLOBAL_SCALE, decode_fp4, encode_fp4
from radixkv.memory.kv_shape import VALUES_PER_SCALE
from tiny_models import make_model, tiny_model, with_common

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
NAN = 0x7F
Floats = NDArray[np.float32]


# -- the oracle --------------------------------------------------------------------------------------------------------


def value_of_e4m3(bits: int) -> float:
    exponent, fraction = divmod(bits, 8)
    return math.ldexp(fraction, -9) if exponent == 0 else math.ldexp(8 + fraction, exponent - 10)


SCALES = [value_of_e4m3(bits) for bits in range(NAN)]


def nearest(number: float, grid: Sequence[float]) -> int:
    """Where in an ascending grid the nearest number is; of two that are as near, the one at the even place."""
    number, best = min(number, grid[-1]), 0
    for place, candidate in enumerate(grid):
        closer, other = abs(candidate - number), abs(grid[best] - number)
        if closer < other or (closer == other and place % 2 == 0):
            best = place
    return best


def oracle(vector: Floats) -> tuple[list[int], list[int]]:
    """The codes of a vector's components, and the bits of its blocks' scales, one after another."""
    codes, scales = [], []
    for first in range(0, len(vector), 16):
        block = vector[first : first + 16]
        if not np.isfinite(vector).all():
            scales.append(NAN)
            codes += [0] * 16
            continue
        scale = nearest(float(np.float32(max(abs(block))) / np.float32(1.5)), SCALES)
        scales.append(scale)
        for value in block:
            if scale == 0:
                codes.append(0)
                continue
            code = nearest(float(np.float32(abs(value)) / np.float32(SCALES[scale] / 4)), MAGNITUDES)
            codes.append(code + 8 if value < 0 else code)
    return codes, scales


def packed(codes: list[int]) -> list[int]:
    half = len(codes) // 2
    return [low + 16 * high for low, high in zip(codes[:half], codes[half:], strict=True)]


def check(vectors: Floats) -> None:
    codes, scales = encode_fp4(torch.from_numpy(vectors))
    values = decode_fp4(codes, scales)
    for i, vector in enumerate(vectors):
        wanted_codes, wanted_scales = oracle(vector)
        assert scales[i].tolist() == wanted_scales
        assert codes[i].tolist() == packed(wanted_codes)
        for value, code, scale in zip(values[i].tolist(), wanted_codes, np.repeat(wanted_scales, 16), strict=True):
            if scale == NAN:
                assert math.isnan(value)
            else:
                assert abs(value) == MAGNITUDES[code % 8] * SCALES[scale] / 4
                assert math.copysign(1, value) == (1 if code < 8 else -1)


# -- in torch ----------------------------------------------------------------------------------------------------------

KINDS = [
    st.floats(-4, 4, width=32),
    st.sampled_from([sign * step / 8 for sign in (-1, 1) for step in range(49)]),  # with a scale of 1, every tie
    st.floats(-(2.0**-7), 2.0**-7, width=32),  # where scales are few
    st.floats(-(2.0**100), 2.0**100, width=32),
]


@given(
    vectors=st.sampled_from(KINDS).flatmap(lambda kind: arrays(np.float32, (2, 48), elements=kind))
    | arrays(np.float32, (2, 48), elements=st.one_of(*KINDS))
)
def test_codes_and_scales_are_the_oracles(vectors: Floats) -> None:
    check(vectors)


def test_ties_go_to_the_even_code() -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    around = [np.nextafter(np.float32(tie), np.float32(way)) for tie in ties for way in (0, 9)]
    vectors = np.zeros((2, 32), np.float32)
    vectors[0, :7], vectors[0, 7:21], vectors[1, :16] = ties, around, -np.array(ties + ties + [6, 1])
    vectors[:, 15] = vectors[:, 31] = 6  # makes the step 1
    check(vectors)
    found = decode_fp4(*encode_fp4(torch.from_numpy(vectors)))
    assert found[0, :7].tolist() == [0, 1, 1, 2, 2, 4, 4]


def borders() -> Floats:
    """Blocks whose scales are every one that there is, half way between two, next to either, and beyond all."""
    between = [(low + high) / 2 for low, high in itertools.pairwise(SCALES)]
    largest = 1.5 * np.array([*SCALES, *between, 460.0, 1e30, 1e-40], np.float32)
    near = np.concatenate([largest, np.nextafter(largest, np.float32(0)), np.nextafter(largest, np.float32(np.inf))])
    blocks: Floats = np.linspace(-1, 1, 16, dtype=np.float32) * near[:, None]
    return blocks


def test_every_scale_and_the_borders_between_them() -> None:
    check(borders())
    assert float(decode_fp4(*encode_fp4(torch.full((16,), 1e30)))[0]) == 672
    assert GLOBAL_SCALE * 448 * 6 == 672


def test_what_is_not_finite_spoils_its_vector_alone() -> None:
    vectors = np.ones((4, 32), np.float32)
    vectors[0, 3], vectors[1, 17], vectors[2, 31] = np.nan, np.inf, -np.inf
    check(vectors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoded_values_are_exact_in_16_bit(dtype: torch.dtype) -> None:
    values = decode_fp4(*every_code_by_every_scale())
    assert torch.equal(values.to(dtype).float(), values)


def every_code_by_every_scale() -> tuple[Tensor, Tensor]:
    """Codes and scales of [127, 16]."""
    codes = torch.tensor([packed(list(range(16)))], dtype=torch.uint8).expand(NAN, -1).contiguous()
    return codes, torch.arange(NAN, dtype=torch.uint8)[:, None]


# -- in the kernels ----------------------------------------------------------------------------------------------------


def test_the_compiled_backend_writes_the_same_bytes() -> None:
    blocks = torch.from_numpy(borders())
    case = Case([(0, len(blocks))], num_q_heads=4, num_kv_heads=2, head_dim=48, v_head_dim=16, kv_dtype="fp4")
    needs, slots = case.needs(case.params()), case.metadata.slots
    pool, other = case.pool("lanes"), case.pool("lanes")
    k, v = torch.cat([blocks, blocks.flip(0), blocks / 3], 1)[:, None].repeat(1, 2, 1), blocks[:, None].repeat(1, 2, 1)
    k[:, 1] *= -1
    v[:, 1] = (blocks * 4).round() / 4
    for values in (k, v):
        values[1], values[2], values[3] = 0, -3, -0.0
        values[4:7, 1, 4] = torch.tensor([math.nan, -math.inf, math.inf])
    choose_backend("numba", needs)(pool, needs).plan(case.metadata).store_kv(0, k, v)
    other.write(0, slots, k, v)
    for name in ("k", "v", "k_scales", "v_scales"):
        assert torch.equal(getattr(pool, name)[0], getattr(other, name)[0]), name


@pytest.mark.parametrize("backend", ["numba", "torch", "reference", "triton"])
def test_every_code_is_read_to_the_bit(backend: str) -> None:
    """Sequences of one token: the output of each query is V, which holds every code by each of the scales."""
    values = decode_fp4(*every_code_by_every_scale())
    expected = torch.cat([values, values[:1]]).view(8, 1, 256)
    assert expected.abs().max() == 672
    case = Case([(0, 1)] * 8, num_q_heads=2, num_kv_heads=1, head_dim=256, kv_dtype="fp4")
    case.v[case.metadata.slots] = expected
    found = case.plan(backend, case.params()).attend(0, case.q, case.params())
    assert torch.equal(found, expected.expand(-1, 2, -1))


def test_keys_are_read_by_every_scale() -> None:
    """Two tokens each, of which the first has a key of zeros; queries are the smaller, the larger the scale."""
    case = Case([(1, 2)] * NAN, num_q_heads=2, num_kv_heads=1, head_dim=16, kv_dtype="fp4")
    slots = case.metadata.slots
    case.k[slots - 1] = 0
    case.k[slots] = decode_fp4(*every_code_by_every_scale())[:, None]
    case.q /= torch.tensor(SCALES).clamp(min=2.0**-9)[:, None, None]
    case.check("numba", case.params(), 5e-6)


PROCESSORS = {  # with tables of floats, of bytes, and with neither
    "AVX-512": Processor(16, 32, widens_f16=True, multiplies_bf16=False, looks_up_bytes=True),
    "AVX2": Processor(8, 16, widens_f16=True, multiplies_bf16=False, looks_up_bytes=True),
    "NEON": Processor(4, 32, widens_f16=True, multiplies_bf16=False, looks_up_bytes=False),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_processor_reads_the_same_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What LLVM makes of the code for words that it knows are numbers, also where this processor lacks instructions."""
    monkeypatch.setattr(numba_fp4, "this_processor", lambda: PROCESSORS[name])
    words = np.random.default_rng(0).integers(0, 2**32, 16, np.uint32)
    module = llvm.parse_assembly(reader_of(words.astype(np.int32).tolist()))
    machine = llvm.Target.from_default_triple().create_target_machine()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    assert "llvm.x86" not in str(module)
    found = np.empty((8, 16), np.float32)
    with llvm.create_mcjit_compiler(module, machine) as engine:
        ctypes.CFUNCTYPE(None, ctypes.c_int64)(engine.get_function_address("read"))(found.ctypes.data)
    signed = np.array([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)], np.float32)
    for i, of_lanes in enumerate(found):
        part, byte = divmod(i, 4)
        assert (of_lanes == 2 * signed[(words >> (8 * byte + 4 * part)) & 15]).all()


def reader_of(words: list[int]) -> str:
    """LLVM IR of a function that reads all values of these lanes into memory."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)]), "read")
    e = Emitter(ir.IRBuilder(function.append_basic_block()))
    for i in range(8):
        e.store(numba_fp4.read_code(e, ir.Constant(IVEC, words), i), function.args[0], e.const(64 * i))
    e.b.ret_void()
    return str(module)


def test_all_say_the_same_of_scales() -> None:
    constants = (numba_codes.GLOBAL_SCALE, triton_device.GLOBAL_SCALE.value)
    assert [float(constant) for constant in constants] == [GLOBAL_SCALE] * 2
    assert [numba_codes.BLOCK, triton_device.BLOCK.value, VALUES_PER_SCALE["fp4"]] == [BLOCK] * 3


# -- in engines --------------------------------------------------------------------------------------------------------


def engine_of(backend: str, *, head_dim: int = 16, dtype: str = "auto", kv_cache_dtype: str = "fp4") -> Engine:
    model = make_model(LlamaConfig(**with_common(head_dim=head_dim)))
    config = EngineConfig(
        attention_backend=backend, kv_cache_dtype=kv_cache_dtype, kv_cache_tokens=512, page_size=16, dtype=dtype
    )
    return Engine(model, config=config)


def answers(backend: str, head_dim: int, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    engine = engine_of(backend, head_dim=head_dim)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_tokens_are_those_of_the_reference(backend: str, head_dim: int) -> None:
    prompts = random_prompts(9, [30, 41, 37], shared=21)
    assert answers(backend, head_dim, prompts, 6) == answers("reference", head_dim, prompts, 6)


def test_few_tokens_are_those_of_the_reference_by_triton() -> None:
    prompts = random_prompts(9, [18], shared=0)
    assert answers("triton", 16, prompts, 3) == answers("reference", 16, prompts, 3)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_usage_is_less_than_2_7ths_of_16_bit(head_dim: int) -> None:
    sizes = []
    for form in ("auto", "fp4"):
        model = make_model(LlamaConfig(**with_common(head_dim=head_dim))).bfloat16()
        engine = Engine(model, config=EngineConfig(kv_cache_dtype=form, kv_cache_tokens=512, page_size=16))
        with engine.session() as session:
            session.append(random_prompts(1, [48], shared=0)[0])
            session.generate(SamplingParams(max_tokens=1))
            sizes.append(session.kv_usage().num_bytes)
    assert sizes[0] >= 3.5 * sizes[1] > 0


@pytest.mark.parametrize("head_dim", [8, 24, 72])
def test_heads_that_blocks_do_not_fill_are_refused(head_dim: int) -> None:
    reason = f"fp4 KV has a scale for each 16 components, and the model's heads have {head_dim}; take int8"
    for backend in ("auto", "torch"):
        with pytest.raises(ConfigError, match=reason):
            engine_of(backend, head_dim=head_dim)


def test_latents_are_refused() -> None:
    with pytest.raises(UnsupportedBackendError, match="keeps latents in the model's dtype, not as fp4"):
        Engine(tiny_model("deepseek_v3"), config=EngineConfig(kv_cache_dtype="fp4", kv_cache_tokens=64))


def test_pages_come_back_from_the_disk_of_the_same_form_alone(tmp_path: Path) -> None:
    """Codes and scales of full pages and of one that is full in part; pages of int4 are those of another store."""
    prompt = random_prompts(1, [37], shared=0)[0]
    outputs = []
    for form in ("fp4", "fp4", "int4"):
        config = EngineConfig(
            kv_cache_dtype=form,
            kv_cache_tokens=256,
            page_size=16,
            disk_cache=str(tmp_path),
            disk_cache_gb=0.01,
            warm_start_share=0,
        )
        with Engine(tiny_model("llama_wide"), config=config) as engine:
            (output,) = engine.generate(prompt, SamplingParams(max_tokens=6, ignore_eos=True))
        outputs.append(output)
    assert [output.cached_tokens for output in outputs] == [0, 36, 0]
    assert outputs[0].token_ids == outputs[1].token_ids
