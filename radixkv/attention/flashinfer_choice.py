"""For which layers and on which machines FlashInfer's kernels are there."""

from __future__ import annotations

import torch

from radixkv.attention.backend import LayerAttention
from radixkv.kernels.flashinfer_paged import load

MIN_CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies
HEAD_DIMS = (64, 128, 256)  # for which the kernels that merge parts are compiled
DTYPES = (torch.float16, torch.bfloat16)

NO_FP4 = {  # compute capabilities on which FlashInfer does not read fp4 KV, or was seen to read it wrongly
    (10, 7): "does not decode over it there",
    (12, 0): "was seen to read it wrongly there where KV is split over many processors",
    (12, 1): "was seen to read it wrongly there where KV is split over many processors",
}


def why_not_layer(layer: LayerAttention) -> str | None:
    """Why the kernels for keys and values cannot compute a layer; None if they can."""
    kv, params = layer.kv, layer.params
    if kv.k_head_dim not in HEAD_DIMS or kv.v_head_dim != kv.k_head_dim:
        sizes = ", ".join(map(str, HEAD_DIMS))
        return f"knows heads of {sizes} with values like the keys, not {kv.k_head_dim} and {kv.v_head_dim}"
    if layer.num_q_heads % kv.num_kv_heads:
        return f"cannot share {kv.num_kv_heads} KV heads among {layer.num_q_heads} query heads"
    if params.chunk_size is not None:
        return "has no chunked attention"
    if params.sinks is not None or params.sink_tokens:
        return "has no attention sinks here"
    if params.key_bias is not None:
        return "has no biases of keys (ALiBi) here"
    return None


def why_not_fp4_here(device: torch.device) -> str | None:
    """Why FlashInfer's kernels cannot be used for fp4 KV on that device; None if they can."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if (reason := NO_FP4.get(capability)) is None:
        return None
    return "has no fp4 KV for compute capability {}.{}: FlashInfer {}".format(*capability, reason)


def why_not_here(device: torch.device) -> str | None:
    """Why FlashInfer does not run on that device; None if it does."""
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        return "needs compute capability {}.{}, and the GPU has {}.{}".format(*MIN_CAPABILITY, *capability)
    try:
        load()
    except ImportError as error:
        return f"is not there: {error}"
    return None
