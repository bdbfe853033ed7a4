"""Settings described once: what their checks, docstrings and schemas make of the descriptions."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from radixkv import CacheConfig, EngineConfig, PrefixCache, RadixTree, SamplingParams
from radixkv.cache.allocator import TokenToKVPoolAllocator
from radixkv.cache.eviction.policies import POLICIES
from radixkv.cache.insight.history import EvictionHistory
from radixkv.cache.insight.miss_ratio import MissRatioCurve
from radixkv.config import schema_of
from radixkv.config.setting import SettingField, setting_field, setting_fields
from radixkv.errors import ConfigError, InvalidSamplingParamsError, RadixKVError
from radixkv.memory.kv_shape import KVShape, LayerKV
from radixkv.replay.traces import parse_trace

CLASSES = (CacheConfig, EngineConfig, SamplingParams)
FIELDS = [(settings, field) for settings in CLASSES for field in setting_fields(settings)]
NEEDED: dict[type, dict[str, Any]] = {CacheConfig: {"num_pages": 4}}
ERRORS: dict[type, type[RadixKVError]] = {SamplingParams: InvalidSamplingParamsError}
each_field = pytest.mark.parametrize(
    ("settings", "field"), FIELDS, ids=[f"{settings.__name__}.{field.name}" for settings, field in FIELDS]
)


def make(settings: Any, **values: object) -> Any:
    """An object of settings with what must be given."""
    return settings(**{**NEEDED.get(settings, {}), **values})


def within(field: SettingField) -> int | float:
    """A number that a field allows."""
    setting = field.setting
    return setting.maximum if setting.maximum is not None and field.type is float else max(setting.minimum or 0, 1)


@each_field
def test_a_setting_says_what_it_means(settings: type, field: SettingField) -> None:
    setting = field.setting
    assert setting.help[0].isupper() or setting.help[0].isdigit()
    assert setting.help.endswith((".", "…"))
    assert bool(setting.unset) == field.optional, "unset says what None means"
    names = {other.name for other in setting_fields(settings)}
    assert set(re.findall(r"`(\w+)`", setting.help + setting.unset)) <= names
    assert f"    {field.name}: " in (settings.__doc__ or "")


@each_field
def test_what_no_setting_takes_is_one_typed_line(settings: type, field: SettingField) -> None:
    values: list[object] = [object(), {"a": 1}, b"a", float("nan"), ["a", None], 1 + 2j]
    for value in values:
        with pytest.raises(ERRORS.get(settings, ConfigError)) as caught:
            make(settings, **{field.name: value})
        message = str(caught.value)
        assert message.startswith(f"{field.name} must be {field.allowed}, not "), value
        assert "\n" not in message, value
        assert type(caught.value) is ERRORS.get(settings, ConfigError), value


@each_field
def test_none_is_taken_where_it_means_something(settings: type, field: SettingField) -> None:
    if field.optional:
        assert getattr(make(settings, **{field.name: None}), field.name) is None
    else:
        with pytest.raises(ERRORS.get(settings, ConfigError), match=f"^{field.name} must be .*, not None$"):
            make(settings, **{field.name: None})


NUMBERS = [(settings, field) for settings, field in FIELDS if field.type in (int, float)]


@pytest.mark.parametrize(
    ("settings", "field"), NUMBERS, ids=[f"{settings.__name__}.{field.name}" for settings, field in NUMBERS]
)
def test_numbers_are_bounded_and_of_python(settings: type, field: SettingField) -> None:
    setting = field.setting
    beyond = [float("inf"), -float("inf"), True, "1", np.bool_(True), np.nan]
    beyond += [] if setting.minimum is None else [setting.minimum - 1]
    beyond += [] if setting.above is None else [setting.above]
    beyond += [] if setting.maximum is None else [setting.maximum + 1, 10**5000]
    for value in beyond:
        with pytest.raises(ERRORS.get(settings, ConfigError), match=f"^{field.name} must be "):
            make(settings, **{field.name: value})
    needed = {"window": 8} if field.name == "sinks" else {}
    for value in (within(field), np.int32(within(field)), *([np.float32(within(field))] * (field.type is float))):
        taken = getattr(make(settings, **{field.name: value}, **needed), field.name)
        assert (taken, type(taken)) == (within(field), field.type)


@pytest.mark.parametrize("value", [2.0, np.float64(2.0), Fraction(2), "2", [2]])
def test_what_equals_an_integer_is_none(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^page_size must be an integer"):
        EngineConfig(page_size=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, 1, "no", 1.0, None])
def test_truth_values_are_bools(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^prefix_cache must be True or False, not "):
        EngineConfig(prefix_cache=value)  # type: ignore[arg-type]
    taken = EngineConfig(prefix_cache=np.bool_(False), cuda_graphs=np.bool_(True))  # type: ignore[arg-type]
    assert (taken.prefix_cache, taken.cuda_graphs) == (False, True)
    assert {type(taken.prefix_cache), type(taken.cuda_graphs)} == {bool}


@pytest.mark.parametrize("made", [CacheConfig(num_pages=3), EngineConfig(sinks=4, window=8), SamplingParams(top_k=2)])
def test_settings_are_values(made: Any) -> None:
    assert pickle.loads(pickle.dumps(made)) == made
    assert replace(made) == made
    name = setting_fields(type(made))[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(made, name, 1)
    with pytest.raises(RadixKVError, match=f"^{name} must be"):
        replace(made, **{name: []})


COUNTS: dict[str, Callable[[Any], object]] = {
    "page_size": RadixTree,
    "num_pages": TokenToKVPoolAllocator,
    "capacity_pages": EvictionHistory,
    "max_tokens": MissRatioCurve,
    "block_tokens": lambda value: MissRatioCurve(64, block_tokens=value),
    "sample_blocks": lambda value: MissRatioCurve(64, sample_blocks=value),
    "limit": lambda value: parse_trace([b'{"token_ids": [1]}'], "trace", limit=value),
    "seq_tokens": lambda value: KVShape((LayerKV(1, 8, 8),)).bytes_per_sequence(value, "bfloat16"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_checked_alike(name: str) -> None:
    for value in (0, -1, True, np.bool_(True), 2.5, "4"):
        with pytest.raises(
            ConfigError, match=rf"^{name} must be an integer of at least 1, not {re.escape(repr(value))}$"
        ):
            COUNTS[name](value)
    COUNTS[name](4)
    COUNTS[name](np.int64(4))


def test_a_cache_takes_sizes_of_numpy() -> None:
    cache = PrefixCache(np.int64(8), np.int32(4))  # type: ignore[arg-type]
    assert {type(cache.num_pages), type(cache.page_size)} == {int}
    with cache.acquire([1, 2, 3, 4]) as lease:
        lease.commit([1, 2, 3, 4])
    assert cache.peek([1, 2, 3, 4]) == 4
    cache.check_invariants()


def test_lists_are_kept_as_they_are_given() -> None:
    stop, stop_token_ids = ["a"], [1, np.int64(2)]
    params = SamplingParams(stop=stop, stop_token_ids=stop_token_ids)  # type: ignore[arg-type]
    assert params.stop is stop
    assert params.stop_token_ids is stop_token_ids


def test_every_eviction_policy_is_named() -> None:
    text = setting_field(EngineConfig, "eviction_policy").setting.help
    assert [word for word in re.findall(r"\w+", text) if word in POLICIES] == list(POLICIES)


def test_a_schema_has_names_types_units_bounds_and_defaults() -> None:
    schema = schema_of(SamplingParams)
    properties = schema["properties"]
    names = [field.name for field in setting_fields(SamplingParams)]
    assert list(properties) == [name for name in names if name != "logits_transform"], "a function is no JSON"
    assert schema["required"] == []
    assert schema_of(CacheConfig)["required"] == ["num_pages"]
    assert properties["max_tokens"] == {
        "type": "integer",
        "minimum": 0,
        "description": setting_field(SamplingParams, "max_tokens").setting.help,
        "x-unit": "tokens",
        "default": 128,
    }
    assert properties["logprobs"]["anyOf"] == [{"type": "integer", "minimum": 0, "maximum": 100}, {"type": "null"}]
    assert properties["stop_token_ids"]["items"] == {"type": "integer", "minimum": 0}
    assert properties["ignore_eos"]["type"] == "boolean"
    assert properties["logit_bias"]["anyOf"][0] == {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]+$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    }
    engine = schema_of(EngineConfig)["properties"]
    assert engine["schedule_policy"]["enum"] == ["lpm", "fcfs"]
    assert engine["mem_fraction"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}


def test_settings_load_nothing_heavy() -> None:
    code = (
        "import sys, radixkv.config\n"
        "loaded = {'torch', 'transformers', 'numba', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
