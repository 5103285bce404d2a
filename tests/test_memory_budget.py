"""A memory budget: what follows from it, and that the process really stays below it."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch

from sslsr_diffusion import StableSRPipeline
from sslsr_diffusion.devices import parse_bytes
from sslsr_diffusion.errors import NotEnoughMemory
from sslsr_diffusion.inference import placement
from sslsr_diffusion.inference.open import find_model, open_model
from sslsr_diffusion.inference.placement import Placement, place
from sslsr_diffusion.models import FAMILIES
from sslsr_diffusion.models.stablesr.build import build_networks
from sslsr_diffusion.models.stablesr.settings import StableSRSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    StableSRPipeline(**build_networks(StableSRSettings(init="random", preset="tiny"), train="all").components()).save_pretrained(folder)
    return folder


def place_model(model: Path, device: torch.device, dtype: str, budget: int | None = None) -> Placement:
    return place(FAMILIES["stablesr"], model, device, dtype, budget)


def test_the_budget_chooses_precision_and_offload(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fastest first; only the sizes decide, so a GPU's choices can be asked for without one."""
    networks = FAMILIES["stablesr"].read(model, meta=True)
    monkeypatch.setattr(type(FAMILIES["stablesr"]), "read", lambda self, path, meta: networks)
    monkeypatch.setattr(placement, "MemoryModel", functools.cache(placement.MemoryModel))
    gpu = torch.device("cuda")
    assert str(place_model(model, CPU, "auto")) == "float32 on cpu"
    assert str(place_model(model, CPU, "auto", 10**9)) == "float32 on cpu"
    assert {str(place_model(model, CPU, "auto", mb * 10**6)) for mb in range(90, 110, 3)} == {"float32 on cpu", "bfloat16 on cpu"}
    assert str(place_model(model, gpu, "auto", 10**9)) == "float16 on cuda"
    assert str(place_model(model, gpu, "float32", 10**9)) == "float32 on cuda"
    choices = {str(place_model(model, gpu, "auto", mb * 10**6)) for mb in range(75, 100)}
    assert choices == {
        "float16 on cuda",
        "float16 on cuda, networks wait on the CPU",
        "float16 on cuda, layers wait on the CPU",
    }


def test_a_budget_below_everything_says_the_least_that_would_do(model: Path) -> None:
    with pytest.raises(
        NotEnoughMemory, match=r"^memory_budget: 20\.0 MB is too little for this model; the least .* (\d+\.\d) MB\.$"
    ) as caught:
        open_model(find_model(str(model)), device="cpu", memory_budget=20 * 10**6)
    least = int(float(str(caught.value).split()[-2]) * 1e6)
    place_model(model, CPU, "auto", least)
    with pytest.raises(NotEnoughMemory):
        place_model(model, CPU, "auto", int(0.99 * least))


def test_the_budget_of_opening_holds_for_every_call_that_names_none(model: Path) -> None:
    restorer = open_model(find_model(str(model)), device="cpu", memory_budget=110 * 10**6)
    arguments = {"num_inference_steps": 1, "output_type": "pt", "tile": 128}
    plan = restorer(torch.rand(3, 64, 64), **arguments).plans[0]
    assert plan == restorer(torch.rand(3, 64, 64), memory_budget=110 * 10**6, **arguments).plans[0]
    assert plan.vae_tile is not None
    assert restorer(torch.rand(3, 64, 64), memory_budget=10**10, **arguments).plans[0].vae_tile is None


