"""The engine for asyncio: the oracle's tokens, cancellation is abort, and nobody waits for what has failed."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from oracles import GreedyOracle
from prompts import random_ids
from radixkv import AsyncEngine, EngineConfig, Progress, RequestOutput, SamplingParams, Usage
from radixkv.engine.arguments import CacheOptions
from radixkv.engine.assembly import EngineParts, assemble
from radixkv.engine.async_engine import SHORT_CHARACTERS
from radixkv.engine.core import EngineCore
from radixkv.engine.results import Outbox
from radixkv.engine.step_input import StepInput
from radixkv.errors import (
    ClosedError,
    ConfigError,
    EngineFailedError,
    InvalidRequestError,
    InvariantError,
    MissingTokenizerError,
    QueueFullError,
)
from runners import Around, TamperedRunner
from tiny_models import served_model

GREEDY_8 = SamplingParams(max_tokens=8, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=800, ignore_eos=True)
Compute = Callable[[], torch.Tensor]


def make_parts(around: Around | None = None, **settings: object) -> EngineParts:
    config = EngineConfig(**{"page_size": 4, "kv_cache_tokens": 1024, **settings})
    parts = assemble(served_model("llama"), None, config)
    return parts if around is None else replace(parts, runner=TamperedRunner(parts.runner, around))


def run(
    use: Callable[[AsyncEngine], Coroutine[Any, Any, None]],
    around: Around | None = None,
    max_waiting: int = 100,
    **settings: object,
) -> None:
    """Run `use` with an engine, and prove in the end that it holds nothing."""

    async def main() -> None:
        async with AsyncEngine.from_parts(make_parts(around, **settings), max_waiting=max_waiting) as engine:
            await use(engine)
            await check_idle(engine)

    asyncio.run(main())


async def check_idle(engine: AsyncEngine) -> None:
    await engine.check_invariants()
    await engine.reset_cache()
    stats = await engine.stats()
    assert (stats.running, stats.waiting, stats.cache.num_leases) == (0, 0, 0)
    assert stats.free_pages == stats.cache.num_pages


def test_many_coroutines_get_the_oracles_tokens(oracle: GreedyOracle) -> None:
    head = random_ids(0, 20)
    prompts = [[*head, *random_ids(seed, 1 + seed)] for seed in range(1, 13)]

    async def streamed(engine: AsyncEngine, prompt: list[int]) -> list[int]:
        return [token_id async for piece in engine.stream(prompt, GREEDY_8) for token_id in piece.token_ids]

    async def use(engine: AsyncEngine) -> None:
        generated, *streams = await asyncio.gather(
            engine.generate(prompts[:6], GREEDY_8), *(streamed(engine, prompt) for prompt in prompts[6:])
        )
        found = [*(output.token_ids for output in generated), *streams]
        assert found == [oracle.continuation(prompt, 8) for prompt in prompts]

    run(use)


def test_pieces_that_are_consumed_are_not_given(oracle: GreedyOracle) -> None:
    prompt = random_ids(3, 9)

    async def use(engine: AsyncEngine) -> None:
        consumed: list[Progress] = []
        pieces: list[Progress] = []

        def consume(progress: Progress) -> bool:
            takes = len(pieces) % 2 == 0
            if takes:
                consumed.append(progress)
                pieces.append(progress)
            return takes

        given = []
        async for piece in engine.stream(prompt, GREEDY_8, consume=consume):
            given.append(piece)
            pieces.append(piece)
        assert [token_id for piece in pieces for token_id in piece.token_ids] == oracle.continuation(prompt, 8)
        assert consumed[0].usage is not None, "the first piece is awaited, so it is offered"
        assert [piece.output is not None for piece in given][-1]
        assert all(piece.output is None for piece in consumed)

    run(use)


def test_what_consuming_raises_ends_the_stream() -> None:
    def consume(progress: Progress) -> bool:
        raise LookupError("not this one")

    async def use(engine: AsyncEngine) -> None:
        with pytest.raises(LookupError, match="not this one"):
            async for _ in engine.stream(random_ids(1, 9), ENDLESS, consume=consume):
                pass
        assert (await engine.stats()).running == 0

    run(use)


def test_outputs_are_reported_as_they_end() -> None:
    reported: list[RequestOutput] = []

    async def use(engine: AsyncEngine) -> None:
        params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 3, 6)]
        outputs = await engine.generate([random_ids(i, 5) for i in range(3)], params, on_finish=reported.append)
        assert reported == [outputs[1], outputs[2], outputs[0]]

    run(use)


def test_cancelling_a_task_aborts_its_requests() -> None:
    async def use(engine: AsyncEngine) -> None:
        task = asyncio.create_task(engine.generate([random_ids(i, 9) for i in range(3)], ENDLESS))
        async for _ in engine.stream(random_ids(9, 5), GREEDY_8):
            pass  # steps go by
        assert (await engine.stats()).running == 3
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await engine.stats()).running == 0

    run(use, kv_cache_tokens=8192)


def test_leaving_a_stream_aborts_it() -> None:
    async def use(engine: AsyncEngine) -> None:
        closed, dropped = (engine.stream(random_ids(i, 9), ENDLESS) for i in range(2))
        await anext(closed)
        await anext(dropped)
        assert (await engine.stats()).running == 2
        await closed.aclose()
        del dropped
        gc.collect()
        await asyncio.sleep(0)  # lets the loop close what was dropped
        await asyncio.sleep(0)
        assert (await engine.stats()).running == 0
        engine.stream(random_ids(3, 9), ENDLESS)  # never started

    run(use)


def test_abort_by_id_gives_the_reader_what_there_is(oracle: GreedyOracle) -> None:
    async def use(engine: AsyncEngine) -> None:
        stream = engine.stream(random_ids(1, 9), ENDLESS)
        first = await anext(stream)
        ids = first.token_ids
        assert await engine.abort(first.request_id)
        last = first
        async for last in stream:
            ids += last.token_ids
        assert last.output is not None
        assert last.output.finish_reason == "abort"
        assert ids == last.output.token_ids == oracle.continuation(random_ids(1, 9), len(ids))
        assert not await engine.abort(first.request_id), "it has ended"

    run(use)


def test_the_first_progress_says_what_the_request_used_so_far() -> None:
    prompt = random_ids(2, 50)

    async def use(engine: AsyncEngine) -> None:
        (before,) = await engine.generate([prompt[:30]], GREEDY_8)
        assert before.cached_tokens == 0
        progress = [piece async for piece in engine.stream(prompt, replace(GREEDY_8, n=2))]
        told = [(piece.choice_index, piece.usage) for piece in progress if piece.usage is not None]
        ((choice, usage),) = told
        first = next(piece for piece in progress if piece.choice_index == 0)
        output = next(piece.output for piece in progress if piece.output is not None and piece.choice_index == 0)
        assert choice == 0
        assert usage is first.usage
        assert (usage.prompt_tokens, usage.cached_tokens) == (50, output.cached_tokens)
        assert 28 <= usage.cached_tokens <= 30
        assert 0 < usage.cache_write_tokens <= output.cache_write_tokens
        assert usage.output_tokens == len(first.token_ids)

    run(use)


def test_a_reader_that_is_late_gets_everything(oracle: GreedyOracle) -> None:
    async def use(engine: AsyncEngine) -> None:
        stream = engine.stream(random_ids(1, 9), SamplingParams(max_tokens=30, ignore_eos=True))
        ids = (await anext(stream)).token_ids
        while (await engine.stats()).running:
            pass
        pieces = [piece async for piece in stream]
        assert len(pieces) < 29, "what was not taken is joined"
        assert ids + [i for piece in pieces for i in piece.token_ids] == oracle.continuation(random_ids(1, 9), 30)

    run(use)


@pytest.fixture
def checks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are checked in the loop's own thread: a task has queued its requests once it was run for the first time.

    Else they could come, on a busy machine, after what they are meant to wait for has ended.
    """

    async def call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords)

    monkeypatch.setattr(asyncio, "to_thread", call)


