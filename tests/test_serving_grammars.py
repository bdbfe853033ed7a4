"""Masks of several outputs are computed at once, and are those that each output has alone."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator

import pytest
import torch

from http_server import new_demo_engine
from radixkv.serving.grammars import Grammar, Grammars, GrammarTransform, has_free_cores, of_json_schema, of_regex

SCHEMA = {"type": "array", "minItems": 3, "items": {"enum": ["Romeo", "Juliet"]}}
GRAMMARS = [of_json_schema(SCHEMA, "schema"), of_regex("[a-f]+x?", "regex"), of_json_schema({"type": "null"}, "schema")]


@pytest.fixture(scope="module", params=["free cores", "none free"])
def grammars(request: pytest.FixtureRequest) -> Iterator[Grammars]:
    engine = new_demo_engine()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("radixkv.serving.grammars.has_free_cores", lambda device: request.param == "free cores")
        grammars = Grammars(engine)
    yield grammars
    grammars.close()
    asyncio.run(engine.close())


def masked(transforms: list[GrammarTransform], rows: list[int], num_rows: int) -> torch.Tensor:
    logits = torch.zeros(num_rows, 2048)
    errors = transforms[0].group.apply(transforms, logits, rows)
    assert errors == {}
    return logits


def test_masks_of_a_step_are_those_of_each_output_alone(grammars: Grammars) -> None:
    together = [grammars.transform(grammar)() for grammar in GRAMMARS]
    alone = [grammars.transform(grammar)() for grammar in GRAMMARS]
    group = together[0].group
    outputs: list[list[int]] = [[] for _ in GRAMMARS]
    for _ in range(6):
        group.start(together, outputs)
        expected = torch.zeros(len(GRAMMARS), 2048)
        for row, transform in enumerate(alone):
            transform.start(outputs[row])
            transform.apply(expected[row])
        assert torch.equal(masked(together, [0, 1, 2], 3), expected)
        among_others = masked(together, [3, 0, 2], 4)
        assert torch.equal(among_others[[3, 0, 2]], expected)
        assert among_others[1].eq(0).all(), "a row without a grammar stays as it is"
        assert torch.equal(masked(together[1:], [0, 1], 2), expected[1:]), "one has ended, or they are repeated apart"
        outputs = [[*output, int(row.argmax())] for output, row in zip(outputs, expected, strict=True)]


def test_cores_are_free_where_the_model_leaves_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert not has_free_cores("cpu")
    assert has_free_cores("cuda:0")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert has_free_cores("cpu")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert not has_free_cores("cpu")


def test_an_output_that_left_its_grammar_fails_alone(grammars: Grammars) -> None:
    transforms = [grammars.transform(GRAMMARS[1])() for _ in range(2)]
    group = transforms[0].group
    group.start(transforms, [[], []])
    first = masked(transforms, [0, 1], 2)[0]
    wrong, allowed = int(first.argmin()), int(first.argmax())
    group.start(transforms, [[wrong], [allowed]])
    logits = torch.zeros(2, 2048)
    assert list(group.apply(transforms, logits, [0, 1])) == [0]
    assert logits[1].isfinite().any()


def test_a_grammar_tells_how_much_of_a_draft_it_allows(grammars: Grammars) -> None:
    """Against the masks, one token after the other; beyond the end of the grammar nothing is allowed."""
    for grammar in GRAMMARS:
        transform, other = (grammars.transform(grammar)() for _ in range(2))
        output: list[int] = []
        for _ in range(6):
            logits = torch.zeros(2048)
            other.start(output)
            other.apply(logits)
            allowed, forbidden = int(logits.argmax()), int(logits.argmin())
            if other.matcher.is_stopped():
                break
            for _ in range(2):  # before it was started, and after it
                assert transform.num_allowed(output, [allowed]) == 1
                assert transform.num_allowed(output, [forbidden, allowed]) == 0
                transform.start(output)
            output.append(allowed)


def forced_by_masks(transform: GrammarTransform, output: list[int]) -> list[int]:
    """The tokens that come after `output` because the masks allow no others, as far as the grammar goes."""
    forced: list[int] = []
    while True:
        logits = torch.zeros(2048)
        transform.start([*output, *forced])
        transform.apply(logits)  # waits for the thread that uses the matcher
        if transform.matcher.is_stopped():
            return forced
        (allowed,) = logits.isfinite().nonzero(as_tuple=True)
        if len(allowed) != 1:
            return forced
        forced.append(int(allowed[0]))


@pytest.mark.parametrize("grammar", [*GRAMMARS, of_json_schema({"const": "Wherefore art thou"}, "schema")])
def test_forced_tokens_are_those_that_masks_leave_no_choice_about(grammars: Grammars, grammar: Grammar) -> None:
    make = grammars.transform(grammar)
    rng = random.Random(0)
    for _ in range(8):
        transform, output, num_forced = make(), [], 0
        for _ in range(12):
            logits = torch.zeros(2048)
            transform.start(output)
            transform.apply(logits)
            if transform.matcher.is_stopped():
                break
            output.append(rng.choice(logits.isfinite().nonzero().flatten().tolist()))
            forced = list(transform.forced(output))
            assert forced == forced_by_masks(make(), output)[: len(forced)]
            assert list(transform.forced(output)) == forced, "asked again"
            output += forced
            num_forced += len(forced)
        assert num_forced or grammar is GRAMMARS[1]


def test_forced_tokens_end_before_what_the_grammar_itself_refuses(grammars: Grammars) -> None:
    """llguidance takes the text of a control token for that token, which then does not fit."""
    grammar = of_regex(r"but <\|user\|> is a text, and goes on", "regex")
    forced = grammars.transform(grammar)().forced([])
    assert grammars.transform(grammar)().num_allowed([], forced) == len(forced) > 0
