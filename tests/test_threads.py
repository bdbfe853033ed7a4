"""One engine, many threads, and Ctrl-C at any moment: every token is the oracle's, and nothing is left behind."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from interrupting import interrupt_each_line, interrupted_after, num_lines_of
from oracles import GreedyOracle
from prompts import random_ids
from radixkv import Engine, Progress, SamplingParams
from radixkv.engine.arguments import CacheOptions
from radixkv.engine.intake import ContextLimit, Intake
from radixkv.engine.step_input import StepInput
from radixkv.errors import ClosedError

MakeEngine = Callable[..., Engine]
GREEDY_8 = SamplingParams(max_tokens=8, ignore_eos=True)


def in_threads(*uses: Callable[[], object]) -> None:
    """Run `uses` at the same time; raises what the first of them raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(uses))

    def guarded(use: Callable[[], object]) -> None:
        try:
            barrier.wait()
            use()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(use,)) for use in uses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("quick_switches")
def test_eight_threads_do_everything_at_once(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    engine = make_engine(kv_cache_tokens=512, max_batch_tokens=32)
    heads = [random_ids(100 + i, 12) for i in range(3)]
    shared = engine.session()
    turns = [random_ids(700 + i, 4) for i in range(6)]

    def check(prompt: list[int], token_ids: list[int]) -> None:
        assert token_ids == oracle.continuation(prompt, 8)

    def prompts(seed: int) -> Iterator[list[int]]:
        rng = random.Random(seed)
        for turn in range(4):
            yield [*rng.choice(heads), *random_ids(1000 * seed + turn, rng.randint(1, 9))]

    def generates() -> None:
        for prompt in prompts(1):
            for output in engine.generate([prompt, prompt[:9]], GREEDY_8):
                check(output.prompt_token_ids, output.token_ids)

    def streams(seed: int) -> None:
        for prompt in prompts(seed):
            check(prompt, [i for piece in engine.stream(prompt, GREEDY_8) for i in piece.token_ids])

    def drops() -> None:
        for prompt in prompts(3):
            stream = engine.stream(prompt, GREEDY_8)
            first = next(stream)
            assert first.token_ids == oracle.continuation(prompt, len(first.token_ids))
            del stream

    def aborts() -> None:
        for prompt in prompts(4):
            with closing(engine.stream(prompt, SamplingParams(max_tokens=60, ignore_eos=True))) as stream:
                first = next(stream)
                engine.abort(first.request_id)
                last = [first, *stream][-1].output
            assert last is not None
            assert last.finish_reason in ("abort", "length")
            assert last.token_ids == oracle.continuation(prompt, len(last.token_ids))

    def converses() -> None:
        session = engine.session()
        for prompt in prompts(5):
            session.append(prompt[:5])
            before = session.token_ids
            check(before, session.generate(GREEDY_8).token_ids)
            branch = session.fork()
            branch.append([7])
            check(branch.token_ids, branch.generate(GREEDY_8).token_ids)

    def looks() -> None:
        for _ in range(20):
            engine.stats()
            engine.reset_cache()
            engine.check_invariants()

    def appends() -> None:
        for turn in turns:
            shared.append(turn)

    in_threads(generates, lambda: streams(2), lambda: streams(6), drops, aborts, converses, looks, appends)
    assert shared.token_ids == [i for turn in turns for i in turn]
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache.num_leases) == (0, 0, 0)


def test_no_text_is_lost_when_another_thread_steps(demo_engine: Engine) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    (expected,) = demo_engine.generate("ROMEO:\n", params)
    pieces: list[list[Progress]] = [[], []]

    def stream(i: int) -> None:
        pieces[i].extend(demo_engine.stream("ROMEO:\n", params))

    in_threads(*(lambda i=i: stream(i) for i in range(2)))
    for found in pieces:
        assert "".join(piece.text for piece in found) == expected.text
        assert [i for piece in found for i in piece.token_ids] == expected.token_ids


