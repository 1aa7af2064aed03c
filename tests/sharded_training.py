"""Run by torchrun: M2D sharded over processes by FSDP takes the same steps as one that is not."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from m2d_embed.config import ModelConfig
from m2d_embed.model.encoder import Block
from m2d_embed.pretrain import objectives
from m2d_embed.pretrain.build import build_optimizers
from m2d_embed.pretrain.predictor import PredictorConfig
from m2d_embed.pretrain.recipe import load_recipe
from m2d_embed.training import run_state


def build():
    torch.manual_seed(0)
    config = ModelConfig(embed_dim=32, depth=2, num_heads=2, input_size=(80, 64))
    objective = objectives.M2D(config, PredictorConfig(16, 1, 2))
    objective.init_weights()
    return objective


def optimizers_of(objective, name):
    """SGD, with Muon for the matrices of blocks if asked; AdamW makes large steps of the least differences."""
    optimizers = []
    if name == "muon":
        recipe = load_recipe("debug", ["data.source=.", "training.optimizer=muon", "training.lr=0.0625"])
        optimizers = build_optimizers(objective, recipe)[1:]
    taken = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    others = [p for p in objective.parameters() if p.requires_grad and id(p) not in taken]
    return [*optimizers, torch.optim.SGD(others, lr=0.1, momentum=0.9)]


def main(name, tolerance):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    sharded, whole = build(), build()
    for module in [m for m in sharded.modules() if isinstance(m, Block)]:
        fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sides = [(sharded, optimizers_of(sharded, name)), (whole, optimizers_of(whole, name))]
    generator = torch.Generator().manual_seed(1)
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for _ in range(4):
        log_mel = torch.randn(4, 1, 80, 64, generator=generator)
        order = torch.stack([torch.randperm(20, generator=generator) for _ in range(4)])
        sharded(objectives.Example(log_mel[mine], order[mine], 6))["loss"].backward()
        whole(objectives.Example(log_mel, order, 6))["loss"].backward()
        for objective, optimizers in sides:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            objective.update_target(0.5)
    captured, _ = run_state.capture(*sides[0])
    if dist.get_rank() == 0:
        start, expected = build().state_dict(), whole.state_dict()
        assert captured.keys() == expected.keys()
        for name, tensor in expected.items():
            moved, apart = (tensor - start[name]).norm(), (tensor - captured[name]).norm()
            assert apart <= tolerance * moved + 1e-6, f"{name}: {apart} apart after moving {moved}"
        print("the same", flush=True)
    dist.barrier()
    # Nothing is taken down: gloo's own thread may hold the last reference to the group, and then aborts the process.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
