"""CPU offload without a GPU: diffusers' and accelerate's own hooks run, only the copies between devices are recorded instead of made.

What this shows: every component is on the device whenever one of its layers computes, for every way in which the pipeline enters
it, and the phases leave each other's networks behind. That the copies themselves work is for a test on a GPU (test_pipeline).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from test_pipeline import components, make_pipeline, photo, run, text_parts

from sslsr_diffusion import StableSRPipeline
from sslsr_diffusion.inference.tiled import TiledCodec
from sslsr_diffusion.models import AutoencoderKLCFW
from sslsr_diffusion.models.codec import Codec

DEVICE = torch.device("cuda:0")
PARTS = {"vae", "unet", "structural_encoder", "text_encoder"}


@contextlib.contextmanager
def recorded_moves(pipe: StableSRPipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, str], list[set[str]]]]:
    """Where each component would be, and the sets of components that were on the device while a layer computed."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    names = {id(part): name for name, part in modules.items()}
    where, together, used = dict.fromkeys(modules, "cpu"), [], set()
    real_to = torch.nn.Module.to

    def note(module, *args, **kwargs):
        devices = [torch.device(a) for a in (*args, *kwargs.values()) if isinstance(a, str | torch.device)]
        if devices and id(module) in names:
            where[names[id(module)]] = devices[0].type
        return module if devices else real_to(module, *args, **kwargs)

    def compute(name):
        def check(module, args):
            used.add(name)
            assert where[name] == "cuda", f"{name} computes while it waits on the CPU"
            present = {other for other, place in where.items() if place == "cuda"}
            if not together or together[-1] != present:
                together.append(present)

        return check

    for cls in {type(part) for part in modules.values()}:
        monkeypatch.setattr(cls, "to", note)
    monkeypatch.setattr("accelerate.hooks.send_to_device", lambda tensors, *args, **kwargs: tensors)
    monkeypatch.setattr(StableSRPipeline, "_execution_device", torch.device("cpu"))
    monkeypatch.setattr(StableSRPipeline, "to", lambda self, *args, **kwargs: [note(part, *args) for part in modules.values()])
    kinds = (torch.nn.Conv2d, torch.nn.Linear, torch.nn.Embedding)
    handles = [
        leaf.register_forward_pre_hook(compute(name))
        for name, part in modules.items()
        for leaf in part.modules()
        if isinstance(leaf, kinds)
    ]
    try:
        pipe.enable_model_cpu_offload(device=DEVICE)
        yield where, together
        assert used == set(modules)
    finally:
        pipe.remove_all_hooks()
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "cfw"])
@pytest.mark.parametrize("tile", [None, 64], ids=["whole", "tiled"])
def test_every_component_is_moved_before_it_computes_and_leaves_afterwards(fused, tile, monkeypatch):
    vae = AutoencoderKLCFW.from_autoencoder(components()["vae"]).eval() if fused else components()["vae"]
    pipe = make_pipeline(vae=vae, **text_parts())
    arguments = {
        "prompt": "sharp",
        "negative_prompt": "soft",
        "guidance_scale": 2.0,
        "tile": tile,
        "vae_tile": tile,
        "num_inference_steps": 1,
    }
    want = run(pipe, photo(), **arguments)
    with recorded_moves(pipe, monkeypatch) as (where, together):
        got = run(pipe, photo(), **arguments)
        assert set(where.values()) == {"cpu"}
    assert torch.equal(got, want)
    assert set().union(*together) == PARTS
    assert together == [{"text_encoder"}, {"vae"}, {"structural_encoder"}, {"structural_encoder", "unet"}, {"vae"}]  # the phases


def test_an_error_in_the_middle_leaves_nothing_on_the_device(monkeypatch):
    pipe = make_pipeline(**text_parts())

    def fail(pipe, step, t, values):
        raise KeyError("from a callback")

    with recorded_moves(pipe, monkeypatch) as (where, _):
        with pytest.raises(KeyError):
            run(pipe, photo(), callback_on_step_end=fail)
        assert set(where.values()) == {"cpu"}
        run(pipe, photo())  # and the pipeline still works


def test_the_check_above_can_fail(monkeypatch):
    """A way into the autoencoder that the hooks do not know of is noticed."""
    pipe = make_pipeline(**text_parts())
    with pytest.raises(AssertionError, match="vae computes while it waits"), recorded_moves(pipe, monkeypatch):
        pipe.vae.decoder(torch.zeros(1, 8, 4, 4))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "cfw"])
def test_tiles_share_their_statistics_while_layers_wait_on_the_cpu(fused):
    """accelerate takes a layer's weights away again before hooks on it run: GroupNorms of tiles must find them all the same."""
    from accelerate import cpu_offload

    vae = copy.deepcopy(components()["vae"])  # the other tests' one stays where it is
    vae = AutoencoderKLCFW.from_autoencoder(vae).eval() if fused else vae
    codec = Codec(vae)
    pixels = photo()[None].repeat(1, 1, 4, 4)
    noise = torch.randn(codec.noise_shape(pixels), generator=torch.Generator().manual_seed(0))
    tiled = TiledCodec(codec, tile=12, overlap=4)
    with torch.no_grad():
        want = tiled.encode(pixels, noise), tiled.decode(noise)
        cpu_offload(vae, torch.device("cpu"))
        assert {parameter.device.type for parameter in vae.parameters()} == {"meta"}
        got = tiled.encode(pixels, noise), tiled.decode(noise)
    for ours, theirs in zip(got, want):
        assert torch.equal(ours, theirs)
