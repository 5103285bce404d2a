"""Merged one-step models and where their parts come from; networks whose weights are held in whole numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from one_step_cases import TOYS, save_base, toy, toy_settings, with_loras
from pydantic import ValidationError
from test_one_step import picture, restorer
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.open import find_model, open_model
from sslsr_diffusion.models.base import Base
from sslsr_diffusion.models.networks import working_dtype
from sslsr_diffusion.models.one_step.build import build_networks
from sslsr_diffusion.models.one_step.networks import OneStepNetworks
from sslsr_diffusion.models.one_step.result import write_whole
from sslsr_diffusion.models.process import DDPM
from sslsr_diffusion.tasks.one_step import OneStepTask


def test_a_merged_model_that_was_drawn_keeps_what_its_lora_learned(tmp_path: Path) -> None:
    networks = with_loras("sd3", tmp_path, init="random")
    want, base = picture(restorer(networks)), picture(restorer(networks), lora_scale=0)
    assert (base - want).abs().max() > 1e-2
    networks.merge()
    restorer(networks).save(tmp_path / "whole")
    assert (picture(open_model(find_model(str(tmp_path / "whole")), device="cpu")) - want).abs().max() < 1e-4


def test_a_whole_model_has_the_parts_of_the_index_alone(tmp_path: Path) -> None:
    base = tmp_path / "base"
    for name in ("tokenizer", "samples", ".cache", "vae"):
        (base / name).mkdir(parents=True)
    process = DDPM(torch.linspace(0.999, 0.05, 10), {})
    for number, index in enumerate([{"tokenizer": ["transformers", "CLIPTokenizer"], ".cache": []}, None]):
        if index:
            (base / "model_index.json").write_text(json.dumps(index))
        else:
            (base / "model_index.json").unlink()
        (tmp_path / f"{number}").mkdir()
        write_whole(tmp_path / f"{number}", {}, process, Base("base", base))
    assert {path.name for path in (tmp_path / "0").iterdir()} == {"tokenizer", "model_index.json"}
    assert {path.name for path in (tmp_path / "1").iterdir()} == {"tokenizer", "samples", "vae"}


class WholeNumbers(nn.Module):
    """A linear layer whose weights are bytes, as bitsandbytes holds them; it computes in its input's precision."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.step = float(layer.weight.abs().max()) / 127
        self.weight = nn.Parameter((layer.weight / self.step + 128).round().to(torch.uint8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight.to(x.dtype) - 128) * self.step, self.bias)


def test_a_network_that_begins_with_weights_in_whole_numbers() -> None:
    networks = toy("flux2")
    want = picture(restorer(networks))
    network = networks.denoiser.network
    for name, layer in list(network.named_modules()):
        if type(layer) is nn.Linear and ".lora_" not in name:
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, WholeNumbers(layer))
    assert next(networks.denoiser.parameters()).dtype == torch.uint8
    upscale = restorer(networks)
    assert (picture(upscale) - want).abs().max() < 0.05, "bytes round the weights"
    assert upscale.memory_model()._widths == {"denoiser": 4, "codec": 4}
    networks.denoiser.network = network.bfloat16()
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    assert working_dtype(networks.denoiser) == torch.bfloat16, "a LoRA's float32 does not count"


@pytest.mark.parametrize("kind", TOYS)
def test_drawn_weights_are_held_as_a_bases_and_as_the_estimate_counts_them(kind: str, tmp_path: Path) -> None:
    def held(meta: bool, **values: Any) -> dict[str, torch.dtype]:
        networks: OneStepNetworks = build_networks(toy_settings(kind, weights="bfloat16", **values), meta=meta)
        return {name: parameter.dtype for name, parameter in networks.named_parameters()}

    drawn = held(meta=False)
    assert {dtype for name, dtype in drawn.items() if name.startswith("denoiser.") and ".lora_" not in name} == {torch.bfloat16}
    assert {dtype for name, dtype in drawn.items() if name.startswith("codec.") or ".lora_" in name} == {torch.float32}
    of_base = {"init": "pretrained", "base": str(save_base(kind, tmp_path / "base"))}
    assert drawn == held(meta=True) == held(meta=False, **of_base) == held(meta=True, **of_base)
    for weights in ("int8", "nf4"):
        with pytest.raises(ValidationError, match=f"weights: expected float32 or bfloat16 with init: random, got {weights}, which is for"):
            toy_settings(kind, weights=weights)


def test_weights_in_integers_are_not_merged_whoever_asks(tmp_path: Path) -> None:
    networks = with_loras("sd", tmp_path, init="random")
    networks.settings = networks.settings.model_copy(update={"weights": "nf4"})
    said = "a LoRA cannot be added to weights in nf4; open the result of this run with model.weights: bfloat16"
    with pytest.raises(UserError, match=f"^merge: {said}"):
        networks.merge()
    with pytest.raises(UserError, match=f"^onnx: {said}"):
        OneStepTask(networks, seed=0).graph()
