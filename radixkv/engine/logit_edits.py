"""What requests change in their logits before a token is chosen: penalties, bias, forbidden ends, transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.engine.sampling import SamplingParams

FIRST_ROOM = 64  # output tokens, before the arrays of counts grow


class LogitsTransform(Protocol):
    """Changes the logits of one output before each of its tokens is chosen, for instance by a grammar.

    `start` is called when the output's tokens are known, before the model computes the logits of the next one; `apply`
    after that. So `start` can begin work in a thread of its own, which runs while the model does, and `apply` waits for
    it. (Of several tokens that one pass checks, each but the first has its `start` directly before its `apply`.) All
    is called by the thread that runs the engine. What a method raises fails this request alone.
    """

    def start(self, token_ids: Sequence[int]) -> None:
        """Get ready for the token after `token_ids`, the output so far; once for each token that is to be chosen.

        The list is the engine's own: do not change it. It stays as it is until `apply` returns.
        """
        ...

    def apply(self, logits: Tensor) -> None:
        """Change `logits` in place: float32 [vocab_size], on the model's device, after penalties and bias.

        Minus infinity forbids a token. It may be called again for the same token if a step has to be repeated.
        """
        ...

    # It may have two methods more:
    #
    # `num_allowed(output_ids, token_ids) -> int`: how many of the first of `token_ids` it would allow one after the
    # other after `output_ids`, the output so far. Drafts are cut there, before they are checked in vain.
    #
    # `forced(token_ids) -> Sequence[int]`: tokens that must come after `token_ids`, the output so far, one after the
    # other, because `apply` would forbid all others; it need not name all of them. Asked once a token was chosen. The
    # engine takes them as they are, and computes them together with the one that was chosen: a step for each is spared.
    # Those that would end the output are left to the model; none are asked for where log probabilities are wanted.


class TransformGroup(Protocol):
    """Does at once what several transforms of a step would do one after another.

    A `LogitsTransform` may have an attribute `group`: of a step's transforms with the same group, the engine calls the
    group's methods, and not their own. What these raise fails all requests of the call.
    """

    def start(self, transforms: Sequence[Any], outputs: Sequence[Sequence[int]]) -> None:
        """As `LogitsTransform.start`, with the output of each of `transforms`."""
        ...

    def apply(self, transforms: Sequence[Any], logits: Tensor, rows: Sequence[int]) -> dict[int, Exception]:
        """As `LogitsTransform.apply`, with `logits` [any rows, vocab_size] and the row of each of `transforms`.

        Returns: what fails single requests, by row.
        """
        ...


class TokenCounts:
    """How often an output holds each token. Tokens of the prompt are listed, too, and count 0.

    >>> counts = TokenCounts(np.array([5, 9]))
    >>> counts.add(7), counts.add(9), counts.add(7)
    (None, None, None)
    >>> counts.ids.tolist(), counts.counts.tolist()
    ([5, 9, 7], [0.0, 1.0, 2.0])
    """

    def __init__(self, listed_ids: NDArray[Any]) -> None:
        """Begin with `listed_ids`, all different, none of which the output holds."""
        self._size = len(listed_ids)
        self._ids = np.empty(self._size + FIRST_ROOM, np.int64)
        self._ids[: self._size] = listed_ids
        self._counts = np.zeros(len(self._ids), np.float32)
        self._place = {token_id: place for place, token_id in enumerate(listed_ids.tolist())}

    @property
    def ids(self) -> NDArray[np.int64]:
        """The tokens listed, each once; a view."""
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often the output holds each of `ids`; a view."""
        return self._counts[: self._size]

    def add(self, token_id: int) -> None:
        """Count a new token of the output. O(1)."""
        place = self._place.setdefault(token_id, self._size)
        if place == self._size:
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token_id
            self._size += 1
        self._counts[place] += 1


