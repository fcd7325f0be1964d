"""The baseline on several ranks: each decodes with its shard, and torch's collectives add up what they have.

Two forms: NCCL's all-reduce, and that of torch's symmetric memory; both as part of one CUDA graph per token. A process
that has captured NCCL may hang when its process group goes, so `bench/rank_baseline.py` ends without that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tri_mpk.baseline import StaticCacheDecoder, attention_sdpa, attention_split
from tri_mpk.reference import decode_layer, rms_norm
from tri_mpk.sharding import Shard

Reduce = Callable[[Tensor], Tensor]


def nccl_reduce(part: Tensor) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(part, "sum", dist.group.WORLD))


def symmetric_reduce(hidden_size: int, dtype: torch.dtype, device: torch.device) -> Reduce:
    """One-shot, from two buffers that take turns: a peer may still read the last one."""
    import torch.distributed._symmetric_memory as symmetric_memory

    buffers = []
    for _ in range(2):
        buffers.append(symmetric_memory.empty(1, hidden_size, dtype=dtype, device=device))
        symmetric_memory.rendezvous(buffers[-1], dist.group.WORLD)
    name, calls = dist.group.WORLD.group_name, 0

    def reduce(part: Tensor) -> Tensor:
        nonlocal calls
        buffer = buffers[calls % 2]
        calls += 1
        buffer.copy_(part)
        return torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", name)

    return reduce


class RankDecoder(StaticCacheDecoder):
    """`StaticCacheDecoder` of a shard (see tri_mpk/sharding.py)."""

    def __init__(self, local_model: PreTrainedModel, shard: Shard, reduce: Reduce, attention: str = "sdpa"):
        super().__init__(local_model, max_seq_len=1, attention=attention)
        self.first_row, self.reduce = shard.first_row, reduce

    def _logits(self, token: Tensor, position: Tensor) -> Tensor:
        """This rank's rows of the vocabulary only."""
        attention = attention_sdpa if self.attention == "sdpa" else attention_split
        mask = self.positions <= position[:, None]

        def attend(idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._k_layers[idx].index_copy_(2, position, k)
            self._v_layers[idx].index_copy_(2, position, v)
            return attention(q, self._k_layers[idx], self._v_layers[idx], mask)

        row = token - self.first_row
        here = (row >= 0) & (row < len(self.embedding))
        x = self.reduce(F.embedding(row.clamp(0, len(self.embedding) - 1), self.embedding) * here[:, None])
        cos, sin = self.cos[position], self.sin[position]
        for idx, layer in enumerate(self.layers):
            x = decode_layer(x, idx, layer, self.shape, cos, sin, attend, self.reduce)
        return F.linear(rms_norm(x, self.norm, self.shape.eps), *self.lm_head)

    def next_token(self, token: Tensor, position: Tensor) -> Tensor:
        """The greedy next token, [1] int64, the same on all ranks."""
        value, row = self._logits(token, position).float().max(-1)
        mine = torch.stack((value, (row + self.first_row).float()), -1)  # rows are exact in fp32
        best = collectives.wait_tensor(collectives.all_gather_tensor(mine, 0, dist.group.WORLD))
        return best[:, 1].gather(0, best[:, 0].argmax(0, keepdim=True)).long()
