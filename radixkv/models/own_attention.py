"""Attention modules that compute attention by themselves, in place of handing it to transformers' interface.

Their classes are older than the interface; `older_families` has them. Each makes its queries, keys and values, and its
output, as ever; what is replaced is what lies between. Some have a method for that, `_attn(query, key, value, mask)`,
and need no more than to say how they scale scores and how far they see. Others compute it in the middle of `forward`,
and a few lines take its place.

As with latents, a module gets a subclass of its own class while the model runs on pages, and nothing else changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from radixkv.attention.backend import AttentionParams
from radixkv.attention.key_bias import KeyBias
from radixkv.models.paged_attention import INTERFACE_NAME, current_context


class Place(NamedTuple):
    """Where a module stands in its model.

    Attributes:
        config: of the model; it says which attention is asked for.
        layer: its number.
        before: the attention implementation that the model had.
        biases: of the model's layers, by their dtype and device.
    """

    config: PretrainedConfig
    layer: int
    before: str
    biases: dict[tuple[torch.dtype, torch.device], KeyBias]


class OwnAttention(nn.Module):
    """An attention module that attends over pages while its model is plugged in, and else as ever."""

    radixkv: Place

    @property
    def is_plugged_in(self) -> bool:
        """Whether attention of ours is asked for."""
        return bool(self.radixkv.config._attn_implementation == INTERFACE_NAME)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None = None,
        make_biases: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Attention over the pages.

        Args:
            q, k, v: [1, heads, tokens, head_dim]
            make_biases: what the model adds to scaled scores, [num_q_heads, n] at n first positions.

        Returns: [1, tokens, num_q_heads, v_head_dim], in v's dtype.
        """
        place = self.radixkv
        context = current_context(self, place.config, place.before)
        bias = None
        if make_biases is not None:
            bias = place.biases.setdefault((v.dtype, v.device), KeyBias(make_biases))
        params = AttentionParams(scale=scale, sliding_window=window, key_bias=bias)
        flat_q, flat_k, flat_v = (states[0].transpose(0, 1).to(v.dtype) for states in (q, k, v))
        return context.attend(place.layer, flat_q, flat_k, flat_v, params)[None]


class AttentionMethod(OwnAttention):
    """A module whose `_attn` computes attention."""

    def _attn(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
        if not self.is_plugged_in:
            return super()._attn(query, key, value, attention_mask)  # type: ignore[misc]
        out = self.attend(query, key, value, scale=self._scale(), window=self._window())
        return out.transpose(1, 2), None

    def _scale(self) -> float:
        """The factor on scores."""
        raise NotImplementedError

    def _window(self) -> int | None:
        """How many tokens one sees, itself included; None for all."""
        return None


class AttentionInForward(OwnAttention):
    """A module whose `forward` is replaced by `forward_on_pages`, which takes what it reads of the same arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_on_pages(*args, **kwargs) if self.is_plugged_in else super().forward(*args, **kwargs)

    def forward_on_pages(self, *args: Any, **kwargs: Any) -> Any:
        """As `forward`, without weights."""
        raise NotImplementedError


@cache
def subclass(paged: type[OwnAttention], plain: type[nn.Module]) -> type[nn.Module]:
    """One for each class, so that copies and checks by `isinstance` find what they look for."""
    return type(f"Paged{plain.__name__}", (paged, plain), {"__module__": __name__})


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has when it is not replaced."""
    return type(module).__bases__[1] if isinstance(module, OwnAttention) else type(module)


def function_beside(module: nn.Module, name: str) -> Callable[..., Any]:
    """A function of the file that `module`'s class in transformers comes from."""
    function: Callable[..., Any] = getattr(sys.modules[plain_class(module).__module__], name)
    return function
