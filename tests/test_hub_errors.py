"""What the hub can answer, with the real client against a hub on loopback: a reason and one sentence for each, whoever asks."""

from __future__ import annotations

import ast
import errno
import hashlib
import logging
from pathlib import Path

import pytest
from hub_server import HubServer, quick_client
from hub_storage import Repository, Stored

from sslsr_diffusion import hub as hub_module
from sslsr_diffusion.hub import HubError, cached, commit_of, fetch, has_id_shape, is_hub_id, look_up, split_id

PACKAGE = Path(hub_module.__file__).parent
NAME, COMMIT = "someone/model", "1a" * 20
FILES = {"model_index.json": b"{}", "unet/config.json": b"{}", "state/checkpoint-1/manifest.json": b"{}", "README.md": b"# A model"}
TOKEN = "hf_SomebodysToken1"
LOGIN = "Invalid credentials in Authorization header"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    quick_client(monkeypatch)
    with HubServer() as server:
        stored = {path: Stored(len(data), hashlib.sha1(data).hexdigest(), data) for path, data in FILES.items()}
        server.repositories[NAME] = Repository(commits=[(COMMIT, "a commit", stored)])
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        yield server


GATED = "asks for accepted terms: accept them .* `hf auth login`; or give a local folder"
CASES = {  # the hub's answer, what is asked for, reason, sentence
    "missing": (
        None,
        {"name": "someone/else"},
        "missing",
        "someone/else is no folder here, and the hub has no such repository .*auth login",
    ),
    "no login": ((401, {"X_Error_Code": "RepoNotFound"}), {}, "missing", "has no such repository"),
    "missing data set": (None, {"name": "someone/else", "kind": "dataset"}, "missing", "the hub has no such data set"),
    "revision": (None, {"revision": "v9"}, "revision", "someone/model has no revision 'v9' on the hub; leave the revision out"),
    "gated": ((403, {"X_Error_Code": "GatedRepo"}), {}, "gated", GATED),
    "disabled": ((403, {"X_Error_Message": "Access to this resource is disabled."}), {}, "refused", r"refuses it \(.*is disabled.*whoami"),
    "wrong token": ((401, {"X_Error_Message": LOGIN}), {}, "refused", r"refuses it \(.*401.*Invalid credentials"),
    "forbidden": ((403, {"X_Error_Message": f"{TOKEN} may not read"}), {}, "refused", r"refuses it \(403 Forbidden: \*\*\* may not read\)"),
    "bad request": ((400, {}), {}, "refused", r"refuses it \(Bad request: refused\)"),
    "spaces": (None, {"name": "a b/c"}, "invalid", r"'a b/c' is neither an existing folder nor a valid hub id \(owner/name\)"),
    "no owner": (None, {"name": "model"}, "invalid", "nor a valid hub id"),
    "bad data set": (None, {"name": "a--b", "kind": "dataset"}, "invalid", "nor a valid hub id"),
    "broken": ((500, {}), {}, "unreachable", r"cannot be reached \(.*500.*\); connect once so that it is cached \(unset HF_HUB_OFFLINE"),
    "busy": ((429, {"Retry_After": "7"}), {}, "unreachable", "429 Too Many Requests"),
    "busy for a day": ((429, {"Retry_After": "86400"}), {}, "unreachable", "429 Too Many Requests"),
    "busy for no time": ((429, {"Retry_After": "-5"}), {}, "unreachable", "429 Too Many Requests"),
    "busy for nan": ((429, {"Retry_After": "nan"}), {}, "unreachable", "429 Too Many Requests"),
    "busy until a date": ((429, {"Retry_After": "Wed, 21 Oct 2026 07:28:00 GMT"}), {}, "unreachable", "429 Too Many Requests"),
    "cut": (("cut", {}), {}, "unreachable", r"cannot be reached \(\w+: "),
    "dropped": (("drop", {}), {}, "unreachable", r"cannot be reached \(\w+: "),
    "log-in page": (("page", {}), {}, "unreachable", r"cannot be reached \(JSONDecodeError: "),
    "offline": ("offline", {}, "unreachable", "cannot be reached .*offline mode is enabled"),
    "nobody there": ("down", {}, "unreachable", r"cannot be reached \(\w+: .*refused"),
}


