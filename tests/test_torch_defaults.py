"""What an application sets for all of torch (dtype, device, grad mode, determinism) changes nothing here."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from prompts import random_ids
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.memory.kv_codes import CODE_FORMS, rotate
from radixkv.memory.kv_shape import LayerKV
from radixkv.memory.quantized_pool import make_kv_pool
from tiny_models import tiny_model

ROOT = Path(__file__).parent.parent
PAGE = 16


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    """Fills new memory with NaN, too."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: Mapping[str, Callable[[], AbstractContextManager[object]]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta device": lambda: default_device("meta"),
    "no grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "deterministic": deterministic,
}

ENGINES: Mapping[str, tuple[str, dict[str, Any]]] = {  # a family, and settings
    "numba": ("llama", {"attention_backend": "numba"}),
    "numba, int8": ("llama", {"attention_backend": "numba", "kv_cache_dtype": "int8"}),
    "numba, window pool": ("gemma3", {"attention_backend": "numba"}),
    "numba, sinks": ("gpt_oss", {"attention_backend": "numba"}),
    "numba, streaming": ("llama", {"attention_backend": "numba", "window": 32, "sinks": 4}),
    "torch": ("llama", {"attention_backend": "torch"}),
    "torch, int4": ("llama", {"attention_backend": "torch", "kv_cache_dtype": "int4"}),
    "torch, window pool": ("gemma3", {"attention_backend": "torch"}),
    "latent": ("deepseek_v2", {"attention_backend": "latent"}),
}

TRIED: Mapping[str, set[str]] = {  # each engine, and each setting, with some that differ most
    "bfloat16": {"numba, int8", "numba, sinks", "torch, window pool", "latent"},
    "float16": {"numba"},
    "float64": {"numba, window pool"},
    "meta device": {"numba, int8", "numba, streaming", "torch, int4", "latent"},
    "no grad": {"numba"},
    "inference mode": {"torch"},
    "deterministic": {"torch, window pool"},
}
CASES = [  # and every pair under `stress`
    pytest.param(kind, setting, marks=[] if kind in TRIED[setting] else [pytest.mark.stress])
    for kind in ENGINES
    for setting in SETTINGS
]

PROMPT, TAIL, LONGER, OTHER = random_ids(1, 44), random_ids(2, 9), random_ids(3, 5), random_ids(4, 20)
GREEDY = SamplingParams(max_tokens=4)
SAMPLED = SamplingParams(max_tokens=4, temperature=0.9, top_k=40, top_p=0.9, min_p=0.02, seed=7, logprobs=2)


def make(kind: str) -> Engine:
    family, settings = ENGINES[kind]
    return Engine(tiny_model(family), config=EngineConfig(page_size=PAGE, kv_cache_tokens=1024, **settings))


def work(engine: Engine) -> list[tuple[list[int], int]]:
    """What an engine answers to a prompt, to one that shares it up to inside a page, to a batch, and when it draws."""
    outputs = [
        *engine.generate(PROMPT, GREEDY),
        *engine.generate(PROMPT[:38] + TAIL, GREEDY),
        *engine.generate([PROMPT + LONGER, OTHER], GREEDY),
        *engine.generate(PROMPT, SAMPLED),
    ]
    assert [output.error for output in outputs] == [None] * len(outputs)
    engine.check_invariants()
    return [(output.token_ids, output.cached_tokens) for output in outputs]


@pytest.fixture(scope="module")
def usual() -> Callable[[str], list[tuple[list[int], int]]]:
    """What an engine answers where nothing was set."""
    known: dict[str, list[tuple[list[int], int]]] = {}

    def answers(kind: str) -> list[tuple[list[int], int]]:
        if kind not in known:
            known[kind] = work(make(kind))
        return known[kind]

    return answers


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_an_engine_answers_the_same_whatever_is_set_for_all_of_torch(
    kind: str, setting: str, usual: Callable[[str], list[tuple[list[int], int]]]
) -> None:
    expected = usual(kind)
    model = tiny_model(ENGINES[kind][0])  # the application loads it before it sets anything
    with SETTINGS[setting]():
        engine = Engine(model, config=EngineConfig(page_size=PAGE, kv_cache_tokens=1024, **ENGINES[kind][1]))
        assert work(engine) == expected


