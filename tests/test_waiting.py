"""inference/waiting.py without a GPU: weights that wait are NaN, and get their values back where they would be copied to the device.

A network that computes while it waits, or after it has left, then spoils the picture. That copies between devices work is for a GPU to
show: `test_on_a_gpu_only_what_a_phase_needs_is_there`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from one_step_cases import TOYS, toy
from safetensors.torch import load_file
from test_pipeline import photo, seeded
from torch import Tensor, nn
from x4_models import write_x4

from sslsr_diffusion.errors import NotEnoughMemory
from sslsr_diffusion.inference import placement, waiting
from sslsr_diffusion.inference.latent import LatentRestorer
from sslsr_diffusion.inference.memory import MemoryModel
from sslsr_diffusion.inference.open import find_model, open_model, restorer_class, restorer_of
from sslsr_diffusion.inference.placement import Placement, place
from sslsr_diffusion.inference.waiting import WaitingHost
from sslsr_diffusion.models.families import FAMILIES
from sslsr_diffusion.models.networks import LatentNetworks

DEVICE = torch.device("cpu", 0)  # not the plain "cpu" where networks wait
ENCODER = {"rank": 2, "alpha": 5, "targets": ["conv_in", "conv1"]}
Make = Callable[[str], LatentNetworks]


@pytest.fixture(scope="module")
def x4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_x4(tmp_path_factory.mktemp("x4") / "model")


@pytest.fixture
def make(x4: Path) -> Make:
    def networks(kind: str) -> LatentNetworks:
        made = FAMILIES["x4"].read(x4) if kind == "x4" else toy(kind, encoder_lora=ENCODER)
        assert isinstance(made, LatentNetworks)
        return made.eval().requires_grad_(False)

    return networks


def named(networks: LatentNetworks) -> dict[str, nn.Module]:
    parts = {"codec": networks.codec, "denoiser": networks.denoiser, "text": networks.text_network}
    return {name: part for name, part in parts.items() if part is not None}


@contextmanager
def unreadable(networks: LatentNetworks, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[set[str]]]:
    """Takes the values out of all weights; gives the sets of networks that were on the device together, as they changed."""
    truth: dict[int, Tensor] = {}
    together: list[set[str]] = []
    here: set[str] = set()
    for part in named(networks).values():
        for weight in part.parameters():
            truth.setdefault(weight.data_ptr(), weight.data.clone())
            weight.data.fill_(math.nan)

    def moving(name: str, part: nn.Module) -> Callable[[torch.device], nn.Module]:
        def to(device: torch.device) -> nn.Module:
            for weight in part.parameters():
                weight.data.copy_(truth[weight.data_ptr()]) if device == DEVICE else weight.data.fill_(math.nan)
            (here.add if device == DEVICE else here.discard)(name)
            together.append(set(here))
            return part

        return to

    for name, part in named(networks).items():
        monkeypatch.setattr(part, "to", moving(name, part))
    monkeypatch.setattr(waiting, "_copied", lambda weight, device: truth[weight.data_ptr()].clone())
    yield together
    assert not here
    assert all(weight.isnan().all() for part in named(networks).values() for weight in part.parameters()), "a copy took a weight's place"


def picture(restorer: Any, **call: Any) -> Tensor:
    made: Tensor = restorer(photo(9, 7), output_type="pt", generator=seeded(), **call).images
    return made


def around(networks: LatentNetworks, kind: str, offload: Any) -> LatentRestorer:
    restorer: LatentRestorer = restorer_class(FAMILIES["x4" if kind == "x4" else "one_step"])(
        networks, scale=4, host=WaitingHost(networks, DEVICE, offload)
    )
    return restorer


@pytest.mark.parametrize("offload", ["model", "sequential"])
@pytest.mark.parametrize(("kind", "tile"), [*((kind, None) for kind in (*TOYS, "x4")), ("sd", 64)])
def test_whatever_waits_the_picture_is_the_same(kind: str, tile: int | None, offload: str, make: Make, monkeypatch: pytest.MonkeyPatch):
    call: dict[str, Any] = {"tile": tile, "vae_tile": tile}
    if kind == "x4":
        call |= {"num_inference_steps": 2, "prompt": "sharp", "negative_prompt": "soft", "guidance_scale": 2.0}
    want = picture(restorer_of(make(kind), FAMILIES["x4" if kind == "x4" else "one_step"], scale=4), **call)
    networks = make(kind)
    restorer = around(networks, kind, offload)
    with unreadable(networks, monkeypatch) as together:
        got = picture(restorer, **call)
        again = picture(restorer, **call)
    assert torch.equal(got, want)
    assert torch.equal(again, want)
    phases = ["text", "denoiser", "codec"] if kind == "x4" else ["codec", "denoiser", "codec"]  # the x4 upscaler encodes no picture
    alone = [present for name in phases for present in ({name}, set())]
    assert together == ([] if offload == "sequential" else 2 * alone)


def test_the_check_above_can_fail(make: Make, monkeypatch: pytest.MonkeyPatch):
    networks = make("sd")
    restorer = around(networks, "sd", "model")
    monkeypatch.setattr(WaitingHost, "bring", lambda self, part: None)
    with unreadable(networks, monkeypatch):
        assert picture(restorer).isnan().any()


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_an_error_in_the_middle_leaves_nothing_on_the_device(offload: str, make: Make, monkeypatch: pytest.MonkeyPatch):
    networks = make("flux2")
    restorer = around(networks, "flux2", offload)
    last = networks.denoiser.get_submodule("network.proj_out")

    def fail(*_: Any) -> None:
        raise KeyError("in the last layer")

    with unreadable(networks, monkeypatch):
        handle = last.register_forward_pre_hook(fail)  # after the layer's weights are there
        with pytest.raises(KeyError):
            picture(restorer)
        assert all(weight.isnan().all() for weight in networks.denoiser.parameters())
        handle.remove()
        assert picture(restorer).isfinite().all()


def test_a_layers_weights_go_to_the_device_and_those_on_the_cpu_are_kept():
    """A precision stands for the device: a linear layer refuses weights of another one than its input's."""
    layer = nn.Linear(3, 2).double()
    before = [(weight.data_ptr(), weight.detach().clone()) for weight in layer.parameters()]
    waiting._wait(layer, torch.float32)  # type: ignore[arg-type]
    assert layer(torch.ones(5, 3)).dtype == torch.float32
    with pytest.raises(RuntimeError):
        layer(torch.ones(5, 4))
    for weight, (address, value) in zip(layer.parameters(), before, strict=True):
        assert weight.data_ptr() == address
        assert torch.equal(weight, value)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_estimates_and_files_are_those_of_networks_that_stay(offload: str, make: Make, tmp_path: Path):
    networks = make("zimage")
    want = MemoryModel(networks, DEVICE)
    restorer = around(networks, "zimage", offload)
    got = restorer.memory_model()
    assert got.denoise_bytes(64, 64) == want.denoise_bytes(64, 64)
    assert got.weight_bytes() == want.weight_bytes()
    assert sum(got.weight_bytes("model")) == got.weight_bytes()[0]
    restorer.save(tmp_path / offload)
    restorer_of(make("zimage"), FAMILIES["one_step"], scale=4).save(tmp_path / "stays")
    for name in ("pytorch_lora_weights.safetensors", "vae_lora.safetensors", "prompt.safetensors"):
        stays, waits = (load_file(tmp_path / folder / name) for folder in ("stays", offload))
        assert stays.keys() == waits.keys()
        assert all(torch.equal(stays[key], waits[key]) for key in stays), name


