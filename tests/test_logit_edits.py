"""Edits of logits against transformers' own processors and a dull oracle; batching changes nothing."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from radixkv import SamplingParams
from radixkv.engine.logit_edits import LogitEdits, LogitsTransform, RowEdits, edit_logits, start_transforms

VOCAB = 40
ENDS = (1, 2)


def edits_of(
    params: SamplingParams, prompt: Sequence[int], output: Sequence[int], transform: LogitsTransform | None = None
) -> LogitEdits:
    edits = LogitEdits.of(params, np.array(prompt, np.int32), ENDS, transform)
    assert edits is not None
    for token_id in output:
        edits.append(token_id)
    return edits


def edited(logits: Tensor, *edits: LogitEdits | None) -> Tensor:
    """The logits of each row after its edits."""
    logits = logits.clone()
    assert edit_logits(logits, [RowEdits(row, one) for row, one in enumerate(edits) if one is not None]) == {}
    return logits


def random_logits(num_rows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def dull_edits(
    logits: list[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """Repetition, frequency and presence penalty, bias and ends, token by token."""
    counts = Counter(output)
    edited = []
    for token_id, logit in enumerate(logits):
        if token_id in prompt or token_id in output:
            logit = logit * params.repetition_penalty if logit < 0 else logit / params.repetition_penalty
        logit -= params.frequency_penalty * counts[token_id]
        logit -= params.presence_penalty if counts[token_id] else 0
        logit += (params.logit_bias or {}).get(token_id, 0)
        edited.append(-math.inf if token_id in ENDS and len(output) < params.min_tokens else logit)
    return edited


ASKED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"frequency_penalty": 0.4},
    {"presence_penalty": -1.5},
    {"logit_bias": {3: 5.0, 39: -100}},
    {"min_tokens": 4},
    {
        "repetition_penalty": 1.2,
        "frequency_penalty": -0.3,
        "presence_penalty": 0.8,
        "logit_bias": {0: 1, 2: 7.5},
        "min_tokens": 9,
    },
]


def cases() -> list[tuple[SamplingParams, list[int], list[int]]]:
    rng = random.Random(5)
    lengths = [(1, 0), (7, 1), (30, 90), (5, 8), (12, 3)]
    tokens = [([rng.randrange(VOCAB) for _ in range(a)], [rng.randrange(VOCAB) for _ in range(b)]) for a, b in lengths]
    return [(SamplingParams(**asked), *of) for asked in ASKED for of in tokens]


def test_edits_agree_with_a_dull_oracle_alone_and_in_a_batch() -> None:
    rows = cases()
    logits = random_logits(len(rows) + 1)
    together = edited(logits, *(edits_of(*row) for row in rows))
    assert torch.equal(together[-1], logits[-1]), "it asks for nothing"
    for number, row in enumerate(rows):
        expected = dull_edits(logits[number].tolist(), *row)
        assert together[number].tolist() == pytest.approx(expected, abs=1e-5)
        alone = edited(logits[number : number + 1], edits_of(*row))
        assert torch.equal(alone[0], together[number])


def test_what_an_application_sets_for_torch_changes_nothing() -> None:
    rows = cases()
    logits = random_logits(len(rows))
    expected = edited(logits, *(edits_of(*row) for row in rows))
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found = edited(logits, *(edits_of(*row, Only(9)) for row in rows))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(found[:, 9], expected[:, 9])


def test_edits_are_those_of_transformers() -> None:
    prompt, output = [4, 5, 6, 7, 4], [8, 4, 8]
    bias = {3: 2.5, 8: -1.0}
    params = SamplingParams(repetition_penalty=1.4, logit_bias=bias, min_tokens=4)
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.4),
            SequenceBiasLogitsProcessor([[[token_id], value] for token_id, value in bias.items()]),
            MinNewTokensLengthLogitsProcessor(len(prompt), 4, list(ENDS)),
        ]
    )
    logits = random_logits(1)
    expected = theirs(torch.tensor([prompt + output]), logits.clone())
    assert torch.equal(edited(logits, edits_of(params, prompt, output)), expected)


def test_one_token_after_another_counts_as_all_at_once() -> None:
    rng = random.Random(2)
    output = [rng.randrange(VOCAB) for _ in range(300)]
    params = SamplingParams(max_tokens=300, frequency_penalty=0.01, repetition_penalty=1.1)
    edits = edits_of(params, [1, 2, 3], [])
    for length, token_id in enumerate(output):
        logits = random_logits(1, seed=length)
        expected = dull_edits(logits[0].tolist(), params, [1, 2, 3], output[:length])
        assert edited(logits, edits)[0].tolist() == pytest.approx(expected, abs=1e-5)
        edits.append(token_id)


def test_who_asks_for_nothing_has_no_edits() -> None:
    assert LogitEdits.of(SamplingParams(temperature=1.0, top_k=4), np.array([1], np.int32), ENDS, None) is None
    assert LogitEdits.of(SamplingParams(logit_bias={}), np.array([1], np.int32), ENDS, None) is None


class Only:
    """Allows one token."""

    def __init__(self, token_id: int) -> None:
        self._token_id = token_id
        self.started: list[list[int]] = []

    def start(self, token_ids: Sequence[int]) -> None:
        self.started.append(list(token_ids))

    def apply(self, logits: Tensor) -> None:
        kept = logits[self._token_id].clone()
        logits.fill_(-torch.inf)
        logits[self._token_id] = kept


class Broken(Only):
    def apply(self, logits: Tensor) -> None:
        raise ZeroDivisionError("a grammar without end")


def test_a_transform_sees_the_other_edits_and_fails_alone() -> None:
    params = SamplingParams(logit_bias={9: 50.0})
    logits = random_logits(3)
    rows = [RowEdits(row, edits_of(params, [1], [], kind(9))) for row, kind in enumerate((Only, Broken, Only))]
    found = logits.clone()
    errors = edit_logits(found, rows)
    assert [(row, type(error)) for row, error in errors.items()] == [(1, ZeroDivisionError)]
    for row in (0, 2):
        assert found[row].argmax() == 9
        assert found[row, 9] == logits[row, 9] + 50
        assert found[row].isfinite().sum() == 1


def test_a_transform_starts_once_for_each_length() -> None:
    transform = Only(3)
    edits = edits_of(SamplingParams(), [1], [], transform)
    for output in ([], [], [3], [3], [3, 3]):
        assert start_transforms([RowEdits(0, edits)], [output]) == {}
    assert transform.started == [[], [3], [3, 3]]


class Together:
    """Starts and applies transforms of a step at once; its second call of `apply` fails one row, the third all."""

    def __init__(self) -> None:
        self.started: list[list[list[int]]] = []
        self.rows: list[list[int]] = []

    def start(self, transforms: Sequence[Member], outputs: Sequence[Sequence[int]]) -> None:
        assert len(transforms) == len(outputs)
        self.started.append([list(output) for output in outputs])

    def apply(self, transforms: Sequence[Member], logits: Tensor, rows: Sequence[int]) -> dict[int, Exception]:
        self.rows.append(list(rows))
        for transform, row in zip(transforms, rows, strict=True):
            Only.apply(transform, logits[row])
        if len(self.rows) == 3:
            raise ValueError("nobody is served")
        return {rows[0]: ZeroDivisionError("a grammar without end")} if len(self.rows) == 2 else {}


class Member(Only):
    def __init__(self, token_id: int, group: Together) -> None:
        super().__init__(token_id)
        self.group = group


def test_transforms_of_a_group_work_at_once_and_others_alone() -> None:
    group, other = Together(), Only(1)
    transforms = [Member(5, group), other, Member(7, group)]
    rows = [RowEdits(i, edits_of(SamplingParams(), [1], [], transform)) for i, transform in enumerate(transforms)]
    assert start_transforms(rows, [[8], [], [9, 9]]) == {}
    assert start_transforms(rows, [[8], [4], [9, 9]]) == {}, "only the other one has a new token"
    assert group.started == [[[8], [9, 9]]]
    assert other.started == [[], [4]]
    found = random_logits(3)
    assert edit_logits(found, rows) == {}
    assert found.argmax(-1).tolist() == [5, 1, 7]
    assert {row: type(error) for row, error in edit_logits(random_logits(3), rows).items()} == {0: ZeroDivisionError}
    assert {row: type(error) for row, error in edit_logits(random_logits(3), rows).items()} == {
        0: ValueError,
        2: ValueError,
    }
    assert group.rows == [[0, 2]] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_a_transform_hides_is_still_told(bad: float) -> None:
    logits = random_logits(2)
    logits[0, 5] = bad
    found = edited(logits, *(edits_of(SamplingParams(), [1], [], Only(9)) for _ in range(2)))
    assert found.amax(-1).isfinite().tolist() == [False, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_end_that_is_forbidden_hides_nothing_either(bad: float) -> None:
    logits = random_logits(2)
    logits[0, ENDS[0]] = bad
    found = edited(logits, *(edits_of(SamplingParams(min_tokens=2), [1], []) for _ in range(2)))
    assert found.amax(-1).isfinite().tolist() == [False, True]
    assert found[1, list(ENDS)].tolist() == [-math.inf] * 2