class LogitEdits:
    """What one request changes in its logits, and what this depends on: its output so far.

    Attributes:
        params: which penalties and which bias.
        counts: the tokens that penalties apply to; None without penalties.
        bias_ids, bias: int64 and float32, of the same length.
        transform: the request's own; None if it has none.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: NDArray[np.int32],
        end_ids: Sequence[int],
        transform: LogitsTransform | None,
    ) -> None:
        self.params = params
        self.counts: TokenCounts | None = None
        if params.has_penalties:
            repeats = params.repetition_penalty != 1
            self.counts = TokenCounts(np.unique(prompt_ids) if repeats else np.empty(0, np.int64))
        bias = params.logit_bias or {}
        self.bias_ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self.bias = np.fromiter(bias.values(), np.float32, len(bias))
        self.transform = transform
        self._end_ids = np.array(sorted(end_ids), np.int64)
        self._num_tokens = 0  # of the output
        self._num_started = -1  # as `_num_tokens` was when the transform started last

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        prompt_ids: NDArray[np.int32],
        end_ids: Sequence[int],
        transform: LogitsTransform | None,
    ) -> LogitEdits | None:
        """The edits of a request; None if it asks for none.

        Args:
            end_ids: tokens that may not come before `min_tokens` others.
        """
        asks = params.has_penalties or params.logit_bias or params.min_tokens or transform is not None
        return cls(params, prompt_ids, end_ids, transform) if asks else None

    @property
    def forbidden_ids(self) -> NDArray[np.int64]:
        """Tokens that may not come next, because they end the output."""
        return self._end_ids if self._num_tokens < self.params.min_tokens else self._end_ids[:0]

    def append(self, token_id: int) -> None:
        """Take note of a new token of the output. O(1)."""
        self._num_tokens += 1
        if self.counts is not None:
            self.counts.add(token_id)

    @property
    def group(self) -> TransformGroup | None:
        """What the transform does with those of other requests; None if it works alone."""
        return getattr(self.transform, "group", None)

    def num_allowed(self, output_ids: Sequence[int], token_ids: NDArray[np.int32]) -> int:
        """How many of the first of `token_ids` the transform may allow after `output_ids`; all, if it cannot tell."""
        count = getattr(self.transform, "num_allowed", None)
        return len(token_ids) if count is None else int(count(output_ids, token_ids.tolist()))

    def forced(self, output_ids: Sequence[int]) -> Sequence[int]:
        """Tokens that the transform forces after `output_ids`; none, if it cannot tell."""
        tell = getattr(self.transform, "forced", None)
        return () if tell is None else tell(output_ids)

    def is_to_start(self, output_ids: Sequence[int]) -> bool:
        """Whether there is a transform that was not started for the token after `output_ids`. True once."""
        if self.transform is None or self._num_started == len(output_ids):
            return False
        self._num_started = len(output_ids)
        return True


class RowEdits(NamedTuple):
    """The edits of one row of logits."""

    row: int
    edits: LogitEdits


def start_transforms(rows: Sequence[RowEdits], outputs: Sequence[Sequence[int]]) -> dict[int, Exception]:
    """Start the transforms of `rows` for the token after each output, unless they were started for it before.

    Returns: what they raised, by row.
    """
    errors: dict[int, Exception] = {}
    begun = [(edits, output) for edits, output in zip(rows, outputs, strict=True) if edits.edits.is_to_start(output)]
    output_of = {edits.row: output for edits, output in begun}
    for group, members in _by_group([edits for edits, _ in begun]):
        try:
            if group is not None:
                group.start([edits.transform for _, edits in members], [output_of[row] for row, _ in members])
            elif (transform := members[0].edits.transform) is not None:
                transform.start(output_of[members[0].row])
        except Exception as error:
            errors |= dict.fromkeys((row for row, _ in members), error)
    return errors


def _by_group(rows: Sequence[RowEdits]) -> list[tuple[TransformGroup | None, list[RowEdits]]]:
    """The rows with transforms: those of each group together, each of the others alone."""
    alone: list[tuple[TransformGroup | None, list[RowEdits]]] = []
    together: dict[int, tuple[TransformGroup, list[RowEdits]]] = {}
    for row in rows:
        if row.edits.transform is None:
            continue
        if (group := row.edits.group) is None:
            alone.append((None, [row]))
        else:
            together.setdefault(id(group), (group, []))[1].append(row)
    return [*alone, *together.values()]


@torch.inference_mode()
def edit_logits(logits: Tensor, rows: Sequence[RowEdits]) -> dict[int, Exception]:
    """Change the logits of `rows` in place: repetition, frequency and presence penalty, bias, ends, transforms.

    All but the transforms in one pass for all rows, which reads and writes the logits of the tokens concerned alone. A
    row of the model's that cannot be sampled from still holds NaN in the end.

    Args:
        logits: float32 [rows, vocab_size]

    Returns: what transforms raised, by row.
    """
    transformed = [row for row, edits in rows if edits.transform is not None]
    were_finite = _are_finite(logits, transformed) if transformed else None
    _penalise(logits, [(row, edits.params, edits.counts) for row, edits in rows if edits.counts is not None])
    biased = [(row, edits.bias_ids, edits.bias) for row, edits in rows if len(edits.bias_ids)]
    if biased:
        places = _places(logits, [(row, ids) for row, ids, _ in biased])
        added = _on_device(np.concatenate([bias for *_, bias in biased]), logits)
        logits.index_put_(places, logits[places] + added)
    forbidden = [(row, ids) for row, edits in rows if edits.params.min_tokens and len(ids := edits.forbidden_ids)]
    if forbidden:
        places = _places(logits, forbidden)
        values = logits[places]
        is_bad = ~(values < torch.inf)  # and stays so
        logits.index_put_(places, torch.full_like(values, -torch.inf).masked_fill_(is_bad, torch.nan))
    errors: dict[int, Exception] = {}
    for group, members in _by_group(rows):
        try:
            if group is not None:
                errors |= group.apply([edits.transform for _, edits in members], logits, [row for row, _ in members])
            elif (transform := members[0].edits.transform) is not None:
                transform.apply(logits[members[0].row])
        except Exception as error:
            errors |= dict.fromkeys((row for row, _ in members), error)
    if were_finite is not None:
        logits[transformed, 0] = torch.where(were_finite, logits[transformed, 0], torch.nan)
    return errors


def _are_finite(logits: Tensor, rows: Sequence[int]) -> Tensor | None:
    """Whether each of `rows` can be sampled from: what a transform hides must not hide that it cannot.

    None if all rows can; a GPU is not asked, since it would have to be waited for.
    """
    if logits.device.type == "cpu" and np.isfinite(logits.numpy().max(axis=-1)).all():
        return None
    best = logits.amax(dim=-1) if len(rows) == len(logits) else torch.stack([logits[row].amax() for row in rows])
    return torch.isfinite(best)


def _penalise(logits: Tensor, rows: Sequence[tuple[int, SamplingParams, TokenCounts]]) -> None:
    """Apply the penalties. Repetition: Keskar et al. 2019, section 4.1; the others: OpenAI's API."""
    if not rows:
        return
    places = _places(logits, [(row, counts.ids) for row, _, counts in rows])
    sizes = [len(counts.ids) for *_, counts in rows]
    asked = [(params.repetition_penalty, params.frequency_penalty, params.presence_penalty) for _, params, _ in rows]
    repetition, frequency, presence = _on_device(np.repeat(np.array(asked, np.float32).T, sizes, axis=1), logits)
    counted = _on_device(np.concatenate([counts.counts for *_, counts in rows]), logits)
    values = logits[places]
    values = torch.where(values < 0, values * repetition, values / repetition)
    logits.index_put_(places, values - frequency * counted - presence * (counted > 0))


def _places(logits: Tensor, ids_of_rows: Sequence[tuple[int, NDArray[np.int64]]]) -> tuple[Tensor, Tensor]:
    """Indices (row, token id) of all tokens of all rows."""
    rows = np.repeat(np.array([row for row, _ in ids_of_rows]), [len(ids) for _, ids in ids_of_rows])
    return _on_device(rows, logits), _on_device(np.concatenate([ids for _, ids in ids_of_rows]), logits)


def _on_device(values: NDArray[Any], logits: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(logits.device, non_blocking=True)
