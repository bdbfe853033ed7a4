"""The families whose modules compute attention by themselves, each by what is different in it.

Bloom, Falcon, MPT, XGLM, GPT-J, CodeGen, GPT-Neo, the first GPT and GPT-NeoX-Japanese.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from radixkv.attention.key_bias import KeyBias
from radixkv.models.own_attention import (
    AttentionInForward,
    AttentionMethod,
    OwnAttention,
    Place,
    function_beside,
    plain_class,
    subclass,
)

# -- modules with a method of their own for attention ------------------------------------------------------------------


class DividedScores(AttentionMethod):
    """GPT-J and CodeGen."""

    scale_attn: float

    def _scale(self) -> float:
        return 1 / float(self.scale_attn)


class NormedScores(AttentionMethod):
    """GPT-NeoX-Japanese."""

    norm_factor: float

    def _scale(self) -> float:
        return 1 / float(self.norm_factor)


class LocalAndGlobal(AttentionMethod):
    """GPT-Neo, which does not scale scores, and some of whose layers see a window."""

    attention_type: str
    config: Any

    def _scale(self) -> float:
        return 1.0

    def _window(self) -> int | None:
        return int(self.config.window_size) if self.attention_type == "local" else None


class TransposedKeys(OwnAttention):
    """The first GPT, whose `_attn` takes keys with their components before their tokens."""

    scale: bool

    def _attn(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_plugged_in:
            return super()._attn(q, k, v, *args, **kwargs)  # type: ignore[misc]
        scale = v.shape[-1] ** -0.5 if self.scale else 1.0
        return [self.attend(q, k.mT, v, scale=scale).transpose(1, 2)]


# -- modules that compute attention within `forward` -------------------------------------------------------------------


class PagedBloom(AttentionInForward):
    """Bloom: `scale * <q, k> + alibi`."""

    num_heads: int
    inv_norm_factor: float
    query_key_value: nn.Module
    dense: nn.Module
    _reshape: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

    def forward_on_pages(self, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> Any:
        q, k, v = self._reshape(self.query_key_value(hidden_states))
        biases = partial(_alibi_of_mask, self._alibi(), self.num_heads, v.dtype, v.device)
        out = self.attend(q, k, v, scale=self.inv_norm_factor, make_biases=biases)
        return residual + self.dense(out.flatten(2)), None

    def _alibi(self) -> Callable[..., Tensor]:
        return function_beside(self, "build_alibi_tensor")


class PagedFalcon(AttentionInForward):
    """Falcon: `scale * <q, k>` of rotated queries and keys, or `scale * (<q, k> + alibi)`."""

    num_heads: int
    num_kv_heads: int
    inv_norm_factor: float
    new_decoder_architecture: bool
    query_key_value: nn.Module
    dense: nn.Module
    _split_heads: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

    def forward_on_pages(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        q, k, v = (states.transpose(1, 2) for states in self._split_heads(self.query_key_value(hidden_states)))
        if self.new_decoder_architecture:  # it repeats KV heads, and one of each is enough
            k, v = (states[:, :: self.num_heads // self.num_kv_heads] for states in (k, v))
        biases = None
        if alibi is None:
            assert position_embeddings is not None
            q, k = function_beside(self, "apply_rotary_pos_emb")(q, k, *position_embeddings)
        else:
            biases = partial(self._biases, v.dtype, v.device)
        out = self.attend(q, k, v, scale=self.inv_norm_factor, make_biases=biases)
        return self.dense(out.flatten(2)), None

    def _biases(self, dtype: torch.dtype, device: torch.device, num_tokens: int) -> Tensor:
        make = function_beside(self, "build_alibi_tensor")
        return _alibi_of_mask(make, self.num_heads, dtype, device, num_tokens) * self.inv_norm_factor


class PagedMpt(AttentionInForward):
    """MPT: `scale * <q, k> + alibi`, with slopes of its own."""

    n_heads: int
    softmax_scale: float
    clip_qkv: float | None
    Wqkv: nn.Module
    out_proj: nn.Module

    def forward_on_pages(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(-self.clip_qkv, self.clip_qkv)
        q, k, v = (part.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for part in mixed.chunk(3, dim=2))
        out = self.attend(q, k, v, scale=self.softmax_scale, make_biases=partial(self._biases, v.device))
        return self.out_proj(out.flatten(2)), None

    def _biases(self, device: torch.device, num_tokens: int) -> Tensor:
        """Counted from the last position, as distances are what matters."""
        biases: Tensor = function_beside(self, "build_mpt_alibi_tensor")(self.n_heads, num_tokens, device=device)
        return biases.flatten(1)


class PagedXglm(AttentionInForward):
    """XGLM, which scales its queries."""

    num_heads: int
    scaling: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def forward_on_pages(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        q, k, v = (
            project(hidden_states).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(self.attend(q, k, v, scale=self.scaling).flatten(2)), None


class UnmaskedMpt(OwnAttention):
    """MPT's decoder, which turns the mask that it makes into another dtype even where there is none to make."""

    wte: nn.Embedding

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_plugged_in:
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.wte.weight.device)
            kwargs["attention_mask"] = mask  # taken as it is, unread
        return super().forward(*args, **kwargs)


