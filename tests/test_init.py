"""`sslsr init`: what it lists, what it copies and where to, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sslsr_diffusion.cli import app
from sslsr_diffusion.config import read_raw
from sslsr_diffusion.errors import UserError

SHIPPED = {
    "plain.yaml": "# The small one. More about it.\na: 1\nb: 1\n",
    "gan/net.yaml": "# A plain network,\n# in two lines.\nextends: ../plain.yaml\nb: 2\n",
    "gan/deep/finer.yaml": "extends: ../net.yaml\nc: 3\n",
    "accelerate/cpu.yaml": "use_cpu: true\n",
}


@pytest.fixture(autouse=True)
def shipped(tmp_path, monkeypatch) -> Path:
    """Where the recipes of the package lie; the tests work in an empty folder beside it."""
    for name, text in SHIPPED.items():
        (tmp_path / "configs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "configs" / name).write_text(text)
    monkeypatch.setattr("sslsr_diffusion.config.__file__", str(tmp_path / "package/config.py"))
    (tmp_path / "examples/photos/train").mkdir(parents=True)
    (tmp_path / "examples/lr").mkdir()
    for name in ("photos/train/a.jpg", "lr/b.jpg", "SOURCES.md", "other.py"):
        (tmp_path / "examples" / name).write_text(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "configs"


def init(*arguments: str) -> list[str]:
    result = CliRunner().invoke(app, ["init", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def told(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        init(*arguments)
    assert not list(Path().rglob("*.yaml"))
    return str(caught.value)


def test_the_list_names_recipes_in_folders_and_no_files_of_the_launcher():
    assert [line.rstrip() for line in init()] == [
        "gan/deep/finer",
        "gan/net         A plain network, in two lines.",
        "plain           The small one.",
    ]


@pytest.mark.parametrize(
    ("arguments", "copies"),
    [
        (["plain"], ["plain.yaml"]),
        (["gan/net"], ["gan/net.yaml", "plain.yaml"]),
        (["gan/deep/finer.yaml"], ["gan/deep/finer.yaml", "gan/net.yaml", "plain.yaml"]),
        (["gan/net", "-o", "my runs/mine.yaml"], ["my runs/mine.yaml", "plain.yaml"]),
        (["gan/net", "-o", "../mine.yaml"], ["../mine.yaml", "../../plain.yaml"]),
    ],
)
def test_a_copy_reads_as_the_original(shipped, tmp_path, monkeypatch, arguments, copies):
    if copies[0].startswith(".."):
        (tmp_path / "here/a/b").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "here/a/b")
    *wrote, last = init(*arguments)
    assert wrote == [f"wrote {copy}" for copy in copies]
    assert last == f"Edit it, then: sslsr train --config {repr(copies[0]) if ' ' in copies[0] else copies[0]} --dry-run"
    assert read_raw(Path(copies[0])) == read_raw(shipped / f"{arguments[0].removesuffix('.yaml')}.yaml")


def test_photographs_that_a_recipe_names_come_along_once(shipped):
    (shipped / "tiny.yaml").write_text("extends: plain.yaml\ndata:\n  sources: [{kind: folder, path: examples/photos/train}]\n")
    *_, brought, _ = init("tiny")
    assert brought == "wrote examples/, the photographs that it names (authors and licences: examples/SOURCES.md)"
    assert {path.read_text() for path in Path("examples").rglob("*.*")} == {"photos/train/a.jpg", "lr/b.jpg", "SOURCES.md"}
    Path("examples/SOURCES.md").write_text("mine")
    assert not any("examples" in line for line in init("tiny", "-o", "again.yaml"))
    assert Path("examples/SOURCES.md").read_text() == "mine"


def test_photographs_that_cannot_be_written_are_one_sentence(shipped):
    (shipped / "tiny.yaml").write_text("data: {sources: [{path: examples/photos/train}]}\n")
    shutil.rmtree(shipped.parent / "examples")
    with pytest.raises(
        UserError, match=r"^examples/photos cannot be written \(No such file or directory\); work in a folder of your own\.$"
    ):
        init("tiny")


def test_what_is_there_is_kept():
    Path("plain.yaml").write_text("a: 7\n")
    assert init("gan/net")[:2] == ["wrote gan/net.yaml", "kept plain.yaml, which was already there"]
    assert read_raw(Path("gan/net.yaml")) == {"a": 7, "b": 2}
    with pytest.raises(UserError, match=r"gan/net.yaml is already there; choose another name with --output"):
        init("gan/net")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["gan/net", "-o", "mine.yaml"],
            "gan/net extends a recipe, whose copy would be ../plain.yaml, outside this folder; "
            "expected --output gan/net.yaml or the like, got mine.yaml.",
        ),
        (["gan/deep/finer", "-o", "x/mine.yaml"], "expected --output gan/deep/finer.yaml or the like, got x/mine.yaml."),
        (["../configs/gan/deep/finer.yaml", "-o", "mine.yaml"], "expected --output gan/deep/finer.yaml or the like, got mine.yaml."),
        (["gan"], "the nearest shipped ones: gan/deep/finer, gan/net."),
    ],
)
def test_refused_before_anything_is_written(arguments, message):
    assert message in told(*arguments)


def test_a_recipe_of_ones_own_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "round.yaml").write_text("extends: round.yaml\n")
    assert "goes round in a circle" in told(str(tmp_path / "round.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    assert "not valid YAML" in told(str(tmp_path / "broken.yaml"))