def test_use_after_close_is_refused_and_waiters_get_what_there_is(make_engine: MakeEngine) -> None:
    started = threading.Event()

    def signals(step: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        started.set()
        return compute()

    engine = make_engine(around=signals, kv_cache_tokens=8192)
    reasons: list[str] = []

    def waits() -> None:
        params = SamplingParams(max_tokens=2000, ignore_eos=True)
        reasons.extend(output.finish_reason for output in engine.generate([random_ids(i, 9) for i in range(2)], params))

    thread = threading.Thread(target=waits)
    thread.start()
    started.wait()
    with engine:
        pass
    thread.join()
    assert reasons == ["abort", "abort"]
    engine.close()
    for use in (
        lambda: engine.generate([1, 2], GREEDY_8),
        lambda: next(engine.stream([1, 2], GREEDY_8)),
        lambda: engine.abort(0),
        engine.step,
        engine.reset_cache,
    ):
        with pytest.raises(ClosedError, match="the engine was closed; make a new one"):
            use()


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------


VERBS: dict[str, Callable[[Engine], object]] = {
    "generate": lambda engine: engine.generate([random_ids(i, 5 + i) for i in range(12)], GREEDY_8),
    "stream": lambda engine: list(engine.stream(random_ids(1, 9), GREEDY_8)),
    "session": lambda engine: converse(engine),
    "abort": lambda engine: abort_one(engine),
    "others": lambda engine: (engine.stats(), engine.reset_cache(), engine.check_invariants()),
}


def converse(engine: Engine) -> None:
    session = engine.session()
    for turn in range(2):
        session.append(random_ids(turn, 7))
        session.generate(SamplingParams(max_tokens=3, ignore_eos=True))
    session.fork().kv_usage()


def abort_one(engine: Engine) -> None:
    with closing(engine.stream(random_ids(2, 9), GREEDY_8)) as stream:
        engine.abort(next(stream).request_id)
        list(stream)


def interrupt(verb: str, engine: Engine, oracle: GreedyOracle, times: int) -> None:
    """Interrupt `verb` at `times` random lines; whatever else runs goes on, and nothing runs that nobody waits for."""
    rng = random.Random(verb)
    total = num_lines_of(lambda: VERBS[verb](engine))
    interrupted = 0
    for _ in range(times):
        bystander = engine.stream(random_ids(50, 6), GREEDY_8)
        ids = next(bystander).token_ids
        try:
            with interrupted_after(rng.randint(1, total)):
                VERBS[verb](engine)
        except KeyboardInterrupt:
            interrupted += 1
        engine.check_invariants()
        stats = engine.stats()
        assert (stats.running + stats.waiting) <= 1, "a request runs on that nobody waits for"
        ids += [i for piece in bystander for i in piece.token_ids]
        assert ids == oracle.continuation(random_ids(50, 6), 8), "the bystander lost something"
    assert interrupted >= times // 2, "the interrupts did not come through"
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache.num_leases) == (0, 0, 0)


@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupt_at_any_line_leaves_nothing_behind(
    verb: str, make_engine: MakeEngine, oracle: GreedyOracle
) -> None:
    interrupt(verb, make_engine(), oracle, times=8)


def test_an_interrupt_at_each_line_leaves_the_intake_open() -> None:
    intake = Intake(None, vocab_size=256, eos_ids=frozenset(), limit=ContextLimit(64, "", ""), seed=0)
    ids = np.array(random_ids(1, 5), np.int32)
    interrupt_each_line(lambda: intake.make(ids, GREEDY_8, CacheOptions(), streams=True), "engine/intake")


@pytest.mark.parametrize("encode", [Intake.encode, Intake.encode_unless_busy])
def test_an_interrupt_at_each_line_leaves_the_tokenizer_free(encode: Callable[[Intake, str], object]) -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(character) for character in text])

    intake = Intake(tokenizer, vocab_size=256, eos_ids=frozenset(), limit=ContextLimit(64, "", ""), seed=0)
    interrupt_each_line(lambda: encode(intake, "abc"), "engine/intake")
    assert intake.encode_unless_busy("abc") is not None


@pytest.mark.stress
@pytest.mark.parametrize("verb", VERBS)
def test_two_hundred_interrupts(verb: str, make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    interrupt(verb, make_engine(), oracle, times=200)
