"""What goes wrong around the commands themselves: damaged model folders, places that cannot be written, full disks."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
from tiny_runs import save_upscaler
from typer.testing import CliRunner

from sslsr_diffusion.cli import app, run
from sslsr_diffusion.errors import UserError
from sslsr_diffusion.files import TEMPORARY


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return save_upscaler(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def damaged(pipeline, tmp_path, monkeypatch):
    """A copy whose UNet lacks, or has a broken, part; and a folder to work in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")

    def make(what: str) -> Path:
        folder = tmp_path / what
        shutil.copytree(pipeline, folder)
        if what == "json":
            (folder / "unet/config.json").write_text("{")
        elif what == "list":
            (folder / "unet/config.json").write_text("[]")
        elif what == "cut":
            weights = folder / "unet/diffusion_pytorch_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:1000])
        elif what == "missing":
            shutil.rmtree(folder / "unet")
        return folder

    return make


def told(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("json", "unet/config.json of json cannot be read as JSON"),
        ("list", "unet/config.json of list holds no `name: value` pairs"),
        ("cut", "cut/unet: its weights cannot be read (SafetensorError"),
        ("missing", "missing has no unet/config.json"),
    ],
)
def test_a_damaged_pipeline_is_not_converted_back(damaged, what, message):
    assert message in told("convert", "stablesr", "--to-original", "--checkpoint", damaged(what).name, "--output", "x.ckpt")


@pytest.mark.parametrize("budget", [[], ["--memory-budget", "4GB"]], ids=["free", "budget"])
@pytest.mark.parametrize("what", ["json", "list", "cut", "missing"])
def test_a_damaged_pipeline_is_not_opened(damaged, what, budget):
    from PIL import Image

    Image.new("RGB", (8, 8)).save("a.png")
    message = told("infer", "--input", "a.png", "--model", damaged(what).name, "--device", "cpu", *budget)
    assert message.startswith(f"--model {what}: cannot be loaded (")
    assert not [path for path in Path("results").iterdir() if path.suffix == ".png"]


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(damaged, tmp_path, monkeypatch):
    folder = str(damaged("whole"))
    for name in ("file/x.ckpt", "file/x.safetensors"):
        message = told("convert", "stablesr", "--to-original", "--checkpoint", folder, "--output", name)
        assert "cannot be written" in message

    def full(state, stream):
        stream.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672]")  # what torch says on a full disk

    monkeypatch.setattr("torch.save", full)
    assert "is the disk full?" in told("convert", "stablesr", "--to-original", "--checkpoint", folder, "--output", "x.ckpt")
    assert not [path for path in tmp_path.iterdir() if "x.ckpt" in path.name or path.name.startswith(TEMPORARY)]


def test_a_revision_of_a_local_folder_is_refused(damaged):
    assert "is for a hub id" in told("infer", "--input", "file", "--model", str(damaged("whole")), "--revision", "main")


def test_configs_name_no_folder_of_this_machine(pipeline, tmp_path):
    from sslsr_diffusion.inference import StableSRPipeline

    StableSRPipeline.from_pretrained(pipeline).save_pretrained(tmp_path / "again")
    for config in (tmp_path / "again").rglob("*.json"):
        assert str(pipeline.parent) not in config.read_text(), config
    assert json.loads((tmp_path / "again/unet/config.json").read_text())["_name_or_path"] == ""


@pytest.mark.parametrize(("number", "is_ours"), [(errno.ENOSPC, False), (errno.EROFS, False), (errno.EACCES, False), (errno.EBADF, True)])
def test_full_disks_and_missing_rights_are_one_line(number, is_ours, capsys):
    def write() -> None:
        raise OSError(number, "the reason", "some/place")

    with pytest.raises(OSError if is_ours else SystemExit) as caught:
        run(write)  # type: ignore[arg-type]
    if not is_ours:
        assert caught.value.code == 2
        assert capsys.readouterr().err.startswith("error: some/place: the reason; make room")
