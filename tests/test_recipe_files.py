"""The files of recipes: how they are found, what they build on, and one sentence for each that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sslsr_diffusion.config import RecipeError, find_recipe, read_raw, shipped_recipes


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def complaint(attempt: Callable[[], object]) -> str:
    with pytest.raises(RecipeError) as caught:
        attempt()
    return str(caught.value)


def test_extends_overlays_key_by_key(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"a": {"b": 1, "c": 2}, "l": [1, 2]}))
    (tmp_path / "top.yaml").write_text("extends: base.yaml\na: {c: 3}\nl: [9]\n")
    assert read_raw(tmp_path / "top.yaml") == {"a": {"b": 1, "c": 3}, "l": [9]}


def test_extends_is_seen_from_the_folder_of_the_file(tmp_path):
    write(
        tmp_path,
        {"root.yaml": "a: 1\nb: 1\n", "gan/middle.yaml": "extends: ../root.yaml\nb: 2\n", "top.yaml": "extends: gan/middle.yaml\n"},
    )
    assert read_raw(tmp_path / "top.yaml") == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.yaml": "extends: b.yaml", "b.yaml": "extends: a.yaml"}, "extends: a.yaml -> b.yaml -> a.yaml goes round in a circle"),
        ({"a.yaml": "extends: x/a.yaml", "x/a.yaml": "extends: ../a.yaml"}, "extends: a.yaml -> x/a.yaml -> a.yaml goes round in a circle"),
        ({"a.yaml": "extends: nowhere.yaml"}, "a.yaml: extends: expected a file as seen from the folder of a.yaml, got 'nowhere.yaml'."),
        ({"a.yaml": "extends: [b.yaml]"}, "a.yaml: extends: expected a file as seen from the folder of a.yaml, got ['b.yaml']."),
        ({"a.yaml": f"extends: {'x' * 300}"}, "a.yaml: extends: expected a file as seen from the folder of a.yaml, got 'xxx"),
        ({"a.yaml": "extends: x/b.yaml", "x/b.yaml": "- 1"}, "b.yaml: expected `key: value` lines at the top level"),
    ],
)
def test_extends_mistakes(tmp_path, files, message):
    write(tmp_path, files)
    assert message in complaint(lambda: read_raw(tmp_path / "a.yaml"))


LOSSES = "losses: [{kind: diffusion}, {kind: pixel, name: near}, {kind: pixel, name: far}, {kind: graph}]\n"


@pytest.mark.parametrize(
    ("twin", "left"),
    [
        ("without: [graph]", ["diffusion", "near", "far"]),
        ("without: [near, graph]", ["diffusion", "far"]),
        ("without: [graph, graph]", ["diffusion", "near", "far"]),
        ("without: []", ["diffusion", "near", "far", "graph"]),
        ("losses: [{kind: a}, {kind: b}, {kind: b}]\nwithout: [b]", ["a"]),  # its own list, which replaced the parent's
    ],
)
def test_a_twin_without_a_loss(tmp_path, twin, left):
    write(tmp_path, {"base.yaml": f"seed: 1\n{LOSSES}", "twin.yaml": f"extends: base.yaml\n{twin}\n"})
    raw = read_raw(tmp_path / "twin.yaml")
    assert [loss.get("name", loss["kind"]) for loss in raw.pop("losses")] == left
    assert raw == {"seed": 1}


def test_a_section_of_another_kind_replaces_the_parents_and_a_choice_inside_one_keeps_its_neighbours(tmp_path):
    optimizer = "training: {optimizer: {kind: adamw, betas: [0.5, 0.9]}}"
    write(tmp_path, {"a.yaml": f"task: {{kind: diffusion, train: [unet]}}\n{optimizer}\n"})
    write(tmp_path, {"b.yaml": "extends: a.yaml\ntask: {kind: decoder}\ntraining: {optimizer: {kind: adamw8bit}}\n"})
    assert read_raw(tmp_path / "b.yaml") == {
        "task": {"kind": "decoder"},
        "training": {"optimizer": {"kind": "adamw8bit", "betas": [0.5, 0.9]}},
    }


def test_what_a_parent_takes_out_stays_out(tmp_path):
    middle = f"without: [graph]\n{LOSSES}"
    write(tmp_path, {"a.yaml": middle, "b.yaml": "extends: a.yaml\nwithout: [far]\n", "c.yaml": "extends: b.yaml\nwithout: [graph]\n"})
    assert [loss.get("name", loss["kind"]) for loss in read_raw(tmp_path / "b.yaml")["losses"]] == ["diffusion", "near"]
    assert complaint(lambda: read_raw(tmp_path / "c.yaml")) == (
        "c.yaml: without: expected names of losses that are there (diffusion, near), got graph."
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LOSSES + "without: [pixel, x]", "expected names of losses that are there (diffusion, near, far, graph), got pixel, x."),
        (LOSSES + "without: graph", "expected a list of words, for example [self_similarity], got 'graph'."),
        (LOSSES + "without: [graph, 1]", "expected a list of words, for example [self_similarity], got ['graph', 1]."),
        (LOSSES + "without:", "expected a list of words, for example [self_similarity], got None."),
        ("without: [graph]", "expected names of losses that are there (none), got graph."),
        ("losses: graph\nwithout: [graph]", "expected names of losses that are there (none), got graph."),
        ("losses: [1, {kind: [2]}, {name: a}]\nwithout: [graph]", "expected names of losses that are there (?, [2], a), got graph."),
    ],
)
def test_mistakes_in_without(tmp_path, text, message):
    write(tmp_path, {"r.yaml": text})
    assert complaint(lambda: read_raw(tmp_path / "r.yaml")) == f"r.yaml: without: {message}"


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A package that ships three recipes, one of them in a folder, and a file of the launcher's."""
    write(
        tmp_path / "configs",
        {"base.yaml": "a: 1", "gan/sharp_ssl.yaml": "extends: ../base.yaml", "z.yaml": "a: 2", "accelerate/cpu.yaml": "x: 1"},
    )
    monkeypatch.setattr("sslsr_diffusion.config.__file__", str(tmp_path / "package/config.py"))
    return tmp_path / "configs"