@pytest.fixture
def one_step(tmp_path: Path) -> Path:
    restorer_of(toy("sd"), FAMILIES["one_step"], scale=4).save(tmp_path / "one_step")
    return tmp_path / "one_step"


@pytest.mark.parametrize("kind", ["one_step", "x4"])
def test_the_budget_chooses_what_waits(kind: str, x4: Path, one_step: Path, monkeypatch: pytest.MonkeyPatch):
    """Only the sizes decide, so a GPU's choices can be asked for without one."""
    model = find_model(str(x4 if kind == "x4" else one_step))
    networks = model.family.read(model.path, meta=True)
    monkeypatch.setattr(type(model.family), "read", lambda self, path, meta: networks)
    measured = MemoryModel(networks, torch.device("cuda"), text_parameters=networks.parameters_per_part().get("text encoder", (0, 0))[0])
    monkeypatch.setattr(placement, "MemoryModel", lambda *_, **__: measured)
    gpu = torch.device("cuda")
    with pytest.raises(NotEnoughMemory) as caught:
        place(model.family, model.path, gpu, "float16", 10**6)
    least, weights = caught.value.least, measured.at(networks.cast(torch.float16) or networks).weight_bytes()[0]
    assert least is not None
    chosen = [place(model.family, model.path, gpu, "float16", least + part * weights // 16).offload for part in range(20)]
    assert set(chosen) == {"sequential", "model", "none"}
    assert (chosen[0], chosen[-1]) == ("sequential", "none")
    with pytest.raises(NotEnoughMemory):  # its memory is the CPU's own, so there is nothing to win
        place(model.family, model.path, torch.device("mps"), "float16", least)


def test_a_model_opens_with_what_the_budget_chose(one_step: Path, monkeypatch: pytest.MonkeyPatch):
    found = find_model(str(one_step))
    want = picture(open_model(found, device="cpu", dtype="float32"))
    for offload in ("model", "sequential"):
        chosen = Placement(torch.device("cpu"), torch.float32, offload, 10**9)
        monkeypatch.setattr(placement, "place", lambda *_, chosen=chosen: chosen)
        opened = open_model(found, device="cpu")
        assert opened._host.offload() == offload
        assert torch.equal(picture(opened), want)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [*TOYS, "x4"])
def test_on_a_gpu_only_what_a_phase_needs_is_there(kind: str, make: Make):
    call: dict[str, Any] = {"num_inference_steps": 2} if kind == "x4" else {}
    want = picture(restorer_of(make(kind), FAMILIES["x4" if kind == "x4" else "one_step"], scale=4), **call)
    for offload in ("model", "sequential"):
        networks = make(kind)
        restorer = restorer_class(FAMILIES["x4" if kind == "x4" else "one_step"])(
            networks, scale=4, host=WaitingHost(networks, torch.device("cuda"), offload)
        )
        assert (picture(restorer, **call).cpu() - want).abs().max() < 1e-3
        assert {weight.device.type for part in named(networks).values() for weight in part.parameters()} == {"cpu"}
