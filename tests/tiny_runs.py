"""Recipes of preset `tiny` over a few small pictures: training takes a second, and all parts are the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sslsr_diffusion.config import parse
from sslsr_diffusion.models.stablesr.build import build_networks
from sslsr_diffusion.models.stablesr.networks import StableSRNetworks
from sslsr_diffusion.models.stablesr.settings import StableSRSettings
from sslsr_diffusion.runs.recipe import Recipe

DRAWN = {"kind": "stablesr", "init": "random", "preset": "tiny"}
SMALL_SSL = {"kind": "self_similarity", "search_size": 9, "window_size": 3, "backend": "torch"}


def tiny(photos: Path, run: Path, **sections: Any) -> Recipe:
    """A recipe of two steps on 32-pixel crops; `sections` replace whole sections of it."""
    folder = {"kind": "folder", "path": str(photos)}
    plain = {
        "model": DRAWN,
        "data": {"sources": [folder], "validation": [folder], "degradation": {"preset": "bicubic"}, "workers": 0},
        "losses": [{"kind": "diffusion"}],
        "training": {"steps": 2, "batch_size": 2, "crop_size": 32, "log_every": 1, "optimizer": {"lr": 1e-3}},
        "validation": {"limit": 0},
        "output": {"dir": str(run), "trackers": []},
    }
    return parse(Recipe, {**plain, **sections})


def drawn(seed: int = 0, **options: Any) -> StableSRNetworks:
    """Networks of preset `tiny` with random weights."""
    return build_networks(StableSRSettings(init="random", preset="tiny"), seed=seed, **options)


def base_model(folder: Path, **values: Any) -> dict[str, Any]:
    """The model section of a recipe that goes on from a folder."""
    return {"kind": "stablesr", "base": str(folder), "preset": "tiny", **values}


def save_upscaler(folder: Path, networks: StableSRNetworks | None = None, **defaults: Any) -> Path:
    """A pipeline folder as a finished run leaves it; `defaults` of its calls."""
    from sslsr_diffusion.inference.open import restorer_of
    from sslsr_diffusion.models.families import FAMILIES

    restorer_of(networks or drawn(train="all"), FAMILIES["stablesr"], scale=4, **defaults).save(folder)
    return folder
