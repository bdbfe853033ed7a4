"""Refuses configs with a setting about heads, groups, sharing or layers that the size of KV may hang on unread."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from radixkv.errors import UnsupportedModelError
from radixkv.memory.config_fields import NAMES, Fields, model_name

# Words of a name that speak of what is kept per token, or of which layers keep it.
_SMELLS = re.compile(
    r"(^|_)(heads?|headed|groups?|grouped|kv|kvs|keys?|query|queries|quer(y|ies)_.*|multi_?query|multiquery|mqa|gqa|mla|cla|yoco"
    r"|shar(e|ed|es|ing)|reuse[sd]?|tied|layers?|latents?|compress\w*|index|indexer|lora|attn|attention)(_|$)"
)
# Parts of a name after which it speaks of something else: experts, encoders of images and sound, training, norms, …
_HARMLESS = re.compile(
    r"norm|drop|bias|init|eps|scale|scaling|multiplier|logit|softmax|rope|rotary|expert|moe|mlp|ffn|mamba|ssm|conv|linear_"
    r"|vision|visual|image|img|audio|speech|video|embed|lm_head|output_|_token|token_|mtp|nextn|predict|loss|adapter|gate"
    r"|dense|sparse_step|decoder_sparse|deepstack|feature|encoder|backend|impl|_token_id|freez|ignore|resampl|perceiver"
    r"|mask|position|temperature|alpha|beta|fp32|upcast|flash|tie_word"
)
# Words that are about keys and values whatever stands beside them, but for these.
_STRONG = re.compile(r"shar(e|ed|es|ing)|reus|(^|_)(kv|kvs|cla|yoco|mqa|gqa)(_|$)|multi_?query")
_NOT_STRONG = re.compile(r"expert|moe|embed|norm|intermediate|mtp|swiglu|projection|adapter|linear_")
_READ = {name for names in NAMES.values() for name in names} | {
    "architectures", "attention_bias", "attention_chunk_size", "attention_k_eq_v", "attn_config", "attn_layer_indices",
    "attn_layer_offset", "attn_layer_period", "attn_type_list", "block_configs", "cla_share_factor", "full_attn_idxs",
    "full_attention_interval", "hybrid_layer_pattern", "index_head_dim", "index_n_heads", "index_skip_topk_offset",
    "index_topk", "index_topk_freq", "index_topk_pattern", "indexer_types", "kv_lora_rank", "layer_group_size",
    "layer_types", "layers_block_type", "linear_attn_config", "max_window_layers", "multi_query",
    "multi_query_attention", "multi_query_group_num", "multiquery", "n_shared_head", "num_attention_heads_per_layer",
    "num_global_key_value_heads", "global_head_dim", "swa_v_head_dim", "num_kv_shared_layers",
    "per_layer_config", "use_cla",
}  # fmt: skip
# Settings of transformers' own config classes, and of published models, that change nothing about what is kept.
_KNOWN_HARMLESS = {
    "aligner_num_add_layers", "attention_context_left", "attention_downsample_rate", "attention_hidden_size",
    "attention_layers", "attention_types", "attention_window", "attention_window_size", "attn_impl",
    "attn_uses_sequence_id", "clip_qkv", "compress", "cross_attention_frequency", "cross_attention_layers",
    "cross_attn_all_layers", "cross_attn_k", "d_head", "d_kv", "decode_index", "decoder_num_attention_heads",
    "decoder_num_hidden_layers", "depth_separable_num_layers", "enc_attention_channels", "fast_qkv",
    "first_k_dense_replace", "flow_head_config", "global_attn_every_n_layers", "global_attn_indexes", "group_detr",
    "head_config", "head_in_index", "head_ratio", "hidden_size_per_layer_input", "hybrid_layer_ids",
    "insert_layer_id", "interleave_moe_layer_step", "intermediate_groups", "intermediate_layers_indices",
    "iou_head_depth", "iou_head_hidden_dim", "k_groups", "key_query_shared_bottleneck", "latent_dim", "latent_stride",
    "local_attention", "look_ahead_layers", "look_backward_layers", "merge_index", "mit_num_attention_heads",
    "n_group", "n_groups", "n_layers_per_attn_res_block", "no_rope_layer_interval", "no_rope_layers",
    "num_code_groups", "num_codevector_groups", "num_codevectors_per_group", "num_expert_group",
    "num_feat_extract_layers", "num_first_full_attention_layers", "num_global_layers",
    "num_key_value_attention_heads", "num_key_value_groups", "num_last_full_attention_layers", "num_layers_per_stack",
    "num_ln_in_parallel_attn", "num_mel_attn_blocks", "num_mem_blocks", "num_pooler_layers", "num_queries",
    "num_query_groups", "num_sliding_attention_heads", "parallel_attn", "pred_num_attention_heads",
    "pred_num_hidden_layers", "q_groups",
    "q_lora_rank", "qk_head_dim", "qk_nope_head_dim", "query_pre_attn_scalar", "relative_attention",
    "relative_attention_max_distance", "relative_attention_num_buckets", "share_att_key", "subsample_layers",
    "swa_head_dim", "swa_num_attention_heads", "swa_num_key_value_heads", "target_layer_ids", "topk_group",
    "upsample_groups", "use_attention_sinks", "use_auxiliary_head", "use_bidirectional_attention",
    "use_continuous_quantile_head", "use_entity_aware_attention", "use_head", "v_groups", "v_head_dim",
    "vocab_size_per_layer_input",
}  # fmt: skip


def refuse_unknown_sharing(fields: Fields) -> None:
    """Refuse a config that states how layers or heads are grouped or share in a way that is not known here.

    Left out, such a setting makes the size too high by the whole factor, without a word. O(fields).

    Raises: UnsupportedModelError that names the settings.
    """
    attention = fields.get("attn_config")
    unknown = [name for name, value in fields.items() if _is_unknown(name, value)]
    if isinstance(attention, Mapping):
        unknown += [f"attn_config.{name}" for name, value in attention.items() if _is_unknown(name, value)]
    if unknown:
        stated = ", ".join(unknown)
        raise UnsupportedModelError(
            f"the KV size of {model_name(fields)} cannot be read: the meaning of {stated} for keys and values is not "
            "known here; leave it out if it has none"
        )


def _is_unknown(name: str, value: Any) -> bool:
    if value is None or value is False or isinstance(value, (str, float)) or value in (0, 1, [], {}):
        return value is True and _is_unknown(name, 2)
    if name in _READ or name in _KNOWN_HARMLESS:
        return False
    if _STRONG.search(name):
        return _NOT_STRONG.search(name) is None
    return _SMELLS.search(name) is not None and _HARMLESS.search(name) is None
