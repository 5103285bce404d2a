"""torch.compile of networks: one graph for tiles of one size, the same picture, the same names in checkpoints, a sentence if it fails."""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from restorers import ToyFamily, ToyPixelFamily
from torch import nn
from toys import assert_same_checkpoint, smooth, toy_job, toy_validation

import sslsr_diffusion.inference.open as opening
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.open import find_model, open_model
from sslsr_diffusion.inference.placement import Placement
from sslsr_diffusion.inference.shared_norm import SharedGroupNorm
from sslsr_diffusion.models import FAMILIES, compiled
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.loop import train_job


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", ToyFamily())
    monkeypatch.setitem(FAMILIES, "toy_pixels", ToyPixelFamily())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is compiled, by a backend that runs each operation as it is: quick, and as exact as without."""
    found: list[Any] = []

    def kept(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", kept)
    monkeypatch.setattr(compiled, "_try", lambda device, field: None)  # a graph of its own
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.toy"
    path.write_bytes(b"")
    return path


def picture(up: Any, height: int, width: int, **call: Any) -> torch.Tensor:
    images: torch.Tensor = up(smooth(1, size=max(height, width))[:, :height, :width], output_type="pt", **call).images
    return images


def test_tiles_of_one_size_share_a_graph_and_other_sizes_run(file: Path, graphs: list[Any]) -> None:
    plain, up = (open_model(find_model(str(file)), device="cpu", dtype="float32", compile=each) for each in (False, True))
    for height, width, tile, most in ((64, 48, 32, 1), (80, 96, 48, 2), (56, 40, 32, 2), (8, 24, 16, 3)):
        got, want = (picture(each, height, width, tile=tile) for each in (up, plain))
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
        assert 1 <= len(graphs) <= most, (height, width)


def test_statistics_of_tiles_are_seen_in_a_compiled_network(graphs: list[Any]) -> None:
    """Hooks that come and go: a graph that was made without them would leave them out, and tiles would disagree."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
    fast, tiles = deepcopy(network), [smooth(k)[None] * (k + 1) for k in range(2)]
    fast.compile(backend=compiled.BACKEND)
    made = []
    with torch.no_grad():
        for each in (network, fast):
            alone = each(tiles[0])
            norms = SharedGroupNorm(each)
            with norms.recording():
                for tile in tiles:
                    each(tile)
            with norms.applying():
                together = each(tiles[0])
            torch.testing.assert_close(each(tiles[0]), alone, msg="as before")
            assert (together - alone).abs().max() > 1e-2
            made.append((alone, together))
    torch.testing.assert_close(made[1], made[0])
    assert len(graphs) == 1


def test_what_is_compiled_of_a_network(graphs: list[Any]) -> None:
    class Block(nn.Module):
        pass

    class Transformer(nn.Module):
        _repeated_blocks = ("Block",)

        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.encoder = nn.ModuleList([Block(), Block()]), nn.Identity()

    transformer, autoencoder, plain = Transformer(), nn.Module(), nn.Conv2d(3, 3, 1)
    autoencoder.encoder, autoencoder.decoder = nn.Identity(), nn.Identity()
    assert compiled.regions(transformer) == list(transformer.blocks)
    assert compiled.regions(autoencoder) == [autoencoder.encoder, autoencoder.decoder]
    assert compiled.regions(plain) == [plain]
    parts = {"unet": transformer, "vae": autoencoder, "text_encoder": plain, "scheduler": object()}
    compiled.compile_parts(parts, torch.device("cpu"), field="compile")
    found = {module for part in (transformer, autoencoder, plain) for module in part.modules() if module._compiled_call_impl is not None}
    assert found == {*transformer.blocks, autoencoder.encoder, autoencoder.decoder}
    assert deepcopy(autoencoder).encoder._compiled_call_impl is None
    assert not graphs


def test_a_compiled_run_has_the_same_names_and_numbers_and_goes_on_exactly(tmp_path: Path, graphs: list[Any]) -> None:
    def run(where: str, steps: int, *, compile: bool = True, **how: Any) -> Path:
        torch._dynamo.reset()  # a process of its own has no graphs yet
        job = toy_job(tmp_path / where, steps=steps, compile=compile, ema={"decay": 0.9})
        return train_job(job, **how).run / f"checkpoint-{steps}"

    plain = run("plain", 4, compile=False)
    assert not graphs
    whole = run("whole", 4)
    assert graphs
    run("parts", 2)
    assert_same_checkpoint(whole, run("parts", 4, resume="latest"))
    got, want = read_checkpoint(whole).tensors, read_checkpoint(plain).tensors
    assert {part: list(group) for part, group in got.items()} == {part: list(group) for part, group in want.items()}
    for name, value in want["trained"].items():
        torch.testing.assert_close(got["trained"][name], value, atol=1e-5, rtol=0)  # steps of about 1e-2


def test_held_out_pictures_are_restored_without_graphs(tmp_path: Path, graphs: list[Any]) -> None:
    job = toy_job(tmp_path, steps=1, compile=True)
    seen: list[int] = []

    def restore(lr: torch.Tensor, hr: torch.Tensor, seed: int) -> torch.Tensor:
        before = len(graphs)
        job.task.module(lr, torch.zeros(1), job.task.networks.see(hr, torch.zeros(1, 3, *lr.shape[-2:])))
        seen.append(len(graphs) - before)
        return hr

    job.task.restore = restore  # type: ignore[method-assign]
    train_job(replace(job, validation=toy_validation()))
    assert len(seen) == 6
    assert not any(seen)
    assert graphs


def test_where_nothing_can_be_compiled_one_sentence_says_so(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no working C++ compiler was found\nin cpp.cxx")

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", broken)
    for field, start in (
        ("compile", lambda: open_model(find_model(str(file)), device="cpu", compile=True)),
        ("training.compile", lambda: train_job(toy_job(tmp_path / "run", compile=True))),
    ):
        with pytest.raises(UserError, match=r"no working C\+\+ compiler was found in cpp\.cxx\)") as caught:
            start()
        assert str(caught.value).startswith(f"{field}: expected a machine on which torch.compile works, got ")
        assert "\n" not in str(caught.value)


def test_not_with_layers_that_wait(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslsr_diffusion.inference.placement.place", lambda *_: Placement(torch.device("cpu"), torch.float32, "sequential"))
    with pytest.raises(UserError, match=r"compile: expected networks that lie on the device .*, got layers that wait on the CPU"):
        opening.open_model(find_model(str(file)), device="cpu", compile=True)


def test_accelerates_own_compiling_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(UserError, match=r"training\.compile: expected true in the recipe, got dynamo_backend INDUCTOR for accelerate"):
        train_job(toy_job(tmp_path / "run"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler for the CPU needs g++")
def test_the_real_compiler_makes_the_same_picture(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))  # what an earlier process compiled does not count
    monkeypatch.setattr(inductor, "compile_threads", 1)  # no process that compiles beside, and imports torch for it
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)  # a program for each would be compiled to try them
    plain, up = (open_model(find_model(str(file)), device="cpu", dtype="float32", compile=each) for each in (False, True))
    want, got = (picture(each, 32, 24) for each in (plain, up))
    assert up.networks.body._compiled_call_impl is not None
    assert list((tmp_path / "kernels").rglob("*.so"))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)  # sums in another order
    assert list(up.networks.state_dict()) == list(plain.networks.state_dict())
