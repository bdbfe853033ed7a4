"""`RadixCache` with `disk_cache`: prefixes outlive cache and process, and tokens are those of a call without it."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from child_process import child_environment
from prompts import random_ids
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.errors import ClosedError, ConfigError, TierError
from radixkv.hf import RadixCache
from radixkv.memory.page_bytes import PageBytes
from radixkv.tiers.disk_store import DiskStore
from radixkv.tiers.load_choice import PrefillRate
from radixkv.tiers.page_store import FoundPage
from radixkv.tiers.writer import PageWriter
from stress_cases import some_of
from tiny_models import FAMILIES, REFUSED, tiny_model

NEW_TOKENS = 6
PROMPT = random_ids(1, 37)
STORED = len(PROMPT) + NEW_TOKENS - 1  # the last token of an output is not fed to the model
Rows = list[list[int]]


def endless(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    model = tiny_model(family, seed)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return endless()


def cache_of(model: PreTrainedModel, path: Path, **settings: Any) -> RadixCache:
    return RadixCache(
        model, **{"max_tokens": 512, "page_size": 4, "disk_cache": path, "disk_cache_gb": 0.01, **settings}
    )


def run(model: PreTrainedModel, rows: Rows, cache: RadixCache | None = None, **kwargs: Any) -> Tensor:
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    sequences: Tensor = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, past_key_values=cache, **kwargs
    )
    return sequences


def check(model: PreTrainedModel, rows: Rows, cache: RadixCache, **kwargs: Any) -> tuple[dict[str, int], ...]:
    """Check the tokens against those without a cache. Returns: where what was not computed was found."""
    assert torch.equal(run(model, rows, cache, **kwargs), run(model, rows, **kwargs))
    cache.check_invariants()
    assert tuple(sum(by.values()) for by in cache.cached_by) == cache.cached_tokens
    return cache.cached_by


def no_thread_is_left() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("radixkv-"):
            thread.join(30)
            assert not thread.is_alive(), f"{thread} is left"


# ------------------------------------------------------------------------------------------------------ what is found


@pytest.mark.parametrize("family", some_of([f for f in FAMILIES if f not in REFUSED], {"gemma3", "llama4"}))
def test_another_cache_on_the_path_gives_the_same_tokens_and_loads_from_disk(family: str, tmp_path: Path) -> None:
    model = endless(family)
    with cache_of(model, tmp_path / "kv") as cache:
        assert check(model, [PROMPT], cache) == ({"pool": 0, "disk": 0},)
    with cache_of(model, tmp_path / "kv") as cache:
        assert check(model, [PROMPT], cache) == ({"pool": 0, "disk": 36},)
        assert check(model, [PROMPT], cache) == ({"pool": 36, "disk": 0},)
        (tier,) = cache.stats().tiers
        assert (tier.name, tier.loaded_tokens, tier.loads) == ("disk", 36, 1)
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
    no_thread_is_left()


@pytest.mark.parametrize(
    ("page_size", "length"),
    [
        *((1, 41), (4, 16), (16, 1), (16, 41)),
        *(pytest.param(*pair, marks=pytest.mark.stress) for pair in ((1, 1), (1, 16), (4, 1), (4, 41), (16, 16))),
    ],
)
def test_hits_are_exact_to_the_token_at_every_page_size(
    llama: PreTrainedModel, tmp_path: Path, page_size: int, length: int
) -> None:
    prompt = random_ids(3, length)
    with cache_of(llama, tmp_path, page_size=page_size) as cache:
        run(llama, [prompt], cache)
    with cache_of(llama, tmp_path, page_size=page_size) as cache:
        assert check(llama, [prompt], cache) == ({"pool": 0, "disk": length - 1},)
        assert check(llama, [[*prompt[: length // 2 + 1], 5, 6, 7]], cache)[0]["pool"] >= length // 2


def test_what_was_generated_is_found_with_the_next_turn(llama: PreTrainedModel, tmp_path: Path) -> None:
    with cache_of(llama, tmp_path) as cache:
        (turn,) = run(llama, [PROMPT], cache).tolist()
    with cache_of(llama, tmp_path) as cache:
        assert check(llama, [[*turn, 7, 8, 9]], cache) == ({"pool": 0, "disk": STORED},)


def test_what_was_evicted_from_the_pages_is_loaded_again(llama: PreTrainedModel, tmp_path: Path) -> None:
    prompts = [random_ids(seed, 40) for seed in range(6)]
    with cache_of(llama, tmp_path, max_tokens=96) as cache:
        for prompt in prompts:
            assert check(llama, [prompt], cache) == ({"pool": 0, "disk": 0},)
        assert cache.flush(30)
        for prompt in prompts:
            (by,) = check(llama, [prompt], cache)
            assert sum(by.values()) == 39
        assert by["disk"] > 0
        assert cache.stats().evicted_tokens > 0


def test_a_sequence_longer_than_all_pages_is_loaded_in_part(llama: PreTrainedModel, tmp_path: Path) -> None:
    with cache_of(llama, tmp_path, max_tokens=512) as cache:
        run(llama, [random_ids(2, 100)], cache)
    with cache_of(llama, tmp_path, max_tokens=64) as cache:
        assert check(llama, [random_ids(2, 100)], cache) == ({"pool": 0, "disk": 64},)


@pytest.mark.filterwarnings("ignore:Passing `generation_config`")
@pytest.mark.parametrize("kwargs", [{"prompt_lookup_num_tokens": 3}, {"num_beams": 3}, {"assistant_model": None}])
def test_other_ways_to_decode_load_too(llama: PreTrainedModel, tmp_path: Path, kwargs: dict[str, Any]) -> None:
    kwargs = {name: value or endless(seed=1) for name, value in kwargs.items()}
    with cache_of(llama, tmp_path) as cache:
        run(llama, [PROMPT], cache, **kwargs)
    with cache_of(llama, tmp_path) as cache:
        assert check(llama, [PROMPT], cache, **kwargs)[0] == {"pool": 0, "disk": 36}


def test_a_part_in_the_pages_and_the_rest_on_disk(llama: PreTrainedModel, tmp_path: Path) -> None:
    with cache_of(llama, tmp_path) as cache:
        run(llama, [PROMPT], cache)
    with cache_of(llama, tmp_path) as cache:
        assert check(llama, [PROMPT[:19]], cache) == ({"pool": 0, "disk": 18},)
        assert check(llama, [PROMPT], cache) == ({"pool": 19, "disk": 17},)


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("family", some_of(["llama", "llama4"], {"llama4"}))
def test_a_padded_batch_loads_what_all_rows_can_use(family: str, tmp_path: Path) -> None:
    model = endless(family)
    rows = [random_ids(1, 40), random_ids(2, 31), random_ids(3, 40)]
    with cache_of(model, tmp_path) as cache:
        run(model, rows, cache)
    with cache_of(model, tmp_path) as cache:
        assert check(model, rows, cache) == tuple({"pool": 0, "disk": len(row) - 1} for row in rows)
    with cache_of(model, tmp_path) as cache:
        check(model, [rows[0], random_ids(9, 40)], cache)
        assert cache.stats().tiers[0].loads == 0, "one row has nothing, so nothing is skipped"


def test_a_common_prefix_is_loaded_once_for_all_rows(llama: PreTrainedModel, tmp_path: Path) -> None:
    common = random_ids(1, 80)
    with cache_of(llama, tmp_path) as cache:
        run(llama, [common], cache)
    with cache_of(llama, tmp_path) as cache:
        first, *others = check(llama, [[*common, seed, seed + 1] for seed in (5, 6, 7)], cache)
        assert first == {"pool": 0, "disk": 80}
        assert others == [{"pool": 80, "disk": 0}] * 2


def test_a_prompt_in_chunks_counts_what_it_loaded_once(llama: PreTrainedModel, tmp_path: Path) -> None:
    with cache_of(llama, tmp_path) as cache:
        run(llama, [PROMPT], cache)
    with cache_of(llama, tmp_path) as cache:
        (by,) = check(llama, [PROMPT], cache, prefill_chunk_size=16)
        assert by["disk"] > 0
        assert cache.stats().tiers[0].loaded_tokens <= 36


# ------------------------------------------------------------------------------------------------- faults of the disk


def payload_file(path: Path) -> Path:
    (found,) = path.glob("*/payloads")
    return found


def test_a_damaged_store_costs_hits_and_no_token(llama: PreTrainedModel, tmp_path: Path) -> None:
    with cache_of(llama, tmp_path) as cache:
        run(llama, [PROMPT], cache)
    file = payload_file(tmp_path)
    content = bytearray(file.read_bytes())
    for at in range(len(content) // 2, len(content), 64):
        content[at] ^= 0x40
    file.write_bytes(content)
    with cache_of(llama, tmp_path) as cache:
        (by,) = check(llama, [PROMPT], cache)
        assert by["disk"] < 36
        assert cache.stats().tiers[0].missed == 1
    with cache_of(llama, tmp_path) as cache:
        assert check(llama, [PROMPT], cache) == ({"pool": 0, "disk": 36},), "what was damaged is written anew"


def test_a_store_that_fails_costs_hits_and_no_call(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with cache_of(llama, tmp_path) as cache:
        run(llama, [PROMPT], cache)

    def fail(self: DiskStore, pages: Sequence[FoundPage]) -> list[bytes | None]:
        raise OSError("input/output error")

    monkeypatch.setattr(DiskStore, "read", fail)
    with cache_of(llama, tmp_path) as cache:
        assert check(llama, [PROMPT], cache) == ({"pool": 0, "disk": 0},)
        assert cache.stats().tiers[0].read_errors == 1
    assert "input/output error" in caplog.text


def test_a_store_that_hangs_is_waited_for_only_so_long(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cache_of(llama, tmp_path) as cache:
        run(llama, [PROMPT], cache)
    read, let_go = DiskStore.read, threading.Event()

    def hang(self: DiskStore, pages: Sequence[FoundPage]) -> list[bytes | None]:
        let_go.wait(60)
        return read(self, pages)

    monkeypatch.setattr(DiskStore, "read", hang)
    monkeypatch.setattr("radixkv.tiers.prefix_load.MOST_SILENCE_S", 0.05)
    with cache_of(llama, tmp_path) as cache:
        assert check(llama, [PROMPT], cache) == ({"pool": 0, "disk": 0},)
        assert cache.stats().tiers[0].given_up == 1
        check(llama, [random_ids(1, 20)], cache)
        let_go.set()


def test_a_disk_slower_than_computing_is_left_alone(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [random_ids(seed, 40) for seed in (1, 2)]
    with cache_of(llama, tmp_path) as cache:
        for prompt in others:
            run(llama, [prompt], cache)
    with cache_of(llama, tmp_path) as cache:
        assert check(llama, [others[0]], cache) == ({"pool": 0, "disk": 39},), "nothing is known yet, so it is tried"
        monkeypatch.setattr(PrefillRate, "seconds", lambda *_: 0.0)
        assert check(llama, [others[1]], cache) == ({"pool": 0, "disk": 0},)
        (tier,) = cache.stats().tiers
        assert (tier.slower, tier.is_slow) == (1, True)


def test_how_long_prompts_take_is_learned(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[tuple[int, int]] = []
    monkeypatch.setattr(PrefillRate, "record", lambda _, first, last, seconds: noted.append((first, last)))
    with cache_of(llama, tmp_path) as cache:
        run(llama, [PROMPT], cache)
        run(llama, [[*PROMPT[:20], 5, 6]], cache)
        assert noted == [(0, 37), (20, 22)]


# ------------------------------------------------------------------------------------------ whose store, and its end


def test_a_second_cache_on_the_path_is_refused_while_the_first_lives(llama: PreTrainedModel, tmp_path: Path) -> None:
    with cache_of(llama, tmp_path), pytest.raises(TierError, match="one engine at a time owns a store"):
        cache_of(llama, tmp_path)
    cache_of(llama, tmp_path).close()


def test_a_cache_that_was_dropped_lets_go_of_its_store(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache = cache_of(llama, tmp_path)
    run(llama, [PROMPT], cache)
    del cache
    gc.collect()
    no_thread_is_left()
    with cache_of(llama, tmp_path) as cache:
        assert check(llama, [PROMPT], cache) == ({"pool": 0, "disk": 36},)


def test_a_forked_child_leaves_the_store_to_its_parent(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cache_of(llama, tmp_path) as cache:
        run(llama, [PROMPT], cache)
    with cache_of(llama, tmp_path) as cache:
        with monkeypatch.context() as child:
            child.setattr("os.getpid", lambda: 1)
            assert check(llama, [PROMPT], cache) == ({"pool": 0, "disk": 0},)
            assert check(llama, [PROMPT, random_ids(4, 37)], cache)[0] == {"pool": 0, "disk": 0}
            assert cache.flush()
        (tier,) = cache.stats().tiers
        assert (tier.loads, tier.queued_bytes, tier.written_pages, tier.read_errors) == (0, 0, 0, 0)


def test_what_the_writers_queue_had_no_room_for_is_written_as_the_cache_is_closed(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PageWriter.__init__.__kwdefaults__, "max_queued_bytes", 1)  # a page at a time
    with cache_of(llama, tmp_path) as cache:
        run(llama, [PROMPT], cache)
        assert cache.stats().tiers[0].dropped_pages > 0
    with cache_of(llama, tmp_path) as cache:
        assert check(llama, [PROMPT], cache) == ({"pool": 0, "disk": 36},)


def test_a_closed_cache_serves_no_call(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache = cache_of(llama, tmp_path)
    run(llama, [PROMPT], cache)
    cache.close()
    cache.close()
    assert cache.stats().pool_bytes == 0
    with pytest.raises(ClosedError, match="the RadixCache was closed; make a new one"):
        run(llama, [PROMPT], cache)
    with RadixCache(llama, max_tokens=64) as plain:
        assert check(llama, [PROMPT], plain) == ({"pool": 0},)


UNCLOSED = """
import torch
from radixkv.hf import RadixCache
from tiny_models import tiny_model
model = tiny_model("llama")
model.generation_config.eos_token_id = None
cache = RadixCache(model, max_tokens=512, page_size=4, disk_cache=PATH, disk_cache_gb=0.01)
print(model.generate(torch.tensor([PROMPT]), past_key_values=cache, do_sample=False, max_new_tokens=6).tolist())
"""


@pytest.mark.stress
def test_another_process_finds_what_one_left_that_closed_nothing(llama: PreTrainedModel, tmp_path: Path) -> None:
    code = UNCLOSED.replace("PATH", repr(str(tmp_path))).replace("PROMPT", repr(PROMPT))
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=300, env=child_environment(), capture_output=True, text=True
    )
    with cache_of(llama, tmp_path) as cache:
        assert check(llama, [PROMPT], cache) == ({"pool": 0, "disk": 36},)
    assert done.stdout.strip() == str(run(llama, [PROMPT]).tolist())


def test_other_weights_find_nothing_also_after_reset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = endless(seed=1)
    with cache_of(model, tmp_path) as cache:
        run(model, [PROMPT], cache)
        cache.reset()
        assert check(model, [PROMPT], cache) == ({"pool": 0, "disk": 36},), "the same weights"
        cache.reset()
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(1.5)
        assert check(model, [PROMPT], cache) == ({"pool": 0, "disk": 0},)
        assert "weights" in caplog.text
        cache.reset()
        with torch.no_grad():
            model.model.embed_tokens.weight.div_(1.5)
        assert check(model, [PROMPT], cache)[0]["disk"] in (0, 36), "rounding may have made yet others"


def test_weights_that_change_between_calls_are_noticed_without_reset(tmp_path: Path) -> None:
    model = endless(seed=1)
    with cache_of(model, tmp_path) as cache, RadixCache(model, max_tokens=512, page_size=4) as plain:
        for each in (cache, plain):
            run(model, [PROMPT], each)
        changes: list[Callable[[], object]] = [
            lambda: model.model.embed_tokens.weight.mul_(1.5),
            lambda: model.load_state_dict(endless(seed=2).state_dict()),
            lambda: model.to(torch.bfloat16),
            lambda: setattr(model.model.norm, "weight", torch.nn.Parameter(2 * model.model.norm.weight)),
        ]
        for change in changes:
            with torch.no_grad():
                change()
            for each in (cache, plain):
                assert sum(check(model, [PROMPT], each)[0].values()) == 0
                assert sum(check(model, [PROMPT], each)[0].values()) == 36
    with cache_of(model, tmp_path) as cache:
        assert check(model, [PROMPT], cache)[0]["disk"] == 36, "what is on disk is of the last weights"


def test_a_cache_is_neither_copied_nor_pickled(llama: PreTrainedModel, tmp_path: Path) -> None:
    with cache_of(llama, tmp_path) as cache:
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="a RadixCache cannot be copied or pickled; make another one"):
                copied(cache)
        assert check(llama, [PROMPT], cache) == ({"pool": 0, "disk": 0},)


@pytest.mark.parametrize("path", ["a\0b", "half \ud800 of a pair"])
def test_a_path_that_no_folder_can_have_is_refused(llama: PreTrainedModel, path: str) -> None:
    with pytest.raises(TierError, match=r"the store '.*' cannot be opened: "):
        cache_of(llama, Path(path))


def test_models_and_settings_that_cannot_be_served_are_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    adapter = type("Linear", (torch.nn.Identity,), {"__module__": "peft.tuners.lora.layer"})
    model = endless()
    model.model.norm = torch.nn.Sequential(model.model.norm, adapter())
    with pytest.raises(ConfigError, match="without adapters; merge these into the weights"):
        cache_of(model, tmp_path)
    with pytest.raises(ConfigError, match=r"disk_cache_gb must be a number in \(0, 1000000\], not 0"):
        cache_of(llama, tmp_path, disk_cache_gb=0)
    with pytest.raises(ConfigError, match="disk_cache must be the path of a folder, or None, not 3"):
        cache_of(llama, tmp_path, disk_cache=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(TierError, match="a store is a folder"):
        cache_of(llama, tmp_path / "file")
    with pytest.raises(ConfigError):
        cache_of(llama, tmp_path / "small", disk_cache_gb=1e-9)
    cache_of(llama, tmp_path / "kv").close()


def test_an_engine_and_a_cache_of_the_same_pages_find_what_the_other_computed(tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    config = EngineConfig(
        page_size=4, kv_cache_tokens=256, disk_cache=str(tmp_path), disk_cache_gb=0.01, warm_start_share=0
    )
    model, others = endless(), random_ids(2, 30)
    with Engine(tiny_model("llama"), None, config) as engine:
        (output,) = engine.generate(PROMPT, params)
        layout = PageBytes(engine.pool).layout  # type: ignore[arg-type]
    with cache_of(model, tmp_path) as cache:
        shared = PageBytes(cache.store.pool).layout == layout  # as the backend of this machine lays pages out
        assert check(model, [PROMPT], cache) == ({"pool": 0, "disk": 36 if shared else 0},)
        assert run(model, [PROMPT])[0, len(PROMPT) :].tolist() == output.token_ids
        run(model, [others], cache)
    with Engine(tiny_model("llama"), None, config) as engine:
        (output,) = engine.generate(others, params)
    assert dict(output.cached_by).get("disk", 0) == (29 if shared else 0)
    assert output.token_ids == run(model, [others])[0, len(others) :].tolist()
