"""The time per token of torch.compile with tensor parallelism, in a CUDA graph, under torchrun:

PYTHONPATH=. torchrun --nproc-per-node 2 bench/rank_baseline.py --geometry Qwen3-8B --context 512

Rank 0 prints a line of JSON per context. With --reduce symmetric, torch's symmetric memory adds up instead of NCCL.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import torch
import torch.distributed as dist

from tri_mpk.baseline import measure_decoder
from tri_mpk.benchmark import SEED, environment
from tri_mpk.distributed import rank_device, world
from tri_mpk.geometries import geometry
from tri_mpk.rank_baseline import RankDecoder, nccl_reduce, symmetric_reduce
from tri_mpk.sharding import Shard, random_shard


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="Qwen3-8B")
    parser.add_argument("--context", nargs="+", type=int, default=[512])
    parser.add_argument("--reduce", choices=["nccl", "symmetric"], default="nccl")
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
    for row in measure_decoder(RankDecoder(model, shard, reduce), options.context):
        if rank == 0:
            facts = {"geometry": options.geometry, "reduce": options.reduce, **environment(device, world_size)}
            print(json.dumps(facts | row), flush=True)
    dist.barrier()
    torch.cuda.synchronize()
    sys.stdout.flush()
    os._exit(0)  # a process group that has been captured may never end


if __name__ == "__main__":
    main()
