"""Long extends take the way that was measured to be faster, and both ways compute the same."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_cases import Case
from oracles import GreedyOracle
from radixkv import Engine, SamplingParams
from radixkv.attention import extend_choice, numba_backend
from radixkv.attention.extend_choice import LongExtends, faster_of, is_known, remembered
from radixkv.kernels.processor import Processor

AVX2, AVX512, NEON = (
    Processor(*file, widens_f16=True, multiplies_bf16=False, looks_up_bytes=file[0] > 4)
    for file in ((8, 16), (16, 32), (4, 32))
)
SPANS = [(0, 13), (20, 21), (7, 38), (15, 33), (3, 40)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"sliding_window": 7},
    {"softcap": 3.0, "sinks": True},
    {"sliding_window": 9, "sink_tokens": 5},
]


@pytest.fixture
def short_extends_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (numba_backend, extend_choice):
        monkeypatch.setattr(module, "MIN_DENSE_TOKENS", 14)


@pytest.mark.usefixtures("short_extends_are_long")
@pytest.mark.parametrize("spans", [SPANS, [(0, 20), (4, 30)]], ids=["some are dense", "all are dense"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int4"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dense_extends_beside_the_kernel(options: dict[str, Any], kv_dtype: str, spans: list[tuple[int, int]]) -> None:
    case = Case(spans, head_dim=32, kv_dtype=kv_dtype)
    case.check("numba", case.params(**options), tolerance=1e-5, long_extends="dense")


@pytest.mark.usefixtures("short_extends_are_long")
def test_an_engine_gives_the_same_tokens_either_way(make_engine: Callable[..., Engine], oracle: GreedyOracle) -> None:
    prompts = [[(7 * i + j) % 90 + 3 for j in range(40 + i)] for i in range(3)]
    for way in ("kernel", "dense"):
        engine = make_engine(page_size=16, attention_backend="numba", long_extends=way)
        assert engine.config.long_extends == way
        outputs = engine.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
        assert [output.token_ids for output in outputs] == [oracle.continuation(prompt, 6) for prompt in prompts]


def test_backends_with_one_way_say_that_there_is_no_choice(make_engine: Callable[..., Engine]) -> None:
    assert make_engine(attention_backend="torch").config.long_extends is None


def test_nothing_is_measured_where_it_is_known() -> None:
    known = [(processor, dtype) for processor in (AVX2, AVX512, NEON) for dtype in (torch.float32, torch.bfloat16)]
    assert [is_known(*case) for case in known] == [True, True, True, False, False, False]


def test_dense_is_taken_where_it_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(kernel_s: float, dense_s: float) -> LongExtends:
        clock = itertools.accumulate(itertools.cycle([0.0, kernel_s, 0.0, dense_s]))
        monkeypatch.setattr(extend_choice.time, "perf_counter", lambda: next(clock))
        return faster_of(lambda: None, lambda: None)

    assert [choose(1.0, 0.5), choose(1.0, 0.95), choose(1.0, 2.0)] == ["dense", "kernel", "kernel"]


@pytest.mark.usefixtures("short_extends_are_long")
def test_where_it_is_not_known_it_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compared = []

    def compare(kernel: Callable[[], object], dense: Callable[[], object]) -> LongExtends:
        compared.append((kernel(), dense()))
        return "dense"

    monkeypatch.setattr(numba_backend, "this_processor", lambda: NEON)
    monkeypatch.setattr(extend_choice, "faster_of", compare)
    monkeypatch.setattr(extend_choice, "kept_folder", lambda: tmp_path)
    case = Case(SPANS, head_dim=32)
    for _ in range(2):
        case.check("numba", case.params(), tolerance=1e-5)
    ((kernel, dense),) = compared
    torch.testing.assert_close(kernel, dense)


class Measure:
    """Says "dense", and counts how often it was asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> LongExtends:
        self.count += 1
        return "dense"


def test_what_was_found_is_kept_for_each_key(tmp_path: Path) -> None:
    measure = Measure()
    for key in ("one", "one", "other", "one", "other"):
        assert remembered(key, measure, tmp_path) == "dense"
    assert measure.count == 2
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text()) == {"one": "dense", "other": "dense"}


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"one": "fast"}', b"\xff\xfe"])
def test_a_file_that_says_nothing_is_written_anew(content: bytes, tmp_path: Path) -> None:
    remembered("one", Measure(), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    measure = Measure()
    for _ in range(2):
        assert remembered("one", measure, tmp_path) == "dense"
    assert measure.count == 1


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nowhere = tmp_path / "file"
    nowhere.touch()
    assert remembered("one", Measure(), nowhere) == "dense"
    assert "cannot be kept" in caplog.text
    assert os.listdir(tmp_path) == ["file"]
