"""The recurrent layers of a model, over the slots of a pool of states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from radixkv.engine.step_input import StepInput
from radixkv.memory.state_pool import StatePool
from radixkv.models.paged_attention import AttentionContext
from radixkv.models.recurrent.forward import recurrent_forward
from radixkv.models.recurrent.modules import RecurrentModules
from radixkv.models.recurrent.split_step import StateSpan


@dataclass(frozen=True)
class RecurrentStates:
    """Runs the steps of a model some of whose layers keep a state.

    Attributes:
        model: with `modules` plugged in.
        pool: where a step's `state_slots` lie.
    """

    model: PreTrainedModel
    modules: RecurrentModules
    pool: StatePool

    def forward(
        self, step: StepInput, input_ids: Tensor, positions: Tensor, logits_of: Tensor, context: AttentionContext
    ) -> Tensor:
        """As `flattened_forward`: every sequence goes on from the state that it reads, and leaves one to be written."""
        states = self.modules.step(self.pool, list(_spans(step)))
        return recurrent_forward(self.model, self.modules, states, input_ids, positions, logits_of, context)


def _spans(step: StepInput) -> Iterator[StateSpan]:
    rows = step.layout.qo_indptr.tolist()
    firsts = step.layout.positions[step.layout.qo_indptr[:-1]].tolist()
    for row, end, first, (read, write) in zip(rows, rows[1:], firsts, step.state_slots.tolist(), strict=False):
        yield StateSpan(row, end, read if first else None, write)