def test_progress_that_was_not_taken_is_joined_with_what_it_used() -> None:
    outbox = Outbox()
    outbox.put(Progress(1, [5], "a", None, usage=Usage(9, 4, 5, 1)))
    outbox.put(Progress(1, [6, 7], "bc", None))
    assert outbox.take() == Progress(1, [5, 6, 7], "abc", None, usage=Usage(9, 4, 5, 3))


@pytest.mark.usefixtures("checks_at_once")
def test_a_full_queue_refuses_and_recovers() -> None:
    goes_on = threading.Event()

    def held(step: StepInput, compute: Compute) -> torch.Tensor:
        logits = compute()
        if begun.is_set():
            goes_on.wait(60)
        return logits

    begun = threading.Event()

    async def use(engine: AsyncEngine) -> None:
        with pytest.raises(QueueFullError, match="at most 3 requests may wait; 0 do, and 4 more were given"):
            await engine.generate([random_ids(i, 5) for i in range(4)], GREEDY_8)
        running = engine.stream(random_ids(1, 9), ENDLESS)
        await anext(running)
        begun.set()
        waiting = [asyncio.create_task(engine.generate(random_ids(i, 5), GREEDY_8)) for i in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="3 do, and 1 more were given"):
            await anext(engine.stream(random_ids(5, 5), GREEDY_8))
        goes_on.set()
        await running.aclose()
        assert [len(outputs[0].token_ids) for outputs in await asyncio.gather(*waiting)] == [8] * 3

    run(use, held, max_waiting=3, max_running_requests=1)