def test_shipped_recipes_may_lie_in_folders(shipped):
    assert list(shipped_recipes()) == ["base", "gan/sharp_ssl", "z"]
    assert find_recipe("gan/sharp_ssl") == find_recipe("gan/sharp_ssl.yaml") == shipped / "gan/sharp_ssl.yaml"
    assert read_raw(find_recipe("gan/sharp_ssl")) == {"a": 1}


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("gan/sharp_sll", "gan/sharp_ssl"),
        ("sharp_ssl", "gan/sharp_ssl"),
        ("configs/gan/sharp.yaml", "gan/sharp_ssl"),
        ("gan", "gan/sharp_ssl"),
        ("bsae", "base"),
        ("accelerate/cpu", "base, gan/sharp_ssl, z"),
    ],
)
def test_the_nearest_recipes_are_named(shipped, name, near):
    message = f"recipe: no file {name!r} and no shipped recipe of that name; the nearest shipped ones: {near}."
    assert complaint(lambda: find_recipe(name)) == message


def test_unreadable_files(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RecipeError, match="UTF-8"):
        read_raw(tmp_path / "binary.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RecipeError, match="key: value"):
        read_raw(tmp_path / "list.yaml")
    with pytest.raises(RecipeError, match=r"nearest shipped ones: .*tiny"):
        find_recipe("tinny")
    for name, reason in (
        (str(tmp_path), "is a folder"),
        ("x" * 300, "too long"),
        ("~nobody-here/x", "home"),
        ("/dev/null", "no regular file"),
    ):
        with pytest.raises(RecipeError, match=reason):
            find_recipe(name)
    (tmp_path / "weights.yaml").write_bytes(bytes(3 << 20))
    with pytest.raises(RecipeError, match="has 3 MB; is this a recipe"):
        read_raw(tmp_path / "weights.yaml")
    (tmp_path / "number.yaml").write_text("1: 2\n")
    with pytest.raises(RecipeError, match="expected a word as the key at the top level, found 1"):
        read_raw(tmp_path / "number.yaml")


def test_windows_files_are_read(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfseed: 1\r\nscale: 2\r\n")
    assert read_raw(tmp_path / "r.yaml") == {"seed": 1, "scale": 2}
