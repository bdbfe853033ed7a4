"""Runs the model on a step's tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol, TypeGuard

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radixkv.attention.backend import AttentionBackend, AttentionPlan
from radixkv.attention.metadata import AttentionMetadata, to_device
from radixkv.attention.program_plan import ProgramPlan
from radixkv.engine.graphs import GraphRunner
from radixkv.engine.recurrent_states import RecurrentStates
from radixkv.engine.step_input import StepInput
from radixkv.models.fused_decoder import FusedDecoder
from radixkv.models.paged_attention import PagedContext, flattened_forward
from radixkv.models.streaming import Streaming


def nothing() -> None:
    """Does nothing, where a step's computing is to be announced to nobody."""


class Runner(Protocol):
    """Computes the KV and the logits of a step."""

    def run(
        self, step: StepInput, input_ids: Tensor | None = None, on_compute: Callable[[], object] = nothing
    ) -> Tensor:
        """Compute the KV of all tokens of `step`, and the logits that it wants.

        Args:
            input_ids: int64 [tokens] on the device, in place of `step.token_ids`.
            on_compute: called once, when Python has done its part, as far as that comes first: what follows leaves
                the interpreter to other threads, where it can.

        Returns: [sequences, vocab_size], float32, valid until the next call.
        """
        ...


def _is_program_plan(plan: AttentionPlan) -> TypeGuard[ProgramPlan]:
    return _has_program_plans(type(plan))


@cache
def _has_program_plans(kind: type) -> bool:
    """Whether plans of that class are `ProgramPlan`; asking the protocol takes as long as a small layer."""
    return issubclass(kind, ProgramPlan)


class ModelRunner:
    """The model and the attention backend, called with a step's arrays alone.

    Args:
        graphs: runs the steps that it can by CUDA graphs.
        streaming: how window and sinks change attention, where there are any.
        fused: computes steps of few tokens in place of the model's modules, where it can.
        states: what layers that keep a state read and write, if there are any.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        backend: AttentionBackend,
        graphs: GraphRunner | None = None,
        streaming: Streaming | None = None,
        fused: FusedDecoder | None = None,
        states: RecurrentStates | None = None,
    ) -> None:
        self.model = model
        self.backend = backend
        self._device = model.device  # to ask for it takes as long as a small layer
        self._graphs = graphs
        self._streaming = streaming
        self._fused = fused
        self._states = states

    @torch.inference_mode()
    def run(
        self, step: StepInput, input_ids: Tensor | None = None, on_compute: Callable[[], object] = nothing
    ) -> Tensor:
        """As `Runner.run`.

        Raises: UnsupportedModelError if the model did not run on the pages, because its attention was switched.
        """
        device = self._device
        if input_ids is None:
            input_ids = to_device(step.token_ids, device)
        metadata = AttentionMetadata.of(step.layout, device)
        if self._graphs is not None and self._graphs.can_run(metadata):
            on_compute()
            return self._graphs.run(input_ids, metadata)
        logits_of = to_device(step.logits_of, device)
        plan = self.backend.plan(metadata)
        fused = self._fused if self._fused is not None and self._fused.can_run(metadata.num_tokens) else None
        if fused is not None and self._streaming is None and _is_program_plan(plan):
            found = fused.run_with(plan, input_ids, metadata.positions, metadata.slots, logits_of, on_compute)
            if found is not None:
                return found.float()
        on_compute()
        adjustment = None if self._streaming is None else self._streaming.step(metadata.positions)
        context = PagedContext(plan, self.backend.num_layers, adjustment)
        if self._states is not None:
            logits = self._states.forward(step, input_ids, metadata.positions, logits_of, context)
        elif fused is not None:
            logits = fused.run(input_ids, metadata.positions, logits_of, context)
        else:
            logits = flattened_forward(self.model, input_ids, metadata.positions, logits_of, context)
        context.check_complete()
        return logits.float()