def test_one_request_fails_alone(oracle: GreedyOracle) -> None:
    def fails_for_the_second(step: StepInput, compute: Compute) -> torch.Tensor:
        if {1, 3} & set(step.request_ids):
            raise RuntimeError("a worn bit")
        return compute()

    async def use(engine: AsyncEngine) -> None:
        prompts = [random_ids(seed, 12) for seed in range(3)]
        outputs = await engine.generate(prompts, GREEDY_8)
        assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
        assert outputs[2].token_ids == oracle.continuation(prompts[2], 8)
        with pytest.raises(RuntimeError, match="worn"):
            async for _ in engine.stream(prompts[1], GREEDY_8):
                pass

    run(use, fails_for_the_second)


@pytest.mark.usefixtures("checks_at_once")
def test_what_ends_the_core_reaches_everybody_who_waits() -> None:
    class Worn(BaseException):
        """No request's own error: nothing but the thread's end can follow."""

    broken = threading.Event()

    def breaks(step: StepInput, compute: Compute) -> torch.Tensor:
        if broken.is_set():
            raise Worn("the machine is worn")
        return compute()

    async def main() -> None:
        engine = AsyncEngine.from_parts(make_parts(breaks))
        stream = engine.stream(random_ids(1, 9), ENDLESS)
        await anext(stream)
        waiting = [asyncio.create_task(engine.generate(random_ids(i, 5), ENDLESS)) for i in range(3)]
        while (await engine.stats()).running < 4:
            pass
        broken.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        with pytest.raises(EngineFailedError):
            async for _ in stream:
                pass
        assert [type(result) for result in results] == [EngineFailedError] * 3
        assert "Worn: the machine is worn" in str(results[0])
        assert isinstance(results[0].__cause__, Worn)
        for use in (engine.generate([1, 2], GREEDY_8), engine.stats(), anext(engine.stream([1, 2], GREEDY_8))):
            with pytest.raises(EngineFailedError, match="must be made anew"):
                await use
        await engine.close()

    asyncio.run(main())


@pytest.mark.usefixtures("checks_at_once")
def test_closing_gives_readers_what_there_is_and_refuses_the_rest() -> None:
    async def main() -> None:
        engine = AsyncEngine.from_parts(make_parts())
        stream = engine.stream(random_ids(1, 9), ENDLESS)
        await anext(stream)
        task = asyncio.create_task(engine.generate(random_ids(2, 5), ENDLESS))
        while (await engine.stats()).running < 2:
            pass
        await engine.close()
        await engine.close()
        assert [output.finish_reason for output in await task] == ["abort"]
        last = [piece async for piece in stream][-1]
        assert last.output is not None
        assert last.output.finish_reason == "abort"
        for use in (engine.generate([1, 2], GREEDY_8), engine.stats(), engine.abort(0), engine.reset_cache()):
            with pytest.raises(ClosedError, match="the engine was closed; make a new one"):
                await use

    asyncio.run(main())


