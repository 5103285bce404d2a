"""Three whole training steps of each published GAN method with SSL, by the loop itself, against the published trainer's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from goldens import load_golden
from test_gan_goldens import pattern, weights
from torch import Tensor

from sslsr_diffusion.losses import Means, build_losses
from sslsr_diffusion.losses.backbones import VGG
from sslsr_diffusion.losses.discriminators import Ranker
from sslsr_diffusion.losses.perceptual import PerceptualLoss
from sslsr_diffusion.losses.rank import RankLoss
from sslsr_diffusion.models.network.known import recognise
from sslsr_diffusion.models.network.networks import SuperResolution
from sslsr_diffusion.runs.recipe import load_recipe
from sslsr_diffusion.tasks.network import NetworkTask
from sslsr_diffusion.training.session import Session
from sslsr_diffusion.types import Batch


class Method(NamedTuple):
    recipe: str
    terms: dict[str, tuple[str, ...]]  # our term -> the published log's, which are weighted, and add up to it


PLAIN = {"pixel_l1": ("l_pix",), "self_similarity/l1": ("l_selfsim",), "self_similarity/kl": ("l_selfsim_kl",)}
PLAIN |= {"perceptual": ("l_g_percep",), "gan": ("l_g_gan",), "gan/discriminator": ("l_d_real", "l_d_fake")}
BUDDIES = {"best_buddy": ("l_pix_bb",), "back_projection": ("l_pix_bp",)}
SPSR = {"gradient": ("l_pix_gradSR",), "gradient_branch": ("l_pix_gradBranch",), "gan_gradient": ("l_g_gan_grad",)}
SPSR |= {"gan_gradient/discriminator": ("l_d_real_grad", "l_d_fake_grad")}
KAIR = {"pixel_l1": ("G_loss",), "self_similarity/l1": ("SSL_loss",), "self_similarity/kl": ("SSL1_loss",), "perceptual": ("F_loss",)}
METHODS = {
    "esrgan": Method("esrgan", PLAIN),
    "elan": Method("elan", PLAIN),
    "ldl": Method("ldl", PLAIN | {"ldl": ("l_g_artifacts",)}),
    "bebygan": Method("bebygan", {name: logged for name, logged in PLAIN.items() if name != "pixel_l1"} | BUDDIES),
    "spsr": Method("spsr", PLAIN | SPSR),
    "ranksrgan": Method("ranksrgan", PLAIN | {"rank": ("l_g_rank",)}),
    "realesrgan": Method("realesrgan", PLAIN),
    "kair": Method("bsrgan", KAIR),
}


def built(entries: list[Any], side: int, start: dict[str, dict[str, Tensor]]) -> list[Any]:
    """The losses of a recipe around the golden's small networks."""
    losses = []
    for settings in entries:
        if settings.kind == "perceptual":
            network = VGG(load_golden("gan/perceptual").index["config"]["widths"])
            network.load_state_dict(weights("perceptual"))
            losses.append(PerceptualLoss(settings, network.requires_grad_(False)))
        elif settings.kind == "rank":
            ranker = Ranker(3)
            ranker.load_state_dict(weights("ranker"))
            losses.append(RankLoss(settings.model_copy(update={"reference": True}), ranker))
        elif settings.kind == "gan":
            judge = start["d_grad" if settings.sees == "gradient" else "d"]
            width = next(len(judge[name]) for name in ("conv0_0.weight", "conv0.weight") if name in judge)
            losses += build_losses([settings.model_copy(update={"width": width})], Means(side=side))
            losses[-1].network.load_state_dict(judge)
        else:
            losses += build_losses([settings])
    return losses


def batches(config: dict[str, Any]) -> list[Batch]:
    side, made = config["size"], []
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    mod = int(config["mask"].split("mod=")[1].rstrip(")"))
    for step in (1, 2, 3):
        seed = config["seed0"] + step
        hr = pattern(seed, [2, 3, side, side])
        mask = torch.stack([((y * 31 + x * 17 + b * 7 + seed) % mod == 0)[None] for b in range(2)])
        made.append(Batch(hr, hr[:, :, 2::4, 2::4].contiguous(), mask, torch.arange(2)))
    return made


def factor(losses: list[Any], term: str) -> float:
    """By which the published log multiplies our raw term."""
    loss = next(loss for loss in losses if loss.name == term.split("/")[0])
    if term.endswith("/discriminator"):
        return 1.0
    if term.startswith("self_similarity"):
        return float(loss.settings.l1_weight if term.endswith("l1") else loss.settings.kl_weight)
    return float(loss.settings.weight)


@pytest.mark.parametrize("method", METHODS)
def test_three_published_steps(method: str, tmp_path: Path) -> None:
    """The recipe's own losses, optimizer and average.

    Tolerances of the goldens' README: logs of the first step 5e-4, later ones 1e-2; gradients of the first step 3e-2 and 0.1; weights
    after three steps 3e-3.
    """
    index, tensors = load_golden(f"gan/step_{method}")
    config, (name, terms) = index["config"], METHODS[method]
    recipe = load_recipe(f"gan/{name}_ssl")
    start: dict[str, dict[str, Tensor]] = {}
    for name, value in weights(f"step_{method}").items():
        part, _, rest = name.partition(".")
        start.setdefault(part, {})[rest] = value
    network, known = recognise(start["g"], "the golden", told={})
    losses = built(recipe.losses, config["size"], start)
    settings = recipe.training.model_copy(update={"steps": 3, "batch_size": 2, "crop_size": config["size"]})
    task = NetworkTask(SuperResolution(network, known, base="golden"))
    session = Session(task, losses, settings, seed=0, trackers=(), run=tmp_path)
    gradients: dict[str, Tensor] = {}

    def watch(update: Any, prefix: str, parameters: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            found = {f"{prefix}.{name.removeprefix('network.')}": p.grad for name, p in parameters() if p.grad is not None}
            gradients.update({name: value.clone() for name, value in found.items() if name not in gradients})
            return update(*args, **kwargs)

        return watched

    session.engine.update = watch(session.engine.update, "g", lambda: session.parameters.items())
    for loss in session.learners:
        prefix = "d" if loss.name == "gan" else "d_grad"
        loss.update = watch(loss.update, prefix, lambda loss=loss: loss.network.named_parameters())
    for step, batch in enumerate(batches(config), 1):
        raw = session.step([batch]).raw
        for term, logged in terms.items():
            want = sum(tensors[f"out.log{step}.{name}"].item() for name in logged)
            assert factor(losses, term) * raw[term] == pytest.approx(want, rel=5e-4 if step == 1 else 1e-2), (step, term)
    for name, value in tensors.items():
        if name.startswith("out.grad1."):
            own = gradients[name.removeprefix("out.grad1.")]
            bound = 3e-2 if name.startswith("out.grad1.g.") else 0.1
            assert (own - value.float()).abs().max() <= bound * value.float().abs().max(), name
    networks = {"g": {name.removeprefix("network."): value for name, value in session.parameters.items()}}
    networks |= {"d" if loss.name == "gan" else "d_grad": loss.network.state_dict() for loss in session.learners}
    if session.ema is not None:
        networks["ema"] = dict(zip(networks["g"], session.ema.shadow_params))
    for name, value in tensors.items():
        part, _, rest = name.removeprefix("out.").partition(".")
        if part in networks:
            own = networks[part][rest]
            assert (own - value.float()).abs().max() <= 3e-3 * value.float().abs().max(), name
