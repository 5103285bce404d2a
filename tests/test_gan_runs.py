"""What losses of GAN methods need of the step: the averaged weights' picture, a network's branch, the low-resolution picture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import DRAWN
from torch import Tensor, nn
from torch.nn import functional as F
from toys import toy_batch, toy_job, toy_losses, toy_task

from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.losses.gradient import GradientBranchLoss, GradientBranchSettings, GradientLoss, GradientSettings
from sslsr_diffusion.losses.ldl import LDLLoss, LDLSettings
from sslsr_diffusion.losses.local import gradient_map
from sslsr_diffusion.models.networks import PixelNetworks
from sslsr_diffusion.models.size import SizeRequirements
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.runs.task import build_task
from sslsr_diffusion.tasks.network import NetworkTask
from sslsr_diffusion.training.checkpoints import read_checkpoint
from sslsr_diffusion.training.loop import train_job
from sslsr_diffusion.training.session import Session

EMA = {"decay": 0.5, "warmup": False}


class Watched(LDLLoss):
    """Keeps what it was given."""

    def errors(self, outputs: Any) -> Tensor:
        self.seen = [*getattr(self, "seen", []), outputs]
        return super().errors(outputs)


def test_ldl_gets_the_picture_by_the_averaged_weights(tmp_path):
    loss = Watched(LDLSettings())
    job = toy_job(tmp_path, losses=[*toy_losses(), loss], ema=EMA, dropout=0.3)
    session = Session(job.task, job.losses, job.training, seed=3, trackers=(), run=tmp_path)
    loader = job.open_data(0, 1, None, session.device)
    for _ in range(3):
        batch = next(loader)
        average = dict(zip(session.parameters, (value.clone() for value in session.ema.shadow_params)))
        session.step([batch])
        assert job.task.module.training
        twin = toy_task(0.3)
        for name, value in average.items():
            twin.module.get_parameter(name).detach().copy_(value)
        twin.module.eval()
        with torch.no_grad():
            want = twin.run(twin.module, batch, twin.draw(batch, job.losses)).sr
        got = loss.seen[-1]
        assert torch.equal(got.sr_ema, want)
        assert not got.sr_ema.requires_grad
        assert not torch.equal(got.sr_ema, got.sr)


def test_the_second_run_changes_nothing_else(tmp_path):
    """Dropout draws from the global stream, which a picture by the averaged weights must leave alone."""
    trained = []
    for name, more in (("without", []), ("with", [LDLLoss(LDLSettings(weight=0.0))])):
        train_job(toy_job(tmp_path / name, losses=[*toy_losses(), *more], ema=EMA, dropout=0.3, steps=4))
        trained.append(read_checkpoint(tmp_path / name / "checkpoint-4").tensors["trained"])
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_without_an_average_there_is_one_sentence(tmp_path):
    values = {"task": {"kind": "autoencoder"}, "model": DRAWN, "data": {"sources": []}, "validation": {"limit": 0}}
    values["losses"] = [{"kind": "pixel_l1"}, {"kind": "ldl"}]
    with pytest.raises(RecipeError) as caught:
        parse(Recipe, {**values, "training": {"ema": None}})
    assert str(caught.value) == "losses.1.kind: ldl compares with the averaged weights' picture; set training.ema: {decay: 0.999}."
    parse(Recipe, {**values, "training": {"ema": EMA}})
    job = toy_job(tmp_path, losses=[LDLLoss(LDLSettings())])
    with pytest.raises(
        UserError, match=r"losses: ldl compares with the picture by the averaged weights, and there is none; set training\.ema"
    ):
        Session(job.task, job.losses, job.training.model_copy(update={"ema": None}), seed=3, trackers=(), run=tmp_path)


class Toy(PixelNetworks):
    """Scale 4, with a branch where asked for."""

    scale = 4

    def __init__(self, has_branch: bool) -> None:
        super().__init__("toys")
        self.has_branch, self.calls = has_branch, 0
        self.body, self.edges = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, lr: Tensor, *, branch: bool = False) -> Any:
        self.calls += 1
        picture = F.interpolate(self.body(lr), scale_factor=4)
        return (picture, F.interpolate(self.edges(lr), scale_factor=4)) if branch else picture

    def size(self) -> SizeRequirements:
        return SizeRequirements(multiple_of=4)

    def components(self) -> dict[str, Any]:
        return {"body": self.body}

    def save(self, folder: Any, **call: Any) -> None: ...

    def set_trainable(self, which: str) -> list[str]:
        return []


def test_a_branch_is_made_where_a_loss_reads_it():
    task, batch = NetworkTask(Toy(has_branch=True)), toy_batch([0, 1])
    plain, both = GradientLoss(GradientSettings()), GradientBranchLoss(GradientBranchSettings())
    assert task.run(task.module, batch, task.draw(batch, [plain])).branch is None
    outputs = task.run(task.module, batch, task.draw(batch, [plain, both]))
    assert task.networks.calls == 2
    assert torch.equal(outputs.lr, batch.lr)
    value, terms = both(outputs)
    want = (outputs.branch - gradient_map(batch.hr)).abs().mean()
    assert terms["gradient_branch"].item() == pytest.approx(want.item(), rel=1e-5)
    value.backward()
    assert task.networks.edges.weight.grad.any()
    assert task.networks.body.weight.grad is None


def test_a_model_without_a_branch_says_so():
    task = NetworkTask(Toy(has_branch=False))
    assert task.gives == {"sr", "lr", "sr_ema"}
    assert NetworkTask(Toy(has_branch=True)).gives == NetworkTask.gives
    recipe: Any = SimpleNamespace(
        task=None, task_kind=SimpleNamespace(build=lambda settings, frame: task), losses=[GradientSettings(), GradientBranchSettings()]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sslsr_diffusion.runs.task.frame_of", lambda recipe, meta: None)
        with pytest.raises(
            UserError, match=r"^losses\.1\.kind: gradient_branch reads branch, which this model does not make; leave it out\.$"
        ):
            build_task(recipe)
