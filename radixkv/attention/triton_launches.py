"""How much the Triton kernels launch at once, so that the programs of a batch fill the device."""

from __future__ import annotations

import torch

from radixkv.attention.backend import AttentionNeeds, LayerAttention
from radixkv.kernels.triton_paged import decode_programs, tile_rows

PROGRAMS_PER_SM = 8  # of a decode: twice as many as run at once, so that unequal lengths even out
MAX_SPLITS = 128


class Launches:
    """Splits and tiles for the layers of one model on one device.

    Attributes:
        groups: the sizes of groups that layers have, query heads for each KV head, ascending.
    """

    def __init__(self, needs: AttentionNeeds) -> None:
        self._head_dim, self._dtype = largest_head_dim(needs), needs.dtype
        self.groups = sorted({group_size(layer) for layer in needs.layers})
        self._num_kv_heads = min(layer.kv.num_kv_heads for layer in needs.layers)
        self._split_programs = min(decode_programs(group_size(layer), layer.kv.num_kv_heads) for layer in needs.layers)
        self._num_sms = 1
        if needs.device.type == "cuda":
            self._num_sms = torch.cuda.get_device_properties(needs.device).multi_processor_count

    @property
    def num_wanted_tiles(self) -> int:
        """How many programs of tiles fill the device."""
        return 2 * self._num_sms

    def num_programs(self, num_tiles: int) -> int:
        """How many programs so many tiles are."""
        return num_tiles * self._num_kv_heads

    def decode_splits(self, num_decodes: int) -> int:
        """Splits of each decode, which follow from the number of decodes and the device alone."""
        programs = max(1, num_decodes) * self._split_programs
        return min(MAX_SPLITS, -(-PROGRAMS_PER_SM * self._num_sms // programs))

    def part_splits(self, num_queries: int) -> int:
        """Splits of a part that `num_queries` decodes share, where its tiles have up to 128 rows."""
        return -(-self.num_wanted_tiles // self.num_programs(-(-num_queries * self.groups[0] // 128)))

    def tile_rows(self, num_queries: int) -> dict[int, int]:
        """Rows of a tile, for each size of a group, where no sequence or part has more queries than `num_queries`."""
        return {group: tile_rows(num_queries * group, self._head_dim, self._dtype) for group in self.groups}


def group_size(layer: LayerAttention) -> int:
    """Query heads for each KV head."""
    return layer.num_q_heads // layer.kv.num_kv_heads


def largest_head_dim(needs: AttentionNeeds) -> int:
    """Values of the largest head."""
    return max(max(layer.kv.k_head_dim, layer.kv.v_head_dim) for layer in needs.layers)
