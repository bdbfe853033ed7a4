"""Where a call of generate keeps the states of recurrent layers, and how it goes on from those that were kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from radixkv.hf.call import Call
from radixkv.hf.page_store import PageStore
from radixkv.hf.recurrent_layers import batch_states, put_states

MIN_SHARED_TOKENS = 64
"""What computing a prefix first must save, in tokens over all rows: a forward pass costs time."""


class StateKeeper:
    """Notes states in a call, for `PageStore.save`, and puts stored ones into its layers.

    States of columns to come can only be had by computing a prompt in parts, which end where one is to be kept.
    """

    def __init__(self, store: PageStore, namespace: Callable[[int], str | None]) -> None:
        """Args: namespace: of rows with so many columns of padding."""
        self._store = store
        self._namespace = namespace

    def now(self, layers: Sequence[Any]) -> list[Tensor]:
        """The states that the layers hold, [batch, …]; views."""
        return batch_states(layers, self._store.states.shapes)

    def stops(self, call: Call, last: int, limit: int) -> dict[int, list[int]]:
        """Columns after `last` where states are to be kept, and the rows that part from what is stored there.

        Only where a state saves the next row that parts there enough; and at `limit`, before the columns that all calls
        compute for their logits, unless the call computes the prefix of another, which goes on from its end.
        """
        stops: dict[int, list[int]] = {} if call.is_prefix else {limit: []}
        for row, (tokens, padding) in enumerate(zip(call.row_tokens(), call.padding, strict=True)):
            column = padding + self._store.held(tokens[: max(0, limit - padding)], self._namespace(padding))
            if max(last, padding) + MIN_SHARED_TOKENS <= column < limit:
                stops.setdefault(column, []).append(row)
        return stops

    def parts(self, call: Call, last: int, stops: Mapping[int, list[int]]) -> Iterator[range]:
        """The columns from `last` on, in parts that end at the stops.

        transformers takes a column that is computed alone for a token of each row, so none is where rows have padding.
        """
        for column in sorted(stops):
            if column > last + 1 or (column == last + 1 and last >= max(call.padding)):
                yield range(last, column)
                last = column

    def keep(self, call: Call, layers: Sequence[Any], column: int, stops: Mapping[int, list[int]]) -> None:
        """Note the states that the layers hold after `column` columns, one of the stops."""
        states = [state.clone() for state in self.now(layers)]
        if stops[column]:
            call.keep_branch(column, stops[column], states)
        else:
            call.keep_last(column, states)

    def keep_ends(self, call: Call, layers: Sequence[Any], num_columns: int, input_ids: Tensor) -> None:
        """Note the states of rows whose output ends with the next column, while others go on."""
        for row in call.ending_rows(input_ids):
            call.keep_end(row, num_columns, [tensor[row].clone() for tensor in self.now(layers)])

    def load(self, call: Call, layers: Sequence[Any], last: int) -> None:
        """Let the layers go on from the stored states after column `last`; padding leaves zeros."""
        rows = zip(call.row_tokens(), call.padding, strict=True)
        states = [
            self._store.load_state(tokens[: last - padding], self._namespace(padding)) if last > padding else None
            for tokens, padding in rows
        ]
        some = next(state for state in states if state is not None)
        blank = [torch.zeros_like(tensor) for tensor in some]
        columns = zip(*(blank if state is None else state for state in states), strict=True)
        put_states(layers, self._store.states.shapes, [torch.stack(column) for column in columns])
