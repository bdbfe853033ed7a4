"""The settings of the tiers, on real stores."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from child_process import child_environment
from oracles import oracle_of
from prompts import random_ids
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.errors import ConfigError, TierError
from radixkv.tiers import fingerprint
from radixkv.tiers.ending import close_at_exit
from tiny_models import served_model, tiny_model

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
PROMPT = random_ids(1, 37)


def make_engine(path: Path, family: str = "llama", **settings: Any) -> Engine:
    keywords = {"page_size": 4, "kv_cache_tokens": 256, "disk_cache": str(path), "disk_cache_gb": 0.01, **settings}
    return Engine(served_model(family), None, EngineConfig(**keywords))


def test_an_engine_on_the_same_path_finds_what_the_one_before_computed(tmp_path: Path) -> None:
    for cached_tokens in (0, 36):
        with make_engine(tmp_path / "kv") as engine:
            (output,) = engine.generate(PROMPT, PARAMS)
            engine.check_invariants()
        assert output.token_ids == oracle_of("llama").continuation(PROMPT, 6)
        assert output.cached_tokens == cached_tokens
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700


def test_a_second_engine_on_the_same_path_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with make_engine(tmp_path), pytest.raises(TierError):
        make_engine(tmp_path)
    make_engine(tmp_path).close()


def test_an_engine_that_was_dropped_lets_go_of_its_store(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, warm_start_share=0.5)
    engine.generate(PROMPT, PARAMS)
    del engine
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("radixkv-"):
            thread.join(30)
            assert not thread.is_alive()
    with make_engine(tmp_path) as engine:
        assert engine.generate(PROMPT, PARAMS)[0].cached_tokens == 36


def test_files_of_weights_are_read_once_for_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"disk_cache": str(tmp_path / "kv"), "disk_cache_gb": 0.01, "kv_cache_tokens": 1024}
    with Engine.from_pretrained("demo", **settings) as engine:
        engine.generate("ROMEO:\n" * 8, PARAMS)
    monkeypatch.setattr(fingerprint, "_hash_file", lambda *_: pytest.fail("a file was read again"))
    with Engine.from_pretrained("demo", **settings) as engine:
        assert engine.generate("ROMEO:\n" * 8, PARAMS)[0].cached_tokens > 0


def test_a_model_with_adapters_is_refused(tmp_path: Path) -> None:
    layer = type("Linear", (torch.nn.Identity,), {"__module__": "peft.tuners.lora.layer"})
    model = tiny_model("llama")
    model.model.norm = torch.nn.Sequential(model.model.norm, layer())
    with pytest.raises(ConfigError, match="without adapters; merge these into the weights"):
        Engine(model, None, EngineConfig(page_size=4, kv_cache_tokens=256, disk_cache=str(tmp_path)))


def test_other_weights_find_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with make_engine(tmp_path) as engine:
        engine.generate(PROMPT, PARAMS)
    config = EngineConfig(page_size=4, kv_cache_tokens=256, disk_cache=str(tmp_path), disk_cache_gb=0.01)
    with Engine(tiny_model("llama", seed=1), None, config) as engine:
        (output,) = engine.generate(PROMPT, PARAMS)
        assert output.cached_tokens == 0
    assert output.token_ids == oracle_of("llama", 1).continuation(PROMPT, 6)
    assert "weights" in caplog.text


@pytest.mark.parametrize("settings", [{"page_size": 8}, {"kv_cache_dtype": "int8", "page_size": 16}])
def test_pages_of_another_kind_are_another_store(tmp_path: Path, settings: dict[str, Any]) -> None:
    with make_engine(tmp_path) as engine:
        engine.generate(PROMPT, PARAMS)
    with make_engine(tmp_path, **settings) as engine:
        assert engine.generate(PROMPT, PARAMS)[0].cached_tokens == 0
        assert engine.generate(PROMPT, PARAMS)[0].cached_tokens == 36


def test_settings_that_cannot_be_met_say_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are not for window="):
        make_engine(tmp_path, window=8)
    with pytest.raises(ConfigError, match='must be "through" or "selective" for models with layers that see a window'):
        make_engine(tmp_path, "gemma3", tier_writes="back")
    with pytest.raises(ConfigError, match="on the CPU the pool is host memory itself, so raise kv_cache_tokens"):
        make_engine(tmp_path, host_cache_gb=1.0)
    with pytest.raises(ConfigError, match="leave out prefix_cache=False"):
        EngineConfig(disk_cache=str(tmp_path), prefix_cache=False)
    with pytest.raises(ConfigError, match="tier_writes must be one of through, selective, back"):
        EngineConfig(tier_writes="never")  # type: ignore[arg-type]
    make_engine(tmp_path).close()


@pytest.mark.parametrize("is_kept", [True, False])
def test_at_the_end_of_the_process_what_nobody_closed_is_written(tmp_path: Path, is_kept: bool) -> None:
    engines = [make_engine(tmp_path)]
    engines[0].generate(PROMPT, PARAMS)
    if not is_kept:
        engines.clear()
        gc.collect()
    close_at_exit()
    with make_engine(tmp_path) as engine:
        assert engine.generate(PROMPT, PARAMS)[0].cached_tokens == 36


UNCLOSED = """
from radixkv import Engine, EngineConfig, SamplingParams
from tiny_models import tiny_model
config = EngineConfig(page_size=4, kv_cache_tokens=256, disk_cache=PATH, disk_cache_gb=0.01)

def main():
    engine = Engine(tiny_model("llama"), None, config)
    engine.generate(PROMPT, SamplingParams(max_tokens=6, ignore_eos=True))
    return engine

KEPT
"""


@pytest.mark.stress
@pytest.mark.parametrize("kept", ["engine = main()", "main()"])
def test_an_engine_that_nobody_closed_writes_what_is_left_as_its_process_ends(tmp_path: Path, kept: str) -> None:
    code = UNCLOSED.replace("PATH", repr(str(tmp_path))).replace("PROMPT", repr(PROMPT)).replace("KEPT", kept)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=child_environment())
    with make_engine(tmp_path) as engine:
        (output,) = engine.generate(PROMPT, PARAMS)
    assert output.cached_tokens == 36
    assert output.token_ids == oracle_of("llama").continuation(PROMPT, 6)
