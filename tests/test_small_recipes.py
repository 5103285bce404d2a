"""The recipes of the small model: a chain, and twins that differ in one loss."""

from __future__ import annotations

from pathlib import Path

import yaml

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def read(recipe: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text(encoding="utf-8"))


def test_the_twins_differ_only_in_the_self_similarity_term() -> None:
    with_ssl, without = read("small_ssl"), read("small_nossl")
    assert [loss["kind"] for loss in with_ssl["losses"]] == ["diffusion", "pixel_l1", "self_similarity"]
    assert with_ssl["losses"][:2] == without["losses"]
    assert with_ssl.pop("output") != without.pop("output")
    del with_ssl["losses"], without["losses"]
    assert with_ssl == without


def test_each_link_of_the_chain_takes_what_the_one_before_writes() -> None:
    autoencoder, base, upscaler = (read(name) for name in ("small_autoencoder", "small_base", "small_ssl"))
    assert base["model"]["vae"] == f"{autoencoder['output']['dir']}/pipeline"
    assert upscaler["model"]["base"] == f"{base['output']['dir']}/pipeline"
    assert upscaler["validation"]["steps"] == upscaler["training"]["sampler_steps"]
