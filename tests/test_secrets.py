"""Tokens go to the hub and nowhere else: everything that a run writes or prints is searched for them, failures included."""

from __future__ import annotations

import os
from pathlib import Path

import forks
import pytest
from hub_server import HubServer

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "examples/photos"
STORED = "hf_StoredSecretToken1234"
USER = "margaret-the-user"


@pytest.fixture
def run(tmp_path):
    """`sslsr train` with publication, as a process of its own with HOME, user name and tokens that must not come out."""

    def call(hub: HubServer, *more: str, environment: dict[str, str]) -> forks.Ended:
        home = tmp_path / "home" / USER
        (home / "hf").mkdir(parents=True, exist_ok=True)
        (home / "hf" / "token").write_text(STORED)
        values = {
            "data.sources.0.path": PHOTOS / "train",
            "data.validation.0.path": PHOTOS / "validation",
            "data.workers": 0,
            "model.vae": "null",
            "losses": "[{kind: diffusion}]",
            "output.dir": home / "runs" / "x",
            "output.push_to_hub": "true",
            "output.push_state": "true",
            "output.hub_id": "someone/upscaler",
            "training.batch_size": 1,
            "training.crop_size": 32,
            "training.log_every": 1,
            "training.steps": 2,
            "validation.limit": 1,
            "validation.size": 32,
            "task.inference.steps": 1,
            "checkpoints.every": 1,
        }
        command = [str(ROOT / "train.py"), "--config", "tiny", *(f"--set={k}={v}" for k, v in values.items()), *more]
        own = {
            **{key: "" for key in os.environ if key.startswith("HF_")},
            "HOME": str(home),
            "USER": USER,
            "LOGNAME": USER,
            "HF_HOME": str(home / "hf"),
            "HF_XET_CACHE": str(home / "hf" / "xet"),
            "HF_ENDPOINT": hub.url,
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
            "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
            "OMP_NUM_THREADS": "1",
            "http_proxy": "",
        }
        return forks.python(*command, cwd=home, path=[ROOT], environment={**own, **environment})

    return call


def everything(folder: Path) -> dict[str, bytes]:
    """Name and content of every file of a run, its checkpoints and TensorBoard events included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_no_token_in_anything_that_a_run_writes(run, tmp_path):
    """The hub refuses the first publications, in words that repeat the token; the stored token of `hf auth login` is used."""
    with HubServer(tokens=(STORED,)) as hub:
        hub.fault("repos/create", 401, times=1)
        hub.fault("/commit/", 403, times=1, X_Error_Message=f"token {STORED} may not write here, https://u:{STORED}@host")
        done = run(hub, environment={})
        assert done.returncode == 0, done.stderr[-2000:]
        assert "not published" in done.stderr
        published = {path: file.data or b"" for path, file in hub.repositories["someone/upscaler"].files.items()}
    files = everything(tmp_path / "home" / USER / "runs")
    assert any("events.out" in name for name in files)
    assert any(name.endswith("log.txt") and b"not published" in data for name, data in files.items())
    for name, data in {**files, "stdout": done.stdout.encode(), "stderr": done.stderr.encode(), **published}.items():
        assert b"SecretToken" not in data, name
    card = published["README.md"].decode()
    for name in [name for name in published if name.endswith((".json", ".md")) and not name.startswith("state/")]:
        assert str(tmp_path).encode() not in published[name], name
    for private in (USER, str(tmp_path), "/home/", str(PHOTOS)):
        assert private not in card
