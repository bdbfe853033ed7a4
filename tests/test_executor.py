"""A step ahead of the tokens changes nothing but the time at which things are launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from drafters import Knowing
from oracles import GreedyOracle
from prompts import random_ids
from radixkv import Engine, SamplingParams
from radixkv.cache.lease import Lease
from radixkv.engine.drafts.speculation import Speculation
from radixkv.engine.gpu_sampling import DeviceSampler, PendingTokens, RowSampling
from radixkv.engine.step_input import StepInput
from runners import Around
from tiny_models import VOCAB_SIZE

GREEDY = SamplingParams(max_tokens=9)


class Ahead:
    """An engine whose executor launches ahead, as on a GPU, and a log of its launches."""

    def __init__(
        self,
        make_engine: Callable[..., Engine],
        around_ahead: Around | None,
        speculation: Speculation | None,
        settings: dict[str, object],
    ) -> None:
        self.launched_ahead = 0
        self._around_ahead = around_ahead
        parts = {"device_sampler": DeviceSampler(None, torch.device("cpu"), seed=0), "speculation": speculation}
        self.engine = make_engine(around=self._around, parts=parts, **settings)

    def _around(self, step: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if len(step.token_ids):
            return compute()
        self.launched_ahead += 1
        return compute() if self._around_ahead is None else self._around_ahead(step, compute)


@pytest.fixture
def make_ahead(make_engine: Callable[..., Engine]) -> Callable[..., Ahead]:
    return lambda around_ahead=None, speculation=None, **settings: Ahead(
        make_engine, around_ahead, speculation, settings
    )


def test_same_tokens(make_ahead: Callable[..., Ahead], oracle: GreedyOracle) -> None:
    ahead = make_ahead()
    prompts = [random_ids(seed, 6 + seed) for seed in range(5)]
    params = [SamplingParams(max_tokens=3 + 4 * seed) for seed in range(5)]
    outputs = ahead.engine.generate(prompts, params)
    for output, prompt, p in zip(outputs, prompts, params, strict=True):
        assert output.token_ids == oracle.continuation(prompt, p.max_tokens)
    assert ahead.launched_ahead > 8
    assert ahead.engine.stats().generated_tokens == sum(p.max_tokens for p in params)


class InTurns(Speculation):
    """Lets three steps in four be launched ahead of their tokens."""

    asked = 0

    @property
    def needs_tokens(self) -> bool:
        self.asked += 1
        return self.asked % 4 == 0


def test_same_tokens_with_drafts_now_and_then(make_ahead: Callable[..., Ahead], oracle: GreedyOracle) -> None:
    prompts = [random_ids(seed, 6 + seed) for seed in range(3)]
    expected = [oracle.continuation(prompt, 30) for prompt in prompts]
    knowing = Knowing(*[[*prompt, *answer] for prompt, answer in zip(prompts, expected, strict=True)], mistakes=0.8)
    ahead = make_ahead(speculation=InTurns(knowing, VOCAB_SIZE, always=True))
    stop = expected[1][11]
    params = [SamplingParams(max_tokens=30, stop_token_ids=[stop] if i == 1 else []) for i in range(3)]
    outputs = ahead.engine.generate(prompts, params)
    assert [outputs[0].token_ids, outputs[2].token_ids] == [expected[0], expected[2]]
    assert outputs[1].token_ids == expected[1][: expected[1].index(stop) + 1]
    assert ahead.launched_ahead > 0
    assert outputs[0].accepted_tokens > 0
    ahead.engine.check_invariants()


def test_a_stop_token_that_nobody_foresaw(make_ahead: Callable[..., Ahead], oracle: GreedyOracle) -> None:
    """The one that stops has a token computed in vain; the others keep theirs, and its pages are free."""
    ahead = make_ahead()
    prompts = [random_ids(seed, 8) for seed in range(3)]
    expected = [oracle.continuation(prompt, 9) for prompt in prompts]
    stop = expected[1][3]
    params = [SamplingParams(max_tokens=9, stop_token_ids=[stop] if i == 1 else []) for i in range(3)]
    outputs = ahead.engine.generate(prompts, params)
    assert [output.finish_reason for output in outputs] == ["length", "stop", "length"]
    assert outputs[1].token_ids == expected[1][: expected[1].index(stop) + 1]
    assert (outputs[0].token_ids, outputs[2].token_ids) == (expected[0], expected[2])
    ahead.engine.check_invariants()
    again = ahead.engine.generate(prompts, GREEDY)
    assert [output.token_ids for output in again] == expected, "nothing that was computed in vain is shared"


def test_a_small_pool_with_retractions(make_ahead: Callable[..., Ahead], oracle: GreedyOracle) -> None:
    ahead = make_ahead(kv_cache_tokens=72)
    prompts = [random_ids(seed, 9) for seed in range(4)]
    outputs = ahead.engine.generate(prompts, SamplingParams(max_tokens=20))
    assert [output.token_ids for output in outputs] == [oracle.continuation(prompt, 20) for prompt in prompts]
    assert ahead.engine.stats().retractions > 0


def test_aborted_between_launch_and_tokens(make_ahead: Callable[..., Ahead], oracle: GreedyOracle) -> None:
    ahead = make_ahead()
    first, second = (ahead.engine.stream(random_ids(seed, 7), SamplingParams(max_tokens=12)) for seed in (1, 2))
    pieces = [next(first), next(second), next(first), next(first)]
    assert ahead.launched_ahead > 0
    assert ahead.engine.abort(pieces[1].request_id)
    rest = [token for chunk in [pieces[0], *pieces[2:], *first] for token in chunk.token_ids]
    assert rest == oracle.continuation(random_ids(1, 7), 12)
    assert next(second).output.finish_reason == "abort"  # type: ignore[union-attr]


def test_all_aborted_between_launch_and_tokens(make_ahead: Callable[..., Ahead], oracle: GreedyOracle) -> None:
    ahead = make_ahead()
    stream = ahead.engine.stream(random_ids(1, 7), SamplingParams(max_tokens=12))
    next(stream), next(stream)
    stream.close()
    prompt = random_ids(2, 7)
    assert ahead.engine.generate(prompt, GREEDY)[0].token_ids == oracle.continuation(prompt, 9)


def test_a_new_request_joins_after_what_is_under_way(make_ahead: Callable[..., Ahead], oracle: GreedyOracle) -> None:
    ahead = make_ahead()
    stream = ahead.engine.stream(random_ids(1, 7), SamplingParams(max_tokens=12))
    chunks = [next(stream), next(stream)]
    prompt = random_ids(2, 7)
    assert ahead.engine.generate(prompt, GREEDY)[0].token_ids == oracle.continuation(prompt, 9)
    tokens = [token for chunk in [*chunks, *stream] for token in chunk.token_ids]
    assert tokens == oracle.continuation(random_ids(1, 7), 12)


@pytest.mark.parametrize("params", [{"logprobs": 2}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_what_needs_the_cpu_waits_for_it(
    make_ahead: Callable[..., Ahead], make_engine: Callable[..., Engine], params: dict[str, object]
) -> None:
    ahead, prompt = make_ahead(), random_ids(1, 7)
    (output,) = ahead.engine.generate(prompt, SamplingParams(max_tokens=6, **params))
    (expected,) = make_engine().generate(prompt, SamplingParams(max_tokens=6, **params))
    assert (output.token_ids, output.logprobs) == (expected.token_ids, expected.logprobs)
    assert ahead.launched_ahead == 0


def test_a_launch_ahead_that_fails_is_tried_again(make_ahead: Callable[..., Ahead], oracle: GreedyOracle) -> None:

    def out_of_memory(step: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        raise RuntimeError("out of memory")

    ahead = make_ahead(out_of_memory)
    prompts = [random_ids(seed, 7) for seed in range(2)]
    outputs = ahead.engine.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == [oracle.continuation(prompt, 9) for prompt in prompts]


def test_one_bad_row_ahead_fails_alone(make_ahead: Callable[..., Ahead], oracle: GreedyOracle) -> None:
    prompts = [random_ids(seed, 7) for seed in range(3)]

    def poisoned(step: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        logits = compute().clone()
        for row, request_id in enumerate(step.request_ids):
            if request_id == 1:
                logits[row] = torch.nan
        return logits

    ahead = make_ahead(poisoned)
    outputs = ahead.engine.generate(prompts, GREEDY)
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert outputs[0].token_ids == oracle.continuation(prompts[0], 9)


class LateSampler(DeviceSampler):
    """A device that tells of some steps only when their tokens are read that they have failed."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        super().__init__(None, torch.device("cpu"), seed=0)
        self._fails, self._num_steps = fails, 0

    def start(self, logits: torch.Tensor, rows: Sequence[RowSampling]) -> PendingTokens:
        pending = super().start(logits, rows)
        self._num_steps += 1
        if self._fails(self._num_steps):
            pending.read = self._told_late  # type: ignore[method-assign]
        return pending

    def _told_late(self) -> tuple[list[int], list[bool]]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("bad_step", [1, 2, 4, 7])
