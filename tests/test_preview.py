"""The contact sheet of training samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_samples import from_folder, open_small, picture
from PIL import Image

from sslsr_diffusion.data.loader import open_samples
from sslsr_diffusion.data.sheet import contact_sheet


@pytest.fixture
def samples(tmp_path):
    for i in range(3):
        Image.fromarray(picture((80, 80), i)).save(tmp_path / f"p{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no")
    return tmp_path


def test_the_sheet_shows_what_training_gets(samples):
    data = from_folder(samples, workers=2, degradation={"pool_size": 2, "device": "training"})
    made, problems = open_samples(data, crop_size=64, scale=4, seed=5, count=5)
    assert len(made) == 5
    assert any("bad.png" in text for text in problems)
    batch = next(open_small(from_folder(samples)))
    assert made[0].lr is not None
    assert torch.equal(made[0].lr, batch.lr[0])
    sheet = contact_sheet(made, cell=64, columns=2)
    pixels = np.asarray(sheet)
    assert sheet.width == 2 * (3 * 64 + 8) + 8
    assert np.array_equal(pixels[8:72, 8:72], (made[0].hr.permute(1, 2, 0) * 255).round().byte().numpy())
    low = (made[0].lr.permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(pixels[8:72:4, 72:136:4], low)
    assert np.array_equal(pixels[8:72, 136:200, 0] > 0, made[0].mask[0].numpy())
    assert (pixels[72:128, 8:200] < 128).any()  # the text below


def test_the_command(samples, tmp_path):
    from typer.testing import CliRunner

    from sslsr_diffusion.cli import app

    words = ["preview", "--config", "tiny", "--count", "2", "--output", str(tmp_path / "sheets" / "x.png")]
    words += ["--set", f"data.sources=[{{kind: folder, path: {samples}}}]"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "2 samples" in result.output
    assert Image.open(tmp_path / "sheets" / "x.png").width > 100


@pytest.mark.parametrize(
    ("output", "message"),
    [("sheet", "a picture's suffix"), ("x.psd", "a picture's suffix"), ("bad.png/x.png", r"cannot be written \(.*name a file in a folder")],
)
def test_a_place_that_cannot_be_written_is_told(samples, output, message):
    from typer.testing import CliRunner

    from sslsr_diffusion.cli import app
    from sslsr_diffusion.errors import UserError

    words = ["preview", "--config", "tiny", "--count", "1", "--output", str(samples / output)]
    result = CliRunner().invoke(app, [*words, "--set", f"data.sources=[{{kind: folder, path: {samples}}}]"])
    with pytest.raises(UserError, match=message):
        raise result.exception
