"""One forward pass over a flattened batch, of a model with recurrent layers."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from radixkv.models.paged_attention import AttentionContext, flattened_forward
from radixkv.models.recurrent.facade import FlattenedCache
from radixkv.models.recurrent.modules import RecurrentModules
from radixkv.models.recurrent.split_step import SplitStep


def recurrent_forward(
    model: PreTrainedModel,
    modules: RecurrentModules,
    step: SplitStep,
    input_ids: Tensor,
    positions: Tensor,
    logits_of: Tensor,
    context: AttentionContext,
) -> Tensor:
    """As `flattened_forward`; `modules`, which are plugged in, read and write the states of `step`."""
    cache = FlattenedCache(positions, step)
    return flattened_forward(model, input_ids, positions, logits_of, modules.numbered(context, cache), cache)