@pytest.mark.parametrize(("answer", "asked", "reason", "sentence"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("ask", ["fetch", "look_up"])
def test_every_answer_has_its_sentence(hub, monkeypatch, ask, answer, asked, reason, sentence):
    from huggingface_hub import constants

    asked = {"name": NAME, "field": "model.base", "token": TOKEN, "endpoint": hub.url, **asked}
    if answer == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif answer == "down":
        down = HubServer()
        down.server.server_close()
        asked["endpoint"] = down.url
    elif answer is not None:
        hub.fault("/api/", answer[0], times=10**6, **answer[1])
    with pytest.raises(HubError, match=rf"^model\.base: .*{sentence}") as caught:
        fetch(patterns=["*.json"], **asked) if ask == "fetch" else look_up(**asked)
    error = caught.value
    assert (error.reason, f"model.base: {error.said}") == (reason, str(error))
    wish = answer[1].get("Retry_After") if isinstance(answer, tuple) else None
    assert error.retry_after == {"7": 7, "86400": 600, "-5": 1, "nan": 1}.get(wish)  # a second to ten minutes
    assert TOKEN not in str(error)
    assert "\n" not in str(error)
    assert str(error).endswith(".")
    if reason == "unreachable":
        assert ("not in the local cache" in str(error)) == (ask == "fetch")


def test_terms_are_asked_for_before_a_run_although_the_list_of_files_is_open(hub):
    hub.repositories[NAME].gated = True
    for ask in (lambda: look_up(NAME), lambda: fetch(NAME, patterns=["*.json"])):
        with pytest.raises(HubError, match="accepted terms") as caught:
            ask()
        assert caught.value.reason == "gated"


def test_a_look_up_that_takes_too_long_is_given_up(hub):
    hub.fault("/api/", "slow:2", times=10**6)
    with pytest.raises(HubError, match="cannot be reached") as caught:
        look_up(NAME, timeout=0.2)
    assert caught.value.reason == "unreachable"


def test_advice_follows_the_sentence_of_its_reason_alone(hub):
    with pytest.raises(HubError, match=r"hf auth login`\)\. Use another\.$"):
        fetch("someone/else", patterns=["*"], advice={"missing": "Use another.", "gated": "Never."})


def test_a_full_disk_is_no_fault_of_the_hub(monkeypatch):
    import huggingface_hub

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/blobs/x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left") as caught:
        fetch(NAME, patterns=["*"])
    assert not isinstance(caught.value, HubError)
    assert cached(NAME) is None


def test_what_was_fetched_is_found_again_without_the_hub(hub, monkeypatch, caplog):
    from huggingface_hub import constants

    assert look_up(NAME) == (COMMIT, tuple(sorted(FILES)))
    assert cached(NAME) is None
    folder = fetch(NAME, patterns=["*.json"])
    assert folder.name == COMMIT
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert found == ["model_index.json", "unet/config.json"]  # no training state where nobody asked for it
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    with caplog.at_level(logging.WARNING):
        assert fetch(NAME, patterns=["*.json"]) == cached(NAME, patterns=["*.json"]) == cached(NAME) == folder
        assert cached(NAME, "v9") is cached("someone/else") is cached("no id") is None
        assert commit_of(NAME) == commit_of(NAME, revision="main") == COMMIT
        assert commit_of("someone/else") is commit_of(NAME, "dataset") is None
    assert hub.log == []
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("text", "plain", "with_revision"),
    [
        ("someone/model", True, True),
        ("some-one/Model_2.1", True, True),
        ("someone/model@main", False, True),
        ("someone/model@refs/pr/1", False, True),
        ("someone/model@", False, False),
        ("someone/model@a b", False, False),
        ("model", False, False),
        ("a/b/c", False, False),
        ("./model", False, False),
        ("~/model", False, False),
        ("/model", False, False),
        ("someone/", False, False),
        ("-one/model", False, False),
        ("someone/model.", False, False),
        ("some--one/model", False, False),
        ("someone/model..x", False, False),
        ("someone/model.git", False, False),
        ("someone/modèle", False, False),
        ("someone/" + "x" * 97, False, False),
        ("someone/model\n", False, False),
    ],
)
def test_what_can_only_be_a_hub_id(tmp_path, monkeypatch, text, plain, with_revision):
    from huggingface_hub.utils import validate_repo_id

    monkeypatch.chdir(tmp_path)
    assert is_hub_id(text) == has_id_shape(text) == plain
    assert is_hub_id(text, revision=True) == with_revision
    if plain:
        validate_repo_id(text)  # the client's own rule; its older releases let more pass


def test_a_folder_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone/model").mkdir(parents=True)
    (tmp_path / "someone/model@main").mkdir()
    assert not is_hub_id("someone/model")
    assert not is_hub_id("someone/model@main", revision=True)
    assert has_id_shape("someone/model")
    assert split_id("someone/model@refs/pr/1") == ("someone/model", "refs/pr/1")
    assert split_id("someone/model") == ("someone/model", None)


@pytest.mark.parametrize(("library", "place"), [("huggingface_hub", "hub.py"), ("datasets", "data")])
def test_one_place_alone_asks_the_hub(library, place):
    """`datasets` has a client of its own, for data alone."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {path.relative_to(PACKAGE).parts[0] for name in names if name.split(".")[0] == library}
    assert found == {place}