@pytest.mark.stress
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_is_loaded_and_served_the_same_under_another_default_dtype(dtype: torch.dtype) -> None:
    def text() -> str:
        # not Numba's: the demo model's three query heads a KV head in bfloat16 are a kernel that no other test uses
        engine = Engine.from_pretrained("demo", dtype="bfloat16", kv_cache_tokens=1024, attention_backend="torch")
        return engine.generate("ROMEO:\n" * 8, SamplingParams(max_tokens=8))[0].text

    expected = text()
    with default_dtype(dtype):
        assert text() == expected


@pytest.mark.parametrize(
    ("kind", "made_in_inference_mode"),
    [
        pytest.param(kind, made_in, marks=[] if made_in == (kind in ("numba, int8", "torch")) else [pytest.mark.stress])
        for kind in ("numba, int8", "numba, window pool", "torch", "latent")
        for made_in in (True, False)
    ],
)
def test_an_engine_made_in_inference_mode_works_outside_it_and_the_reverse(
    kind: str, made_in_inference_mode: bool, usual: Callable[[str], list[tuple[list[int], int]]]
) -> None:
    inside: tuple[AbstractContextManager[object], ...] = (torch.inference_mode(), nullcontext())
    first, then = inside if made_in_inference_mode else inside[::-1]
    with first:
        engine = make(kind)
        assert work(engine) == usual(kind)
        engine.reset_cache()
    with then:
        assert work(engine) == usual(kind)


@pytest.mark.parametrize("kv_dtype", ["auto", *CODE_FORMS])
@pytest.mark.parametrize("layout", ["nhd", "lanes"])
def test_a_pool_made_in_inference_mode_is_written_and_copied_outside_it(layout: Any, kv_dtype: str) -> None:
    with torch.inference_mode():
        pool = make_kv_pool(
            layout,
            [LayerKV(2, 16, 16)],
            kv_dtype=kv_dtype,
            num_pages=3,
            page_size=PAGE,
            dtype=torch.float32,
            device="cpu",
        )
    pool.clear_page(2)
    pool.write(0, torch.arange(PAGE), torch.randn(PAGE, 2, 16), torch.randn(PAGE, 2, 16))
    pool.copy_page(0, 1, 9)
    for pages in pool.gather(0, torch.tensor([0, 1])):
        assert torch.equal(pages[:9], pages[PAGE : PAGE + 9])


def test_rotation_first_used_in_inference_mode_can_be_differentiated_through_later() -> None:
    with torch.inference_mode():
        rotate(torch.ones(1, 40))
    vectors = torch.ones(1, 40, requires_grad=True)
    rotate(vectors).sum().backward()
    assert vectors.grad is not None


# -- the source ------------------------------------------------------------------------------------------------------

WITH_DTYPE = {"empty", "zeros", "ones", "full", "arange", "tensor", "rand", "randn", "randint", "eye", "linspace"}


def factories_without_dtype(source: str) -> list[int]:
    """Lines of calls such as `torch.empty(...)` that leave dtype or device to the application."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in WITH_DTYPE
        and not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}
    ]


def test_every_new_tensor_says_its_dtype_and_device() -> None:
    paths = [path for folder in ("radixkv", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    lines = {path: factories_without_dtype(source) for path, source in sources.items() if "torch." in source}
    assert {path: found for path, found in lines.items() if found} == {}


def test_a_tensor_without_dtype_or_device_is_seen() -> None:
    source = 'torch.empty(3)\ntorch.ones(3, dtype=x)\ntorch.zeros(3, device="cpu")\ntorch.arange(3, dtype=x, device=y)'
    assert factories_without_dtype(source) == [1, 2, 3]
