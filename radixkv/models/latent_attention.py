"""Latent attention (MLA) in absorbed form: what attends is the compressed vector, which is never expanded.

DeepSeek-V2 (2024, section 2.1) keeps per token a latent c and a rotary key r that all heads share. Head h has the key
(U_h c, r) and the value W_h c, where `kv_b_proj` holds U_h and W_h. Matrix products associate, so

    score = <q, U_h c> + <p, r> = <U_h^T q, c> + <p, r>       q and p: the query's parts without and with rotation
    out   = sum_j w_j W_h c_j   = W_h sum_j w_j c_j           w: the softmax of the scores

and attention runs over (c, r) itself, as if it were one head's key whose first part is also its value: U_h is absorbed
into the queries and W_h into the outputs. That reads `kv_lora_rank + qk_rope_head_dim` values a token for all heads.

transformers' classes of this kind compute c and r, each in its own way, and hand them to their method `expand_kv`. So
that method alone is replaced, and whatever a model does to its queries, latents and angles stays as it is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from radixkv.attention.backend import AttentionParams
from radixkv.models.paged_attention import INTERFACE_NAME, AttentionContext

MARKS = ("kv_b_proj", "expand_kv", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
ABSORBED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # others are codes with scales beside


class LatentAttention(nn.Module):
    """An attention module of transformers that attends in absorbed form where its context is ours, and else as ever.

    Made of a plain one by `absorb_projections`, which changes its class and nothing else.
    """

    config: Any
    kv_b_proj: nn.Linear  # [num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank]
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int

    def forward(self, *args: Any, radixkv: AttentionContext | None = None, **kwargs: Any) -> Any:
        if radixkv is not None:
            kwargs["radixkv"] = _AbsorbingContext(self, radixkv)
        return super().forward(*args, **kwargs)

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """From the latents [batch, 1, tokens, kv_lora_rank] and the rotary keys: both as one key, the latent as value.

        Under another attention implementation: the keys and values of all heads.
        """
        if self.config._attn_implementation != INTERFACE_NAME:
            expanded: tuple[Tensor, Tensor] = super().expand_kv(kv_nope, k_rot)  # type: ignore[misc]
            return expanded
        return torch.cat([kv_nope, k_rot], dim=-1), kv_nope

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """U [num_heads, qk_nope_head_dim, kv_lora_rank] and W [num_heads, v_head_dim, kv_lora_rank]; views."""
        by_head = self.kv_b_proj.weight.unflatten(0, (-1, self.qk_nope_head_dim + self.v_head_dim))
        up_k, up_v = by_head.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        return up_k, up_v


class _AbsorbingContext:
    """Stands before a context during one attention call, and hands it queries for latents."""

    def __init__(self, module: LatentAttention, context: AttentionContext) -> None:
        self._module = module
        self._context = context

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """As `AttentionContext.attend`, where k and v are what `LatentAttention.expand_kv` returned."""
        up_k, up_v = self._module.up_projections()
        q_nope, q_rot = q.tensor_split([self._module.qk_nope_head_dim], dim=-1)
        q_latent = _by_head(q_nope, up_k)  # [tokens, num_heads, kv_lora_rank]
        out = self._context.attend_latent(layer, torch.cat([q_latent, q_rot], dim=-1), k, v.shape[-1], params)
        return _by_head(out, up_v.mT)

    def attend_latent(self, layer: int, q: Tensor, k: Tensor, latent_dim: int, params: AttentionParams) -> Tensor:
        raise AssertionError("what stands before it is its own module, which knows `attend` alone")


def absorb_projections(model: nn.Module) -> None:
    """Let the latent attention modules of `model` attend in absorbed form: those whose up-projection is a plain matrix.

    Others, such as quantised ones, go on to expand their keys and values.
    """
    for module in model.modules():
        if _can_absorb(module):
            module.__class__ = _latent_class(type(module))  # type: ignore[arg-type]  # a class is hashable


def expand_again(model: nn.Module) -> None:
    """Undo `absorb_projections`."""
    for module in model.modules():
        if isinstance(module, LatentAttention):
            module.__class__ = type(module).__bases__[1]


def why_not_latent(model: nn.Module) -> str | None:
    """Why latent attention as `model` has it cannot run on pages; None if it can, or if there is none."""
    for module in model.modules():
        if hasattr(module, "kv_lora_rank") and getattr(module, "indexer", None) is not None:
            return "its attention is sparse, and the keys of the indexer that picks what is read are not kept in pages"
    return None


def _can_absorb(module: nn.Module) -> bool:
    if isinstance(module, LatentAttention) or not all(hasattr(module, mark) for mark in MARKS):
        return False
    up = module.kv_b_proj
    if not isinstance(up, nn.Linear) or [name for name, _ in up.named_parameters()] != ["weight"]:
        return False
    return up.weight.dtype in ABSORBED_DTYPES


@cache
def _latent_class(plain: type[nn.Module]) -> type[nn.Module]:
    """One subclass for each class, so that copies and checks by `isinstance` find what they look for."""
    return type(f"Latent{plain.__name__}", (LatentAttention, plain), {"__module__": __name__})


def _by_head(x: Tensor, matrices: Tensor) -> Tensor:
    """x [tokens, heads, n] times each head's matrix, [heads, n, m]. Returns: [tokens, heads, m]."""
    return (x.transpose(0, 1) @ matrices).transpose(0, 1)
