"""Two gloo processes with fully_shard over the denoiser: state goes out whole and comes back sharded. Prints `equal` at the end."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.stablesr.build import build_networks
from sslsr_diffusion.models.stablesr.denoiser import Denoiser
from sslsr_diffusion.models.stablesr.settings import StableSRSettings
from sslsr_diffusion.training.state import full_tensor, load_optimizer_state_dict, load_trained, optimizer_state_dict, trained_parameters


def make(shard: bool) -> tuple[Denoiser, torch.optim.Optimizer]:
    """The real denoiser at toy width, frozen parameters and all, divided block by block as configs/accelerate/fsdp2.yaml asks."""
    torch.manual_seed(0)
    module = build_networks(StableSRSettings(init="random", preset="tiny"), train="sft").denoiser
    if shard:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        blocks = [part for part in module.modules() if type(part).__name__ == "BasicTransformerBlock"]
        for part in (*blocks, module):
            fully_shard(part, mesh=mesh)
    # eps 1 makes the first steps proportional to the gradient
    return module, torch.optim.AdamW(trained_parameters(module).values(), lr=0.1, eps=1.0)


def train(module: Denoiser, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        z, text = (torch.randn(*shape, generator=generator) for shape in ((2, 8, 8, 8), (1, 1, 32)))
        module(z, torch.tensor([1, 500]), Condition(z, Text(text))).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained_parameters(module).values(), 0.1)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    dist.init_process_group("gloo")
    plain, plain_optimizer = make(shard=False)
    train(plain, plain_optimizer, range(4))
    first, first_optimizer = make(shard=True)
    train(first, first_optimizer, range(2))
    names = list(trained_parameters(first))
    trained = {name: full_tensor(p) for name, p in trained_parameters(first).items()}
    tensors, rest = optimizer_state_dict(first_optimizer, names)
    assert all(tensors[f"{name}|exp_avg"].shape == trained[name].shape for name in names)
    second, second_optimizer = make(shard=True)
    load_trained(trained_parameters(second), trained, what="test")
    load_optimizer_state_dict(second_optimizer, trained_parameters(second), tensors, rest)
    train(second, second_optimizer, range(2, 4))
    for name, parameter in trained_parameters(plain).items():
        torch.testing.assert_close(full_tensor(trained_parameters(second)[name]), parameter.detach(), rtol=1e-5, atol=1e-6)
    if dist.get_rank() == 0:
        print("equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
