"""Two gloo processes with FSDP2 as accelerate divides a task's module: state goes out whole and comes back sharded.

`sharded_run.py CASE`, one of CASES. Prints `equal` at the end where the weights are those of one process, which saw all samples and
was not interrupted. HALF are as the recipes of the flows have it: a frozen network held in bfloat16 beside a float32 LoRA, and
training.mixed_precision bf16.
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
from sslsr_diffusion.training.engines import name_blocks, set_sharding
from sslsr_diffusion.training.state import full_tensor, load_optimizer_state_dict, load_trained, optimizer_state_dict, trained_parameters

Loss = Callable[[Any, int, slice], Tensor]  # wrapped module, step, which of the step's samples


def stablesr() -> tuple[nn.Module, Loss]:
    """The real denoiser at toy width, frozen parameters and all."""

    def loss(module: Any, step: int, samples: slice) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        z, text = (torch.randn(*shape, generator=generator) for shape in ((2, 8, 8, 8), (1, 1, 32)))
        return module(z[samples], torch.tensor([1, 500])[samples], Condition(z[samples], Text(text))).square().mean()

    return build_networks(StableSRSettings(init="random", preset="tiny"), train="sft").denoiser, loss


def one_step(train: str, frozen: torch.dtype = torch.float32, **values: Any) -> tuple[nn.Module, Loss]:
    """A one-step upscaler whose LoRAs say something; with a LoRA on the encoder, the loss wants the ground truth's latents, too.
    `frozen`: how the weights of the network that do not train are held.
    """
    networks = build_one_step(OneStepSettings.model_validate({"init": "random", **values}), train=train)
    for parameter in networks.denoiser.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen)
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
    "sd3_bfloat16": lambda: one_step("lora", torch.bfloat16, preset="tiny_sd3", sigma=0.36, lora=LORA),
    "flux2_bfloat16": lambda: one_step("lora", torch.bfloat16, preset="tiny_flux2", sigma=0.8, lora=LORA),
    "zimage_bfloat16": lambda: one_step("lora", torch.bfloat16, preset="tiny_zimage", sigma=0.8, lora=LORA),
}
HALF = {case for case in CASES if case.endswith("_bfloat16")}


def make(case: str, shard: bool) -> tuple[nn.Module, torch.optim.Optimizer, Loss]:
    torch.manual_seed(0)
    module, loss = CASES[case]()
    precision = "bf16" if case in HALF else "no"
    if shard:
        name_blocks(module)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True, cpu_ram_efficient_loading=True
        )  # as `accelerate launch` makes it by configs/accelerate/fsdp2.yaml, and with a precision
        if case in HALF:
            plugin.set_mixed_precision(precision)
        set_sharding(plugin, precision)
        accelerator = SimpleNamespace(  # one on the CPU would not look at the plugin
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision=precision,
            is_main_process=dist.get_rank() == 0,
            device=torch.device("cpu"),
        )
        fsdp2_prepare_model(accelerator, module)
        assert sum(isinstance(part, FSDPModule) for part in module.modules()) > 2, "no block was divided by itself"
    # eps 1 makes the first steps proportional to the gradient
    return module, torch.optim.AdamW(trained_parameters(module).values(), lr=0.1, eps=1.0), loss


def train(made: tuple[nn.Module, torch.optim.Optimizer, Loss], steps: range, micro: list[slice], half: bool) -> None:
    module, optimizer, loss = made
    for step in steps:
        for samples in micro:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                value = loss(module, step, samples) / len(micro)
            value.backward()
        torch.nn.utils.clip_grad_norm_(trained_parameters(module).values(), 0.1)
        optimizer.step()
        optimizer.zero_grad()


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(parameter).detach().clone() for name, parameter in trained_parameters(module).items()}


def main(case: str) -> None:
    dist.init_process_group("gloo")
    rank, half = dist.get_rank(), case in HALF
    own = [slice(rank, rank + 1)]  # one of two samples
    both = [slice(0, 1), slice(1, 2)] if half else [slice(0, 2)]  # rounded sums of a larger batch are others
    plain, first, second = (make(case, shard) for shard in (False, True, True))
    train(plain, range(3), both, half)
    train(first, range(2), own, half)
    trained = whole(first[0])
    tensors, rest = optimizer_state_dict(first[1], list(trained))
    assert all(tensors[f"{name}|exp_avg"].shape == tensor.shape for name, tensor in trained.items())
    load_trained(trained_parameters(second[0]), trained, what="test")
    load_optimizer_state_dict(second[1], trained_parameters(second[0]), tensors, rest)
    for made in (first, second):
        train(made, range(2, 3), own, half)
    torch.testing.assert_close(whole(second[0]), whole(first[0]), rtol=0, atol=0)
    torch.testing.assert_close(whole(second[0]), whole(plain[0]), rtol=1e-5, atol=1e-6)
    if half:  # a step is small beside what AdamW's decay takes of the matrix A; the means of the gradients are compared by themselves
        want, got = (optimizer_state_dict(optimizer, list(trained))[0] for _, optimizer, _ in (plain, second))
        for name in (f"{name}|exp_avg" for name in trained):
            assert (got[name] - want[name]).norm() <= 1e-3 * want[name].norm(), name
    if rank == 0:
        print("equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
