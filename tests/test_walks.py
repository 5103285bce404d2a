"""docs/architecture.md, played: each walk's file and line go into a copy of the package, and the new part is used to the end."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import forks
import numpy as np
import pytest
from PIL import Image
from tiny_runs import save_upscaler

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
COMMAND = "from sslsr_diffusion.cli import main; main()"


@dataclass(frozen=True)
class Walk:
    file: str  # below the checkout
    text: str
    table_file: str
    table: str
    line: str


def walk(title: str) -> Walk:
    """What a section of the page tells to write."""
    section = PAGE.split(f"\n### {title}\n")[1].split("\n### ")[0]
    found = re.fullmatch(
        r"\s*New file `([^`]+)`[^\n]*\n\n```python\n(.*?)```\n\nOne line in `([^`]+)`, in `(\w+)`:\n\n```python\n([^\n]+)\n```\s*",
        section,
        re.DOTALL,
    )
    assert found is not None, f"{title}: expected one new file and one line"
    return Walk(*found.groups())


class Copy:
    """A copy of the package in which a walk was taken; commands run with it alone."""

    def __init__(self, folder: Path, *walks: Walk) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "sslsr_diffusion", folder / "sslsr_diffusion")  # with what is compiled: times of change are kept
        shutil.copytree(ROOT / "configs", folder / "configs")
        for one in walks:
            path = folder / one.file
            assert not path.exists()
            path.parent.mkdir(exist_ok=True)
            path.write_text(one.text)
            table = folder / one.table_file
            before = table.read_text()
            table.write_text(_entered(before, one))
        self.pictures = folder / "photos"
        self.pictures.mkdir()
        y, x = np.mgrid[:64, :96]
        for k in range(2):
            wave = np.stack([128 + 100 * np.sin((x * (k + 1) + y * c) / 9) for c in range(3)], axis=-1)
            Image.fromarray(wave.astype(np.uint8)).save(self.pictures / f"{k}.png")
        Image.fromarray(wave[:16, :24].astype(np.uint8)).save(folder / "small.png")

    def python(self, *arguments: str, fails: bool = False) -> str:
        done = forks.python(*arguments, cwd=self.folder, path=[self.folder])
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    def sslsr(self, *arguments: str, **options: bool) -> str:
        return self.python("-c", COMMAND, *arguments, **options)


def _entered(text: str, one: Walk) -> str:
    """The line at the end of its table."""
    lines = text.splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{one.table}: "))
    indent = re.match(r" *", one.line)[0]  # type: ignore[index]  # always matches
    own = [i for i in range(start, len(lines)) if re.match(rf'{indent}["*]', lines[i])]
    end = next(i for i in range(own[0], len(lines)) if re.match(rf"{indent[4:]}}}", lines[i]))
    return "".join([*lines[:end], one.line + "\n", *lines[end:]])


SMALL = "task: {kind: diffusion, train: all, inference: {steps: 1}}\nmodel: {kind: stablesr, init: random, preset: tiny}\n"
RUN = """
data: {sources: [{kind: folder, path: photos}], validation: [{kind: folder, path: photos}], degradation: {preset: mild}, workers: 0}
training: {steps: 2, batch_size: 2, crop_size: 32, log_every: 1}
validation: {every: 0, limit: 1, size: 32}
checkpoints: {every: 1, keep: 2}
output: {dir: runs/new, trackers: []}
"""


def test_a_loss(tmp_path):
    copy = Copy(tmp_path, walk("A loss"))
    (tmp_path / "r.yaml").write_text(SMALL + "losses: [{kind: diffusion}, {kind: total_variation, weight: 0.5}]" + RUN)
    assert "total_variation" in copy.sslsr("train", "--config", "r.yaml", "--dry-run")
    assert "Done: 2 steps" in copy.sslsr("train", "--config", "r.yaml")
    assert '"loss/total_variation"' in (tmp_path / "runs" / "new" / "history.jsonl").read_text()
    wrong = copy.sslsr("train", "--config", "r.yaml", "--set", "task={kind: base}", "--set", "output.dir=runs/other", fails=True)
    assert "losses.1.kind: total_variation is impossible in task base; possible are diffusion." in wrong


def test_a_family(tmp_path):
    copy = Copy(tmp_path, walk("A family of networks"))
    ssl = "{kind: self_similarity, search_size: 9, window_size: 3, l1_weight: 10, kl_weight: 0, backend: torch}"
    (tmp_path / "r.yaml").write_text(
        f"model: {{kind: shuffle}}\ntask: {{kind: network}}\nlosses: [{{kind: pixel_l1, weight: 1}}, {ssl}]" + RUN
    )
    said = copy.sslsr("train", "--config", "r.yaml", "--dry-run")
    assert re.search(r"body +0\.01 M +trained +0\.01 M", said)
    assert re.search(r"as it is +0\.\d\d GiB", said)
    assert "Done: 2 steps" in copy.sslsr("train", "--config", "r.yaml")
    assert "Done: 3 steps" in copy.sslsr("train", "--config", "r.yaml", "--set", "training.steps=3", "--resume", "latest")
    assert "resumed from runs/new/checkpoint-2 at step 2 of 3" in (tmp_path / "runs" / "new" / "log.txt").read_text()
    assert (tmp_path / "runs" / "new" / "checkpoint-3" / "manifest.json").is_file()
    copy.sslsr("export", "runs/new/checkpoint-3", "--output", "exported")
    code = (
        "from PIL import Image; from sslsr_diffusion import open_upscaler; up = open_upscaler('exported');"
        "print(sorted(up.options)); assert up(Image.open('small.png'), scale=3).images[0].size == (72, 48)"
    )
    assert "'tile'" in copy.python("-c", code)
    assert "1 done" in copy.sslsr("infer", "--input", "small.png", "--output", "out", "--tile", "16")  # the newest finished run
    assert Image.open(tmp_path / "out" / "small.png").size == (96, 64)
    refused = copy.sslsr("infer", "--input", "small.png", "--output", "other", "--fidelity", "0.5", fails=True)
    assert "--fidelity: this model does not have it, got 0.5" in refused
    assert "one step" in copy.sslsr("infer", "--input", "small.png", "--output", "third", "--steps", "4")
    wrong = copy.sslsr("train", "--config", "r.yaml", "--set", "task={kind: diffusion}", fails=True)
    assert "task.kind: diffusion is impossible with model.kind shuffle; possible are network." in wrong


TOY_LATENTS = '''
"""Latent networks with any process: the scaffold of a test."""
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.models.condition import Text
from sslsr_diffusion.models.family import Card, FamilySettings
from sslsr_diffusion.models.networks import LatentNetworks
from sslsr_diffusion.models.process import Process
from sslsr_diffusion.models.size import SizeRequirements


class Settings(FamilySettings):
    kind: Literal["toy"] = "toy"
    scheduler: str = "FlowMatchEulerDiscreteScheduler"


class Codec(nn.Module):
    scale, latent_channels, has_fidelity = 4, 3, False

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def noise_shape(self, pixels: Tensor) -> tuple[int, ...]:
        return (pixels.shape[0], 3, pixels.shape[-2] // 4, pixels.shape[-1] // 4)

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return self.gain * (F.avg_pool2d(pixels, 4) * 2 - 1)

    def decode(self, latents: Tensor, features: Any = None, fidelity: float = 1.0) -> Tensor:
        return F.interpolate(latents / self.gain, scale_factor=4, mode="bilinear") / 2 + 0.5


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(7, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, zt: Tensor, t: Tensor, condition: Any) -> Tensor:
        told = (t.to(zt.dtype) / 1000)[:, None, None, None].expand(-1, 1, *zt.shape[-2:])
        return self.body(torch.cat([zt, condition.z_lr, told], dim=1))


class Toy(LatentNetworks):
    def __init__(self, scheduler: str, base: str = "random:toy") -> None:
        super().__init__(Codec(), Denoiser(), Process.of({}, scheduler), Text(torch.zeros(1, 1, 4)), base=base)
        self.name = scheduler

    def size(self) -> SizeRequirements:
        return SizeRequirements(multiple_of=4, trained=32)

    def components(self) -> dict[str, Any]:
        return {"denoiser": self.denoiser, "codec": self.codec}

    def set_trainable(self, which: str) -> list[str]:
        self.codec.requires_grad_(False)
        return [name for name, _ in self.denoiser.named_parameters()]

    @property
    def call_defaults(self) -> dict[str, Any]:
        return getattr(self, "_call", {})

    def save(self, folder: Path, **call: Any) -> None:
        from safetensors.torch import save_file

        (folder / "toy.json").write_text(json.dumps({"scheduler": self.name, "call": call}))
        save_file(dict(self.state_dict()), folder / "toy.safetensors")


class Family:
    kind, settings, restorer, trains, files, card = "toy", Settings, "latent", ("all",), ("toy.json",), Card()
    tasks = frozenset({"diffusion"})

    def build(self, settings: Any, *, part: str = "upscaler", train: Any = None, meta: bool = False, seed: int = 0) -> Toy:
        torch.manual_seed(seed)
        networks = Toy(settings.scheduler)
        networks.set_trainable("all")
        return networks.shapes() if meta else networks

    def reads(self, path: Path) -> bool:
        return (path / "toy.json").is_file()

    def read(self, path: Path, *, meta: bool = False) -> Toy:
        from safetensors.torch import load_file

        config = json.loads((path / "toy.json").read_text())
        networks = Toy(config["scheduler"], str(path))
        networks._call = config["call"]
        networks.load_state_dict(load_file(path / "toy.safetensors"))
        return networks.shapes() if meta else networks

    def call_defaults(self, path: Path) -> dict[str, Any]:
        return json.loads((path / "toy.json").read_text())["call"]

    def source(self, settings: Any) -> None:
        return None

    def check_files(self, settings: Any) -> dict[str, Any]:
        return {}
'''


@pytest.mark.parametrize("scheduler", ["CosineFlowScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_process(tmp_path, scheduler):
    scaffold = Walk(
        "sslsr_diffusion/models/toy/family.py",
        TOY_LATENTS,
        "sslsr_diffusion/models/families.py",
        "FAMILIES",
        '        "toy": "toy.family:Family",',
    )
    copy = Copy(tmp_path, walk("A noise process"), scaffold)
    losses = "losses: [{kind: diffusion, min_snr_gamma: 5}, {kind: pixel_l1, min_snr: 1}]"
    (tmp_path / "r.yaml").write_text(
        f"model: {{kind: toy, scheduler: {scheduler}}}\ntask: {{kind: diffusion, inference: {{steps: 3}}}}\n{losses}" + RUN
    )
    assert "Done: 2 steps" in copy.sslsr("train", "--config", "r.yaml")
    said = copy.sslsr("infer", "--input", "small.png", "--output", "out", "--memory-budget", "4GB")
    assert "steps 3" in said
    assert Image.open(tmp_path / "out" / "small.png").size == (96, 64)
    refused = copy.sslsr("infer", "--input", "small.png", "--output", "other", "--sampler", "ddpm", fails=True)
    assert "ddpm is of the DDPM family and this model's process is" in refused


def test_a_sampler(tmp_path):
    copy = Copy(tmp_path, walk("A sampler"))
    save_upscaler(tmp_path / "drawn")
    for name in ("restless", "ddim"):
        said = copy.sslsr("infer", "--input", "small.png", "--output", name, "--model", "drawn", "--sampler", name, "--steps", "4")
        assert "1 done" in said
    first, second = (np.asarray(Image.open(tmp_path / name / "small.png")) for name in ("restless", "ddim"))
    assert (first != second).any()
    assert "restless" in copy.sslsr("infer", "--input", "small.png", "--output", "x", "--model", "drawn", "--sampler", "wrong", fails=True)


def test_a_metric(tmp_path):
    copy = Copy(tmp_path, walk("A metric"))
    copy.sslsr("evaluate", "--restored", "same=photos", "--reference", "photos", "--metrics", "edge_error", "--output", "report")
    assert "edge_error" in (tmp_path / "report" / "metrics.csv").read_text()
    assert "Edge error" in (tmp_path / "report" / "report.html").read_text()
    (tmp_path / "r.yaml").write_text(
        SMALL + "losses: [{kind: diffusion}]" + RUN.replace("size: 32}", "size: 32, metrics: [edge_error], best: edge_error}")
    )
    assert "edge_error" in copy.sslsr("train", "--config", "r.yaml")
