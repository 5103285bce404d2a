"""Files of others are data: nothing in the package runs what they say, and only safetensors are taken as weights."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import save_upscaler

from sslsr_diffusion.errors import UserError

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "sslsr_diffusion").rglob("*.py"), *(ROOT / "examples").glob("*.py"), ROOT / "train.py", ROOT / "infer.py"])
RESTRICTED = "sslsr_diffusion/unpickle.py"  # reads foreign checkpoints with an unpickler that knows tensors alone
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load", "torch.jit.load", "runpy.run_path"}


def name_of(node: ast.expr) -> str:
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else "?"


def offences(source: str, file: str) -> Iterator[str]:
    """What could run something that stands in a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {m}" for m in modules if m.split(".")[0] in FORBIDDEN_MODULES and file != RESTRICTED)
        if not isinstance(node, ast.Call):
            continue
        called, given = name_of(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        last = called.rpartition(".")[2]
        checked = file == RESTRICTED and given.get("pickle_module") == "_restricted(foreign)"
        wrong = (
            called in FORBIDDEN_CALLS
            or (called == "torch.load" and given.get("weights_only") != "True" and not checked)
            or (called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False")
            or (called.startswith("yaml.") and last.startswith(("load", "unsafe", "full")))
            or (last == "from_pretrained" and given.get("use_safetensors") != "True" and called not in SAFE_LOADERS)
            or last == "extractall"
            or given.get("trust_remote_code") not in (None, "False")
            or "True" in (given.get("allow_pickle"), given.get("shell"))
        )
        if wrong:
            yield called


# The tokenizer's files are JSON and text; the pipeline's own from_pretrained (its super() call comes out as "?") sets use_safetensors.
SAFE_LOADERS = {"CLIPTokenizer.from_pretrained", "StableSRPipeline.from_pretrained", "?.from_pretrained"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_a_file_says_is_run(path):
    assert list(offences(path.read_text(), path.relative_to(ROOT).as_posix())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "AutoencoderKL.from_pretrained(folder)",
        "load_dataset(path, trust_remote_code=True)",
        "archive.extractall(folder)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_search_finds_what_it_is_for(line):
    assert list(offences(line, "sslsr_diffusion/some.py"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return save_upscaler(tmp_path_factory.mktemp("models") / "whole")


class Runs:
    """Unpickling it leaves a file."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self):
        return Path.touch, (self.trap,)


def test_pickled_weights_are_not_taken(pipeline, tmp_path):
    """Neither by the pipeline nor as a base for training, even where they are the only weights of a part."""
    from sslsr_diffusion import StableSRPipeline
    from sslsr_diffusion.models.stablesr.build import build_networks
    from sslsr_diffusion.models.stablesr.settings import StableSRSettings

    folder, trap = tmp_path / "pickled", tmp_path / "trap"
    shutil.copytree(pipeline, folder)
    for part in ("unet", "vae", "structural_encoder"):
        weights = folder / part / "diffusion_pytorch_model.safetensors"
        torch.save({**load_file(weights), "x": Runs(trap)}, weights.with_suffix(".bin"))
        weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        StableSRPipeline.from_pretrained(folder)
    with pytest.raises(
        UserError, match=r"^model\.base: unet of .*: expected .*\.safetensors, got .*\.bin; variants and pickles are not read\.$"
    ):
        build_networks(StableSRSettings(base=str(folder)))
    with pytest.raises(UserError, match=r"^model\.vae: vae of .* pickles are not read\.$"):
        build_networks(StableSRSettings(init="random", preset="tiny", vae=str(folder)))
    assert not trap.exists()


def test_code_in_a_pipeline_folder_is_not_run(pipeline, tmp_path):
    from sslsr_diffusion import StableSRPipeline

    folder, trap = tmp_path / "coded", tmp_path / "trap"
    shutil.copytree(pipeline, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["evil", "Evil"]}))
    (folder / "unet" / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(UserError, match=r"holds the Python file unet/evil\.py"):
        StableSRPipeline.from_pretrained(folder)
    assert not trap.exists()


def test_published_metric_weights_are_read_as_tensors_alone(tmp_path):
    """pyiqa asks for weights_only=False; while it loads, torch refuses to follow."""
    from sslsr_diffusion.evaluation.learned import _tensors_only

    torch.save({"weight": Runs(tmp_path / "trap")}, tmp_path / "w.pth")
    with _tensors_only(), pytest.raises(Exception, match=r"[Ww]eights.only"):
        torch.load(tmp_path / "w.pth", weights_only=False)
    assert not (tmp_path / "trap").exists()


def test_mask_files_cannot_hold_objects(tmp_path):
    import numpy as np
    from scipy.io import savemat

    from sslsr_diffusion.data.masks import MaskMismatch, read_mask

    np.save(tmp_path / "m.npy", np.array([[Runs(tmp_path / "trap")]]), allow_pickle=True)
    savemat(tmp_path / "m.mat", {"mat": np.array([[{"a": 1}]])})
    (tmp_path / "cut.mat").write_bytes((tmp_path / "m.mat").read_bytes()[:150])
    for name in ("m.npy", "cut.mat"):
        with pytest.raises(MaskMismatch):
            read_mask(tmp_path / name)
    assert not (tmp_path / "trap").exists()


def test_names_in_a_tar_are_labels_and_never_paths(tmp_path):
    """Members called ../x, /x or like a link are read in place; nothing is unpacked, and a link leads nowhere."""
    import io
    import tarfile

    from PIL import Image

    from sslsr_diffusion.data.settings import WebdatasetSource
    from sslsr_diffusion.data.sources import open_source

    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "PNG")
    shard = tmp_path / "in" / "a.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        for name in ("../../escaped.png", "/tmp/escaped.png", "good.png", "x\n\x1b[31m.png"):
            entry = tarfile.TarInfo(name)
            entry.size = buffer.getbuffer().nbytes
            tar.addfile(entry, io.BytesIO(buffer.getvalue()))
        link = tarfile.TarInfo("passwd.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = open_source(WebdatasetSource(path=str(shard)))
    items = [source.item(i) for i in range(len(source))]
    assert [item.hr for item in items] == [buffer.getvalue()] * 4
    assert all(item.name.isprintable() for item in items)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "in"]
