"""runs/onnx.py and Task.graph: what makes a picture in one call, run by onnxruntime at sizes that nobody traced."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from one_step_cases import toy
from toys import smooth

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.models.condition import Condition
from sslsr_diffusion.models.lora import LoRASettings
from sslsr_diffusion.models.network.networks import drawn
from sslsr_diffusion.models.network.settings import NetworkSettings
from sslsr_diffusion.models.stablesr.build import build_autoencoder, build_networks
from sslsr_diffusion.models.stablesr.settings import StableSRSettings
from sslsr_diffusion.runs import onnx
from sslsr_diffusion.tasks.autoencoder import AutoencoderTask
from sslsr_diffusion.tasks.decoder import DecoderTask
from sslsr_diffusion.tasks.diffusion import DiffusionTask
from sslsr_diffusion.tasks.network import NetworkTask
from sslsr_diffusion.tasks.one_step import OneStepTask

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")), reason="the extra onnx is not installed"
)
RRDB = {"num_feat": 4, "num_block": 1, "num_grow_ch": 4}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "RRDBNet x4": ("RRDBNet", RRDB),
    "RRDBNet x2": ("RRDBNet", {**RRDB, "scale": 2}),  # folds its input, so that sides are even
    "SRResNet": ("SRResNet", {"nf": 4, "nb": 1}),
}


def network_task(name: str) -> NetworkTask:
    """Of a network whose picture is far from nothing, which a drawn one's may not be."""
    architecture, arguments = NETWORKS[name]
    networks = drawn(NetworkSettings(architecture=architecture, arguments=arguments), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return NetworkTask(networks)


def onnx_picture(file: Path, *inputs: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    (got,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    return torch.from_numpy(got)


def picture(height: int, width: int) -> torch.Tensor:
    return smooth(5, size=max(height, width))[None, :, :height, :width]


@needs_onnx
@pytest.mark.parametrize("name", NETWORKS)
def test_a_plain_network(tmp_path, name):
    task = network_task(name)
    (note,) = onnx.write_onnx(task.graph(), tmp_path)
    assert note.startswith("upscaler.onnx: picture, sides multiples of 2," if name.endswith("x2") else "upscaler.onnx: picture, sides any")
    assert [path.name for path in tmp_path.iterdir()] == ["upscaler.onnx"]
    for size in ((10, 34), (26, 8)):
        want = task.networks(picture(*size)).detach()
        assert want.std() > 0.01
        assert (onnx_picture(tmp_path / "upscaler.onnx", picture(*size)) - want).abs().max() <= 1e-3


@needs_onnx
def test_a_decoder(tmp_path):
    task = AutoencoderTask(build_autoencoder(StableSRSettings(init="random", preset="tiny"), seed=2), seed=0)
    codec = task.networks.codec
    assert onnx.write_onnx(task.graph(), tmp_path)[0].startswith("decoder.onnx: latents, sides any")
    z = torch.randn(1, codec.latent_channels, 5, 9, generator=torch.Generator().manual_seed(0))
    want = codec.decode(z).detach()
    assert want.std() > 0.01
    assert (onnx_picture(tmp_path / "decoder.onnx", z) - want).abs().max() <= 1e-3


ONE_STEP: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("sd", {"noise": 350, "encoder_lora": LoRASettings(rank=2, targets=["conv1", "quant_conv"])}),
    "sd3": ("sd3", {}),
    "flux2": ("flux2", {}),
    "zimage": ("zimage", {}),
}
SIDES = ((3, 2), (1, 5), (8, 4))  # in units: odd ones, one patch, and 32 tokens, which Z-Image does not pad


@needs_onnx
@pytest.mark.parametrize(("kind", "options"), ONE_STEP.values(), ids=ONE_STEP.keys())
def test_a_one_step_upscaler_with_its_lora(tmp_path, kind, options):
    """Encoder, LoRAs, the fixed prompt, rule and decoder, with the noises as inputs; where positions end, both refuse."""
    networks = toy(kind, lora=LoRASettings(rank=2, targets=["to_v"]), **options)
    with torch.no_grad():
        for name, parameter in networks.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1 if kind == "sd" else 2.0, generator=torch.Generator().manual_seed(1))
    task = OneStepTask(networks.eval(), seed=0)
    unit, most, shape = networks.size().multiple_of, networks.size().maximum, networks.codec.noise_shape

    def drawn_inputs(height: int, width: int) -> tuple[torch.Tensor, ...]:
        low = picture(height, width)
        return low, *(torch.randn(shape(low), generator=torch.Generator().manual_seed(k)) for k in range(2 if "noise" in options else 1))

    @torch.no_grad()
    def made(low: torch.Tensor, posterior: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        return task.module(low, posterior, noise, networks.codec.decode)[1]

    inputs = [drawn_inputs(height * unit, width * unit) for height, width in SIDES]
    want = [made(*each) for each in inputs]
    networks.scale_loras(0)
    assert (made(*inputs[0]) - want[0]).abs().max() > 0.01
    (note,) = onnx.write_onnx(task.graph(), tmp_path)
    assert f"multiples of {unit}, from 1{f' to {most}' if most else ''};" in note
    for each, restored in zip(inputs, want, strict=True):
        assert (onnx_picture(tmp_path / "upscaler.onnx", *each) - restored).abs().max() <= 1e-4
        assert (made(*each) - restored).abs().max() <= 1e-4, "the networks are as they were"
    assert bool(most) == (kind in ("sd3", "zimage"))
    for sides in ((most + unit, unit), (unit, most + unit)) if most else ():
        beyond = drawn_inputs(*sides)
        with pytest.raises((ValueError, IndexError)):
            made(*beyond)
        with pytest.raises(Exception, match="ONNXRuntimeError"):
            onnx_picture(tmp_path / "upscaler.onnx", *beyond)


@pytest.mark.parametrize("kind", ["sd3", "zimage"])
@pytest.mark.parametrize("words", [5, 32, 40])
@torch.no_grad()
def test_what_is_traced_in_place_of_diffusers_code_says_the_same(kind, words, monkeypatch):
    denoiser = toy(kind).denoiser.eval()
    text = denoiser.no_text(words).each(lambda part: torch.randn(part.shape, generator=torch.Generator().manual_seed(2)))
    for height, width in ((1, 1), (3, 7), (4, 8), (5, 13), (11, 3)):
        zt = torch.randn(1, 4, 2 * height, 2 * width, generator=torch.Generator().manual_seed(height))
        given = zt, torch.tensor([350.0]), Condition(zt, text)
        want = denoiser(*given)
        with monkeypatch.context() as exporting:
            exporting.setattr(torch.compiler, "is_exporting", lambda: True)
            got = denoiser(*given)
        assert want.std() > 0.01
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        assert torch.equal(denoiser(*given), want), "the network is as it was"


@needs_onnx
def test_a_graph_that_makes_another_picture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "TOLERANCE", -1)
    with pytest.raises(UserError, match=r"^onnx: expected torch's picture to -1 at \d+ x \d+, got .*; leave it out, and report it\.$"):
        onnx.write_onnx(network_task("RRDBNet x4").graph(), tmp_path)


@needs_onnx
def test_networks_that_cannot_be_traced_are_one_sentence(tmp_path):
    class Looks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.mean().item() > 0 else x

    graph = network_task("RRDBNet x4").graph()
    graph.module.network = Looks()
    with pytest.raises(UserError, match=r"^onnx: these networks cannot be one graph of any size \(.*\); leave it out\.$") as caught:
        onnx.write_onnx(graph, tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_sampled_in_several_calls_is_no_graph():
    networks = build_networks(StableSRSettings(init="random", preset="tiny"))
    with pytest.raises(
        UserError, match=r"^onnx: expected a plain network, a one-step upscaler or an autoencoder, .* is sampled in several"
    ):
        DiffusionTask(networks, seed=0).graph()


def test_a_fused_decoder_is_no_graph():
    from sslsr_diffusion.models import AutoencoderKLCFW
    from sslsr_diffusion.models.codec import Codec

    networks = build_networks(StableSRSettings(init="random", preset="tiny"))
    decoder = DecoderTask(networks, seed=0, synthesize=lambda condition, indices: torch.zeros(0), fused=False)
    assert decoder.graph().name == "decoder"
    networks.codec = Codec(AutoencoderKLCFW.from_autoencoder(networks.codec.vae))
    with pytest.raises(UserError, match=r"^onnx: expected a plain decoder, got one that is fused with the encoder's features"):
        DecoderTask(networks, seed=0, synthesize=lambda condition, indices: torch.zeros(0), fused=True).graph()


def test_without_the_extra_the_command_that_mends_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match=r"^onnx: needs onnxruntime and onnxscript .*: pip install 'sslsr-diffusion\[onnx\]'$"):
        onnx.write_onnx(network_task("RRDBNet x4").graph(), tmp_path)
    assert not list(tmp_path.iterdir())
