"""Two gloo processes with FSDP2 as accelerate divides a task's module: state goes out whole and comes back sharded.

`sharded_run.py CASE`, one of CASES. Prints `equal` at the end where the weights are those of one process, which saw all samples and
was not interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sslsr_diffusion.models.condition import Condition, Text
from sslsr_diffusion.models.one_step.build import build_networks as build_one_step
from sslsr_diffusion.models.one_step.settings import OneStepSettings
from sslsr_diffusion.models.stablesr.build import build_networks
from sslsr_diffusion.models.stablesr.settings import StableSRSettings
from sslsr_diffusion.tasks.one_step import Generator
from sslsr_diffusion.training.engines import name_blocks
from sslsr_diffusion.training.state import full_tensor, load_optimizer_state_dict, load_trained, optimizer_state_dict, trained_parameters

Loss = Callable[[Any, int, slice], Tensor]  # wrapped module, step, which of the step's samples


def stablesr() -> tuple[nn.Module, Loss]:
    """The real denoiser at toy width, frozen parameters and all."""

    def loss(module: Any, step: int, samples: slice) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        z, text = (torch.randn(*shape, generator=generator) for shape in ((2, 8, 8, 8), (1, 1, 32)))
        return module(z[samples], torch.tensor([1, 500])[samples], Condition(z[samples], Text(text))).square().mean()

    return build_networks(StableSRSettings(init="random", preset="tiny"), train="sft").denoiser, loss


def one_step(train: str, **values: Any) -> tuple[nn.Module, Loss]:
    """A one-step upscaler whose LoRAs say something; with a LoRA on the encoder, the loss wants the ground truth's latents, too."""
    networks = build_one_step(OneStepSettings.model_validate({"init": "random", **values}), train=train)
    networks.economize(gradient_checkpointing=True, channels_last=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(networks).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    size, codec = networks.size(), networks.codec
    side = size.padded(16)

    def loss(module: Any, step: int, samples: slice) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        pixels = torch.rand(2, 3, side, side, generator=generator)[samples]
        noise = torch.randn(2, *codec.noise_shape(pixels)[1:], generator=generator)[samples]
        hr = (pixels, noise) if networks.settings.encoder_lora else None
        x0, sr, z0_hr = module(pixels, noise, None, codec.decode, hr)
        return (sr - pixels).square().mean() + (0 if z0_hr is None else (x0 - z0_hr).square().mean())

    return Generator(networks), loss


LORA = {"rank": 2, "targets": "attention"}
CASES: dict[str, Callable[[], tuple[nn.Module, Loss]]] = {
    "stablesr": stablesr,
    "sd_lora": lambda: one_step(
        "lora", preset="tiny", timestep=200, lora=LORA, encoder_lora={"rank": 2, "targets": ["conv1", "quant_conv"]}
    ),
    "flux2_lora": lambda: one_step("lora", preset="tiny_flux2", sigma=0.8, lora=LORA),
    "whole": lambda: one_step("whole", preset="tiny", timestep=200, lora=None),
}


def make(case: str, shard: bool) -> tuple[nn.Module, torch.optim.Optimizer, Loss]:
    torch.manual_seed(0)
    module, loss = CASES[case]()
    if shard:
        name_blocks(module)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True, cpu_ram_efficient_loading=False
        )
        state = SimpleNamespace(fsdp_plugin=plugin)  # an accelerator on the CPU would not look at the plugin
        fsdp2_prepare_model(SimpleNamespace(state=state, mixed_precision="no", is_main_process=dist.get_rank() == 0), module)
        assert sum(isinstance(part, FSDPModule) for part in module.modules()) > 2, "no block was divided by itself"
    # eps 1 makes the first steps proportional to the gradient
    return module, torch.optim.AdamW(trained_parameters(module).values(), lr=0.1, eps=1.0), loss


def train(made: tuple[nn.Module, torch.optim.Optimizer, Loss], steps: range, samples: slice) -> None:
    module, optimizer, loss = made
    for step in steps:
        loss(module, step, samples).backward()
        torch.nn.utils.clip_grad_norm_(trained_parameters(module).values(), 0.1)
        optimizer.step()
        optimizer.zero_grad()


def main(case: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own = slice(rank, rank + 1)  # one of two samples
    plain, first, second = (make(case, shard) for shard in (False, True, True))
    train(plain, range(3), slice(None))
    train(first, range(2), own)
    names = list(trained_parameters(first[0]))
    trained = {name: full_tensor(p) for name, p in trained_parameters(first[0]).items()}
    tensors, rest = optimizer_state_dict(first[1], names)
    assert all(tensors[f"{name}|exp_avg"].shape == trained[name].shape for name in names)
    load_trained(trained_parameters(second[0]), trained, what="test")
    load_optimizer_state_dict(second[1], trained_parameters(second[0]), tensors, rest)
    train(second, range(2, 3), own)
    for name, parameter in trained_parameters(plain[0]).items():
        torch.testing.assert_close(full_tensor(trained_parameters(second[0])[name]), parameter.detach(), rtol=1e-5, atol=1e-6)
    if rank == 0:
        print("equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
