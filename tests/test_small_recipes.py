"""The recipes of the small model: a chain, and twins that differ in one loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sslsr_diffusion.runs.recipe import load_recipe, resolved

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def read(recipe: str) -> dict[str, Any]:
    return resolved(load_recipe(str(CONFIGS / f"{recipe}.yaml")))


def test_the_twins_differ_only_in_the_self_similarity_term() -> None:
    with_ssl, without = read("small_ssl"), read("small_nossl")
    assert [loss["kind"] for loss in with_ssl["losses"]] == ["diffusion", "pixel_l1", "gan", "self_similarity"]
    assert with_ssl["losses"][:3] == without["losses"]
    assert with_ssl["output"].pop("dir") != without["output"].pop("dir")
    del with_ssl["losses"], without["losses"]
    assert with_ssl == without


def test_each_link_of_the_chain_takes_what_the_one_before_writes() -> None:
    names = ("autoencoder", "base", "ssl", "decoder", "texture")
    autoencoder, base, upscaler, decoder, texture = (read(f"small_{name}") for name in names)
    assert base["model"]["vae"] == f"{autoencoder['output']['dir']}/pipeline"
    assert upscaler["model"]["base"] == f"{base['output']['dir']}/pipeline"
    assert decoder["model"]["base"] == f"{upscaler['output']['dir']}/pipeline"
    assert texture["model"]["base"] == f"{decoder['output']['dir']}/pipeline"
    assert texture["data"] == decoder["data"] == upscaler["data"]
    assert (
        1
        == upscaler["task"]["sampler_steps"]
        == upscaler["task"]["inference"]["steps"]
        == decoder["task"]["synthesis_steps"]
        == decoder["task"]["inference"]["steps"]
        == texture["task"]["synthesis_steps"]
        == texture["task"]["inference"]["steps"]
    )