def test_event_loops_of_two_threads_share_one_engine(oracle: GreedyOracle) -> None:
    engine = AsyncEngine.from_parts(make_parts())
    found: dict[int, list[int]] = {}

    async def use(seed: int) -> None:
        for turn in range(3):
            (output,) = await engine.generate(random_ids(seed + turn, 9), GREEDY_8)
            found[seed + turn] = output.token_ids

    threads = [threading.Thread(target=lambda seed=seed: asyncio.run(use(seed))) for seed in (10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: oracle.continuation(random_ids(seed, 9), 8) for seed in (10, 11, 12, 20, 21, 22)}
    asyncio.run(check_idle(engine))
    asyncio.run(engine.close())


def test_a_loop_that_is_gone_leaves_nothing_behind() -> None:
    engine = AsyncEngine.from_parts(make_parts(kv_cache_tokens=8192))
    loop = asyncio.new_event_loop()
    stream = engine.stream(random_ids(1, 9), ENDLESS)
    loop.run_until_complete(anext(stream))
    loop.close()
    asyncio.run(abandoned(engine))
    asyncio.run(engine.close())
    del stream


async def abandoned(engine: AsyncEngine) -> None:
    while (await engine.stats()).running:
        pass
    await check_idle(engine)


def test_bad_arguments_are_refused_at_once() -> None:
    async def use(engine: AsyncEngine) -> None:
        for prompt in ([], [random_ids(1, 5), []]):
            with pytest.raises(InvalidRequestError):
                await engine.generate(prompt, GREEDY_8)
        with pytest.raises(InvalidRequestError, match="priority must be an integer, not 'high'"):
            engine.stream([1, 2], GREEDY_8, priority="high")  # type: ignore[arg-type]

    run(use)
    with pytest.raises(ConfigError, match="max_waiting must be an integer of at least 1, not 0"):
        AsyncEngine.from_parts(make_parts(), max_waiting=0)


def test_a_step_says_once_that_it_computes() -> None:
    core = EngineCore(make_parts())
    intake = make_parts().new_intake()
    for request in intake.make(torch.arange(9).numpy().astype("int32"), GREEDY_8, CacheOptions(), streams=True):
        core.add(request)
    said: list[int] = []
    while core.has_work:
        core.step(lambda: said.append(len(said)))
    assert len(said) == core.stats().steps == 8
    core.step(lambda: said.append(len(said)))
    assert len(said) == 8, "a step with nothing to compute"
    core.close()


def test_what_a_step_brought_is_handed_over_while_the_next_one_computes() -> None:
    read = [threading.Event() for _ in range(8)]

    def waits_for_the_reader(step: StepInput, compute: Compute) -> torch.Tensor:
        first = int(step.layout.positions[0])
        assert first == 0 or read[first - 9].wait(60), "the token of the step before was not handed over"
        return compute()

    async def use(engine: AsyncEngine) -> None:
        num_tokens = 0
        async for piece in engine.stream(random_ids(1, 9), GREEDY_8):
            for _ in piece.token_ids:
                read[num_tokens].set()
                num_tokens += 1
        assert num_tokens == 8

    run(use, waits_for_the_reader)


def test_what_an_operation_raises_reaches_who_waits_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch, oracle: GreedyOracle
) -> None:
    async def use(engine: AsyncEngine) -> None:
        def fails(core: EngineCore) -> None:
            raise InvariantError("a page is lost")

        with monkeypatch.context() as patch:
            patch.setattr(EngineCore, "check_invariants", fails)
            with pytest.raises(InvariantError, match="a page is lost"):
                await engine.check_invariants()
        (output,) = await engine.generate(random_ids(1, 9), GREEDY_8)
        assert output.token_ids == oracle.continuation(random_ids(1, 9), 8)

    run(use)


