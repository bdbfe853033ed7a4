"""What goes into a cache during one call of generate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from radixkv.cache.token_ids import common_tokens
from radixkv.hf.page_store import Tokens
from radixkv.hf.support import left_padding


class ColumnStates(NamedTuple):
    """The states of recurrent layers after some columns, for later calls to go on from.

    `tensors` are [batch, …]; those of `rows` are wanted.
    """

    rows: frozenset[int]
    tensors: Sequence[Tensor]


class Call:
    """The tokens and the padding of the columns that the layers of a cache hold.

    Attributes:
        ids: the tokens of the columns, int64 [batch, columns]; None before the first forward pass.
        padding: columns of padding on the left of each row.
        computing: columns that a forward pass of the prompt computes, and when it began.
        exact_columns: leading columns whose KV is that of any longer or shorter sequence with these tokens.
        is_prefix: whether it computes a prefix for rows of another call, and ends where they go on.
    """

    def __init__(self, eos_token_ids: frozenset[int], *, is_prefix: bool = False) -> None:
        self.ids: Tensor | None = None
        self.padding: list[int] = []
        self.exact_columns = 0
        self.is_prefix = is_prefix
        self._branch_states: dict[int, ColumnStates] = {}
        self._last_states: tuple[int, Sequence[Tensor]] | None = None
        self._end_states: dict[int, tuple[int, list[Tensor]]] = {}  # by row
        self.computing: tuple[int, int, float] | None = None
        self._prompt_columns = 0
        self._mask: Tensor | None = None
        self._eos_token_ids = eos_token_ids

    @property
    def num_columns(self) -> int:
        """Columns noted, those of the next forward pass included."""
        return 0 if self.ids is None else int(self.ids.shape[1])

    @property
    def num_rows(self) -> int:
        """Sequences in the batch."""
        return len(self.padding)

    @property
    def longest_row(self) -> int:
        """Tokens in the row with the least padding."""
        return self.num_columns - min(self.padding)

    def note(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Add the columns of the next forward pass, [batch, columns]; the mask is [batch, all columns].

        Raises: InvalidRequestError for a mask that is not padding on the left.
        """
        is_step = self.ids is not None and input_ids.shape[1] == 1
        self.ids = input_ids if self.ids is None else torch.cat([self.ids, input_ids], dim=1)
        self._mask = attention_mask
        if not is_step:  # a prompt, or a chunk of it: steps add ones to the mask, which need no look
            self.measure_padding()
            self._prompt_columns = self.num_columns

    def measure_padding(self) -> None:
        """Read each row's padding off the last mask. Raises: InvalidRequestError, as `note`."""
        assert self.ids is not None, "a forward pass was noted"
        self.padding = left_padding(self._mask, self.ids.shape[0])

    def has_prompt(self, padding: int) -> bool:
        """Whether a row with so much padding has a token in its prompt: without one, positions begin elsewhere."""
        return padding < self._prompt_columns

    def keep_branch(self, num_columns: int, rows: Iterable[int], tensors: Sequence[Tensor]) -> None:
        """Keep the states after `num_columns` columns, where `rows` part from what is stored."""
        self._branch_states[num_columns] = ColumnStates(frozenset(rows), tensors)

    def keep_last(self, num_columns: int, tensors: Sequence[Tensor]) -> None:
        """Keep the states after `num_columns` columns, the last of the prompt so far that need no logits."""
        self._last_states = (num_columns, tensors)

    def ending_rows(self, input_ids: Tensor) -> list[int]:
        """The rows whose output ends with the next column, `input_ids` [batch, 1]: padding follows it."""
        if not self._eos_token_ids or input_ids.shape[1] > 1:
            return []
        tokens = input_ids[:, 0].tolist()
        return [row for row, token in enumerate(tokens) if token in self._eos_token_ids and row not in self._end_states]

    def keep_end(self, row: int, num_columns: int, state: list[Tensor]) -> None:
        """Keep the state of a row after `num_columns` columns, before its output ends."""
        self._end_states[row] = (num_columns, state)

    def states_of(self, row: int) -> dict[int, list[Tensor]]:
        """The states of a row that are kept, by how many tokens came before; what beams of a prompt share is theirs."""
        kept = {
            column: [tensor[row] for tensor in states.tensors]
            for column, states in self._branch_states.items()
            if row in states.rows
        }
        if self._last_states is not None:
            kept[self._last_states[0]] = [tensor[row] for tensor in self._last_states[1]]
        if row in self._end_states:
            num_columns, state = self._end_states[row]
            kept[num_columns] = state
        return {column - self.padding[row]: state for column, state in kept.items() if column > self.padding[row]}

    def crop(self, num_columns: int) -> None:
        """Forget the columns from `num_columns` on, which come after the prompt's."""
        assert self.ids is not None, "a forward pass was noted"
        self.ids = self.ids[:, :num_columns]
        self.exact_columns = min(self.exact_columns, num_columns)

    def reorder(self, rows: Tensor) -> None:
        """Give row i what row `rows[i]` held: beams of one prompt, so their padding is the same."""
        assert self.ids is not None, "a forward pass was noted"
        self._end_states.clear()
        self.ids = self.ids.index_select(0, rows.to(self.ids.device))

    def row_tokens(self) -> list[Tokens]:
        """The tokens of each row, without padding."""
        assert self.ids is not None, "a forward pass was noted"
        columns = self.ids.cpu().numpy().astype(np.int32)
        return [np.ascontiguousarray(row[padding:]) for row, padding in zip(columns, self.padding, strict=True)]

    def common_prefix(self) -> Tokens:
        """The tokens that all rows begin with."""
        first, *others = self.row_tokens()
        return first[: min((common_tokens(first, row) for row in others), default=len(first))]

    def end_of_output(self, tokens: Tokens, padding: int) -> int:
        """How many of a row's `tokens` come before the padding that follows its end-of-sequence token."""
        first = self._prompt_columns - padding
        ends = np.flatnonzero(np.isin(tokens[first:], list(self._eos_token_ids)))
        return first + int(ends[0]) + 1 if len(ends) else len(tokens)
