from __future__ import annotations

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.weights import WEIGHTS, Weights, digest, missing, use_folder

CONTENT = b"weights" * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    use_folder(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path


@pytest.fixture
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    (root / "w.pth").write_bytes(CONTENT)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/w.pth"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_a_file_that_is_there_is_used(hub):
    (hub / "pyiqa").mkdir()
    (hub / "pyiqa" / "w.pth").write_bytes(CONTENT)
    assert missing((Weights("pyiqa", "w.pth", "http://127.0.0.1:1/w.pth", HASH[:8], 1),)) is None


def test_a_missing_file_is_downloaded_and_checked(hub, server):
    file = Weights("pyiqa", "w.pth", server, HASH[:8], 1)
    assert missing((file,)) is None
    assert file.path == hub / "pyiqa" / "w.pth"
    assert digest(file.path) == HASH


def test_a_damaged_download_is_refused_and_leaves_nothing(hub, server):
    reason = missing((Weights("pyiqa", "w.pth", server, "00000000", 1),))
    assert "damaged" in reason
    assert list((hub / "pyiqa").iterdir()) == []


def test_a_damaged_file_is_named(hub):
    (hub / "pyiqa").mkdir()
    (hub / "pyiqa" / "w.pth").write_bytes(CONTENT[:100])
    reason = missing((Weights("pyiqa", "w.pth", "http://127.0.0.1:1/w.pth", HASH[:8], 1),))
    assert reason.startswith(f"{hub / 'pyiqa' / 'w.pth'} is damaged")
    assert "download http://127.0.0.1:1/w.pth again" in reason


def test_an_offline_user_reads_what_to_put_where(hub, monkeypatch):
    files = tuple(Weights("pyiqa", f"{n}.pth", f"http://127.0.0.1:1/{n}.pth", HASH, 3) for n in "ab")
    reason = missing(files)
    assert "cannot be downloaded (Connection refused)" in reason
    assert (
        f"http://127.0.0.1:1/a.pth (3 MB) to {hub / 'pyiqa' / 'a.pth'}; http://127.0.0.1:1/b.pth (3 MB) to {hub / 'pyiqa' / 'b.pth'}"
        in reason
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no download was tried (offline)" in missing(files)


def test_weights_dir_must_be_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"--weights-dir: .* is not a folder"):
        use_folder(tmp_path / "no")


def test_our_table_names_the_files_that_pyiqa_and_torchvision_read():
    pytest.importorskip("pyiqa", reason="the extra eval is not installed")
    from pyiqa.archs import clip_model, dists_arch, inception, lpips_arch, musiq_arch
    from torchvision.models import AlexNet_Weights, VGG16_Weights, VGG19_Weights

    theirs = {
        "lpips": [AlexNet_Weights.IMAGENET1K_V1.url, lpips_arch.default_model_urls["0.1_alex"]],
        "lpips-vgg": [VGG16_Weights.IMAGENET1K_V1.url, lpips_arch.default_model_urls["0.1_vgg"]],
        "dists": [VGG16_Weights.IMAGENET1K_V1.url, dists_arch.default_model_urls["url"]],
        "vgg19": [VGG19_Weights.IMAGENET1K_V1.url],
        "musiq": [musiq_arch.default_model_urls["koniq10k"]],
        "clipiqa": [clip_model._MODELS["RN50"]],
        "fid": [inception.FID_WEIGHTS_URL],
    }
    assert {name: [f.url for f in files] for name, files in WEIGHTS.items()} == theirs
    assert all(Path(f.url).name == f.name for files in WEIGHTS.values() for f in files)