def test_an_operation_that_nobody_waits_for_any_more_is_left_out() -> None:
    step, go_on = threading.Event(), threading.Event()

    def waits(_: StepInput, compute: Compute) -> torch.Tensor:
        step.set()
        assert go_on.wait(60)
        return compute()

    async def use(engine: AsyncEngine) -> None:
        asked = asyncio.create_task(engine.generate(random_ids(1, 9), GREEDY_8))
        await asyncio.to_thread(step.wait, 60)
        reset = asyncio.create_task(engine.reset_cache())  # while the thread is amid a step
        await asyncio.sleep(0)
        reset.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reset
        go_on.set()
        await asked
        assert (await engine.stats()).cache.total_tokens > 0

    run(use, waits)


@pytest.mark.parametrize("cleanup", ["works", "fails"])
def test_what_comes_as_the_core_ends_is_refused(
    cleanup: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Asked for during the step that is the last one: nobody may wait for its answer for ever."""
    step, go_on = threading.Event(), threading.Event()

    class Worn(BaseException):
        """The end of the thread."""

    def breaks(_: StepInput, compute: Compute) -> torch.Tensor:
        step.set()
        assert go_on.wait(60)
        raise Worn

    def cannot_close(core: EngineCore) -> list[Progress]:
        raise OSError("no pages come back")

    async def main() -> None:
        engine = AsyncEngine.from_parts(make_parts(breaks))
        first = asyncio.create_task(engine.generate(random_ids(1, 9), GREEDY_8))
        await asyncio.to_thread(step.wait, 60)
        late = [asyncio.create_task(engine.stats()), asyncio.create_task(engine.generate(random_ids(2, 9), GREEDY_8))]
        await asyncio.sleep(0)
        go_on.set()
        for result in await asyncio.gather(first, *late, return_exceptions=True):
            assert isinstance(result, EngineFailedError), result
        await engine.close()

    if cleanup == "fails":
        monkeypatch.setattr(EngineCore, "close", cannot_close)
    asyncio.run(main())
    assert ("the engine that has failed cannot give back its pages" in caplog.text) == (cleanup == "fails")


# -- texts -------------------------------------------------------------------------------------------------------------


class SlowTokenizer:
    """Encodes letters; a text that begins with "!" takes until it is let go."""

    def __init__(self) -> None:
        self.is_encoding, self.may_go_on = threading.Event(), threading.Event()
        self.threads: set[int] = set()

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        self.threads.add(threading.get_ident())
        if text.startswith("!"):
            self.is_encoding.set()
            assert self.may_go_on.wait(60)
        return SimpleNamespace(input_ids=[ord(character) for character in text])

    def decode(self, ids: list[int], **settings: object) -> str:
        return "".join(map(chr, ids))


def test_the_event_loop_waits_for_no_text_that_another_thread_encodes() -> None:
    tokenizer = SlowTokenizer()

    async def main() -> None:
        async with AsyncEngine(served_model("llama"), tokenizer, EngineConfig(kv_cache_tokens=256)) as engine:
            assert (await engine.encode("abc")).tolist() == [97, 98, 99]
            assert tokenizer.threads == {threading.get_ident()}, "a short one is encoded at once"
            long = asyncio.create_task(engine.encode("!" * (SHORT_CHARACTERS + 1)))
            assert await asyncio.to_thread(tokenizer.is_encoding.wait, 60)
            short = asyncio.create_task(engine.encode("abc"))
            (output,) = await engine.generate([1, 2, 3], GREEDY_8)  # goes its way meanwhile
            assert len(output.token_ids) == 8
            assert not short.done()
            tokenizer.may_go_on.set()
            assert (await short).tolist() == [97, 98, 99]
            assert len(await long) == SHORT_CHARACTERS + 1

    asyncio.run(main())


def test_texts_that_cannot_be_encoded_are_refused_whatever_their_length() -> None:
    async def main() -> None:
        async with AsyncEngine(served_model("llama"), SlowTokenizer(), EngineConfig(kv_cache_tokens=256)) as engine:
            for text in ("a\ud800", "a" * SHORT_CHARACTERS + "\ud800"):
                with pytest.raises(InvalidRequestError, match="must be valid Unicode"):
                    await engine.encode(text)
        async with AsyncEngine.from_parts(make_parts()) as engine:
            with pytest.raises(MissingTokenizerError):
                await engine.encode("a")

    asyncio.run(main())