CALL = """
import sys, gc, json, torch
from sslsr_diffusion.inference.open import find_model, open_model
from sslsr_diffusion.devices import parse_bytes

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) << 10

for budget, side in json.loads(sys.argv[2]):
    pipe = open_model(find_model(sys.argv[1]), device="cpu", memory_budget=parse_bytes(budget))
    picture = torch.rand(3, side // 4, side // 4)
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    loaded = status("VmRSS")
    plan = pipe(picture, num_inference_steps=1, output_type="pt", memory_budget=parse_bytes(budget)).plans[0]
    weights = sum(p.nbytes for part in (pipe.unet, pipe.vae, pipe.structural_encoder) for p in part.parameters())
    print(json.dumps([status("VmHWM") - loaded, weights, str(pipe.unet.dtype), plan.tile, plan.vae_tile]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_peak_memory_above_the_loaded_model_stays_below_the_budget(model: Path, tmp_path: Path) -> None:
    """Stricter than the promise: weights and peak together stay below; a process's first call, which loads libraries, counts as well."""
    first, later = [("150MB", 256)], [("250MB", 512), ("400MB", 512)]
    new = subprocess.run([sys.executable, "-c", CALL, str(model), json.dumps(first)], capture_output=True, text=True)
    fork = forks.python("-c", CALL, str(model), json.dumps(later), cwd=tmp_path, path=[Path(__file__).parent.parent])
    rows = []
    for cases, done in ((first, new), (later, fork)):
        assert done.returncode == 0, done.stderr[-2000:]
        rows += zip(cases, map(json.loads, done.stdout.splitlines()[-len(cases) :]))
    assert len(rows) == 3
    tiles = []
    for (budget, side), (above, weights, _, _, vae_tile) in rows:
        assert above + weights <= parse_bytes(budget), rows
        tiles.append((parse_bytes(budget), side, vae_tile or side))
    large = [tile for _, side, tile in sorted(tiles) if side == 512]
    assert large == sorted(large)
    assert large[0] < large[-1]  # more memory, larger tiles
    (_, generous) = rows[-1]
    assert generous[0] > 0.3 * 400e6, rows  # the room is used: an estimate that always fears the worst would pass the rest


@pytest.mark.cuda
def test_peak_memory_on_a_gpu_stays_below_the_budget(model: Path) -> None:
    for budget, side in (("150MB", 512), ("300MB", 1024), ("1GB", 1024)):
        pipe = open_model(find_model(str(model)), device="cuda", memory_budget=parse_bytes(budget))
        torch.cuda.reset_peak_memory_stats()
        pipe(torch.rand(3, side // 4, side // 4), num_inference_steps=1, output_type="pt", memory_budget=parse_bytes(budget))
        assert torch.cuda.max_memory_allocated() <= parse_bytes(budget)
        del pipe


DIRECT = """
import gc, json, sys, torch
from pathlib import Path
from torch import nn
from torch.nn import functional as F
from restorers import ToyPixels
from sslsr_diffusion.inference.direct import DirectRestorer

class Dense(ToyPixels):  # every convolution sees what all before it made
    scale = 4

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList(nn.Conv2d(3 + 16 * n, 16, 3, padding=1) for n in range(8))
        self.last = nn.Conv2d(3 + 16 * 8, 48, 3, padding=1)

    def forward(self, x):
        for layer in self.body:
            x = torch.cat([x, F.leaky_relu(layer(x), 0.2)], 1)
        return F.pixel_shuffle(self.last(x), 4)

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) << 10

restorer, picture = DirectRestorer(Dense()), torch.rand(3, 384, 384)
restorer(picture[:, :64, :64], memory_budget=10**9)  # what the first call loads is no work of a call
for budget in json.loads(sys.argv[1]):
    seen = []
    handle = restorer.networks.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    loaded = status("VmRSS")
    restorer(picture, output_type="pt", memory_budget=budget)
    handle.remove()
    print(json.dumps([status("VmHWM") - loaded + sum(p.nbytes for p in restorer.networks.parameters()), max(seen)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_direct_networks_stay_below_the_budget_too_and_use_it(tmp_path: Path) -> None:
    budgets = [240 * 10**6, 320 * 10**6, 10**9]
    here = Path(__file__).parent
    done = forks.python("-c", DIRECT, json.dumps(budgets), cwd=tmp_path, path=[here, here.parent])
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(peak <= budget for budget, (peak, _) in zip(budgets, rows)), rows
    sides = [side for _, side in rows]
    assert sides == sorted(sides)
    assert sides[0] < sides[-1] == 384  # more memory, larger tiles, at last the whole picture
    assert rows[1][0] > 0.3 * budgets[1], rows