# -- which ones there are ----------------------------------------------------------------------------------------------

KNOWN: Mapping[str, type[OwnAttention]] = {
    "bloom.modeling_bloom.BloomAttention": PagedBloom,
    "codegen.modeling_codegen.CodeGenAttention": DividedScores,
    "falcon.modeling_falcon.FalconAttention": PagedFalcon,
    "gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": LocalAndGlobal,
    "gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention": NormedScores,
    "gptj.modeling_gptj.GPTJAttention": DividedScores,
    "mpt.modeling_mpt.MptAttention": PagedMpt,
    "mpt.modeling_mpt.MptModel": UnmaskedMpt,
    "openai.modeling_openai.Attention": TransposedKeys,
    "xglm.modeling_xglm.XGLMAttention": PagedXglm,
}
"""By the names of transformers' classes, below `transformers.models`."""


def replace_own_attention(model: PreTrainedModel, before: str) -> None:
    """Let those modules of `model` that compute attention by themselves attend over pages, as far as they are known.

    before: the attention implementation to go back to.
    """
    biases: dict[tuple[torch.dtype, torch.device], KeyBias] = {}
    found = 0
    for module in model.modules():
        plain = plain_class(module)  # one that was switched back is replaced again: its model has another config now
        paged = KNOWN.get(f"{plain.__module__}.{plain.__qualname__}".removeprefix("transformers.models."))
        if paged is not None:
            numbers = (getattr(module, name, None) for name in ("layer_idx", "layer_id"))
            layer = next((number for number in numbers if number is not None), found)  # some do not know theirs
            module.radixkv = Place(model.config, layer, before, biases)
            module.__class__ = subclass(paged, plain)  # type: ignore[arg-type]  # a class is hashable
            found += 1
    if found:  # now it can be switched, as models with the interface can
        model._can_set_attn_implementation = _yes


def restore_own_attention(model: nn.Module) -> None:
    """Undo `replace_own_attention`."""
    for module in model.modules():
        if isinstance(module, OwnAttention):
            module.__class__ = plain_class(module)  # type: ignore[assignment]
            del module.radixkv
    vars(model).pop("_can_set_attn_implementation", None)


def _yes() -> bool:
    return True


def _alibi_of_mask(
    make: Callable[..., Tensor], num_heads: int, dtype: torch.dtype, device: torch.device, num_tokens: int
) -> Tensor:
    """What `build_alibi_tensor` makes for a sequence of so many tokens without padding: [num_heads, num_tokens]."""
    mask = torch.ones(1, num_tokens, dtype=torch.int64, device=device)
    return make(mask, num_heads, dtype).flatten(1)
