"""The baseline on several ranks: each decodes with its shard, and torch's collectives add up what they have.

Two forms: NCCL's all-reduce, and that of torch's symmetric memory; both as part of one CUDA graph per token. A process
that has captured NCCL may hang when its process group goes, so measuring is a command of its own, which ends without
that; rank 0 prints a line of JSON per context:

    torchrun --nproc-per-node 2 -m tri_mpk.rank_baseline --geometry Qwen3-8B --context 512
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from transformers import PreTrainedModel

from tri_mpk.baseline import ATTENTIONS, StaticCacheDecoder, measure_decoder
from tri_mpk.benchmark import SEED, environment
from tri_mpk.distributed import rank_device, world
from tri_mpk.geometries import geometry
from tri_mpk.sharding import Shard, random_shard

Reduce = Callable[[Tensor], Tensor]
REDUCES = ("nccl", "symmetric")
BASELINE_BOUND_S = 900.0  # a compilation takes a minute


def nccl_reduce(part: Tensor) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(part, "sum", dist.group.WORLD))


def symmetric_reduce(hidden_size: int, dtype: torch.dtype, device: torch.device) -> Reduce:
    """One-shot. One buffer will do: the kernel behind it waits for all ranks before it reads and before it ends."""
    import torch.distributed._symmetric_memory as symmetric_memory

    buffer = symmetric_memory.empty(1, hidden_size, dtype=dtype, device=device)
    symmetric_memory.rendezvous(buffer, dist.group.WORLD)
    name = dist.group.WORLD.group_name
    return lambda part: torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, part, "sum", name)


class RankDecoder(StaticCacheDecoder):
    """`StaticCacheDecoder` of a shard (see tri_mpk/sharding.py)."""

    def __init__(self, local_model: PreTrainedModel, shard: Shard, reduce: Reduce, attention: str = "sdpa"):
        super().__init__(local_model, max_seq_len=1, attention=attention)
        self.first_row, self.reduce = shard.first_row, reduce

    def embed(self, token: Tensor) -> Tensor:
        row = token - self.first_row
        here = (row >= 0) & (row < len(self.embedding))
        return self.reduce(super().embed(row.clamp(0, len(self.embedding) - 1)) * here[:, None])

    def choose(self, x: Tensor) -> Tensor:
        """The greedy next token, the same on all ranks; `logits` are of this rank's rows of the vocabulary only."""
        value, row = self.logits(x).float().max(-1)
        mine = torch.stack((value, (row + self.first_row).float()), -1)  # rows are exact in fp32
        best = collectives.wait_tensor(collectives.all_gather_tensor(mine, 0, dist.group.WORLD))
        return best[:, 1].gather(0, best[:, 0].argmax(0, keepdim=True)).long()


def run_baseline(
    name: str,
    contexts: Sequence[int],
    reduces: Sequence[str] = REDUCES,
    attentions: Sequence[str] = ATTENTIONS,
    bound_s: float = BASELINE_BOUND_S,
) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The fastest way for each context, on rank 0, and what went wrong. All ranks of torchrun call this.

    Each runs the command above in a process of its own, once per way to add up, beside a store of its own.
    """
    best: dict[int, dict[str, Any]] = {}
    problems = []
    for number, reduce in enumerate(reduces, 1):
        command = [sys.executable, "-m", __name__, "--geometry", name, "--reduce", reduce]
        command += ["--context", *map(str, contexts), "--attention", *attentions]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
        environment["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + number)
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=bound_s)
        except subprocess.TimeoutExpired:
            problems.append(f"the baseline with {reduce} took longer than {bound_s:g} s")
            continue
        if done.returncode:
            problems.append(f"the baseline with {reduce} failed: {done.stderr.strip()[-500:]}")
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        for row in rows:
            tried = {f"{reduce} {way}": ms for way, ms in row["tried"].items()}
            others = best.get(row["context"], row | {"tried": {}})
            best[row["context"]] = min(others, row, key=lambda each: each["ms_p50"]) | {
                "tried": others["tried"] | tried
            }
    return best, problems


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="Qwen3-8B")
    parser.add_argument("--context", nargs="+", type=int, default=[512])
    parser.add_argument("--reduce", choices=REDUCES, default="nccl")
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    options = parser.parse_args(arguments)
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    device = rank_device()
    dist.init_process_group("nccl", device_id=device)
    rank, world_size = world()
    config = geometry(options.geometry)
    shard = Shard(config, rank, world_size)
    model = random_shard(shard, SEED, torch.bfloat16, device).requires_grad_(False)
    reduce = nccl_reduce
    if options.reduce == "symmetric":
        reduce = symmetric_reduce(config.hidden_size, torch.bfloat16, device)
    for row in measure_decoder(RankDecoder(model, shard, reduce), options.context, attentions=options.attention):
        if rank == 0:
            facts = {"geometry": options.geometry, "reduce": options.reduce, **environment(device, world_size)}
            print(json.dumps(facts | row), flush=True)
    dist.barrier()
    torch.cuda.synchronize()
    sys.stdout.flush()
    os._exit(0)  # a process group that has been captured may never end


if __name__ == "__main__":
    main()