def test_a_step_of_which_the_device_tells_late_is_run_again_one_by_one(
    make_engine: Callable[..., Engine], oracle: GreedyOracle, bad_step: int
) -> None:
    engine = make_engine(parts={"device_sampler": LateSampler(lambda number: number == bad_step)})
    prompts = [random_ids(seed, 5 + seed) for seed in range(3)]
    outputs = engine.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == [oracle.continuation(prompt, 9) for prompt in prompts]
    engine.check_invariants()


def test_a_request_whose_steps_all_fail_late_ends_with_that_error(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(parts={"device_sampler": LateSampler(lambda number: True)})
    for num_prompts in (1, 2):
        for output in engine.generate([random_ids(seed, 5) for seed in range(num_prompts)], GREEDY):
            assert output.finish_reason == "error"
            assert "illegal memory access" in str(output.error)
    assert engine.stats().cache.total_tokens == 0, "what nobody knows to be right is not shared"


@pytest.mark.parametrize("at_end", [False, True])
def test_what_cannot_be_shared_costs_its_request_at_most(
    make_engine: Callable[..., Engine],
    oracle: GreedyOracle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    at_end: bool,
) -> None:
    """While the prompt is computed it fails; at its end the output is whole, and is given out."""
    prompts = [random_ids(seed, 12) for seed in range(3)]
    commit = Lease.commit

    def fails_for_one(lease: Lease, token_ids: NDArray[np.int32]) -> int:
        if token_ids[:12].tolist() == prompts[1] and (len(token_ids) > 12) == at_end:
            raise OSError("no room for it")
        return commit(lease, token_ids)

    monkeypatch.setattr(Lease, "commit", fails_for_one)
    engine = make_engine()
    outputs = engine.generate(prompts, GREEDY)
    expected = [oracle.continuation(prompt, 9) for prompt in prompts]
    assert [outputs[0].token_ids, outputs[2].token_ids] == [expected[0], expected[2]]
    if at_end:
        assert outputs[1].token_ids == expected[1]
        assert f"what request {outputs[1].request_id} computed cannot be shared" in caplog.text
    else:
        assert outputs[1].finish_reason == "error"
        assert isinstance(outputs[1].error, OSError)
