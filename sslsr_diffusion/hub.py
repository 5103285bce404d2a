"""The only file that asks the Hugging Face hub: what an id is, fetching, looking up, publishing, and one sentence for each error."""

import contextlib
import errno
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sslsr_diffusion.errors import UserError

Kind = Literal["model", "dataset"]
Reason = Literal["missing", "revision", "gated", "refused", "invalid", "unreachable"]

PIPELINE_FILES = ("model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors")  # nothing that could be a pickle
WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt")  # how files of weights end
STATE = "state"  # the folder in which a run publishes what it goes on from

_PART = r"\w(?:[\w.-]{0,94}\w)?"
_ID = re.compile(rf"(?!runs/){_PART}/{_PART}", re.ASCII)  # runs/ is the folder of our own
_REVISION = re.compile(r"[\w./-]{1,128}", re.ASCII)
_FILE = re.compile(r"[\w.+-]+(?:/[\w.+-]+)*", re.ASCII)
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{6,}")
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}  # errors of this machine, not of the hub
_LONGEST_WAIT_S = 600.0
_SENTENCES: dict[Reason, str] = {
    "missing": "{name} is no folder here, and the hub has no such {what} (or it is private and no login was given: `hf auth login`).",
    "revision": "{name} has no revision {revision!r} on the hub; leave the revision out for the newest one.",
    "gated": "{name} asks for accepted terms: accept them on its page of the hub, then `hf auth login`; or give a local folder.",
    "refused": "{name} is no folder here, and the hub refuses it ({told}); "
    "see who you are there (`hf auth whoami`), or give a local folder.",
    "invalid": "{name!r} is neither an existing folder nor a valid hub id (owner/name).",
    "unreachable": "{name} is {places}, and the hub cannot be reached ({told}); connect once so that it is cached "
    "(unset HF_HUB_OFFLINE if it is set), or give a local folder.",
}


class HubError(UserError):
    """The hub does not give what was asked of it.

    Attributes:
        reason: missing (or private), revision (there is no such one), gated (terms), refused (any other 4xx answer: a wrong token, a
            disabled repository), invalid (the text is no id), unreachable (no network, offline mode, or a server in trouble).
        said: the message without the field that it is about.
        retry_after: seconds that the hub asks to wait.
    """

    def __init__(self, reason: Reason, said: str, *, field: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(f"{field}: {said}" if field else said)
        self.reason, self.said, self.retry_after = reason, said, retry_after


class Found(NamedTuple):
    """What the hub has under an id now."""

    commit: str
    files: tuple[str, ...]


def has_id_shape(text: str) -> bool:
    """Whether a text is `owner/name` as the hub allows it, whatever there may be of that name on this machine; no file of weights."""
    return bool(_ID.fullmatch(text)) and "--" not in text and ".." not in text and not text.endswith((".git", *WEIGHTS))


def is_hub_id(text: str, *, revision: bool = False) -> bool:
    """Whether a text can only be a repository: `owner/name`, and nothing here has that name.

    `revision`: whether `owner/name@revision` is one, too.
    """
    name, at, pinned = text.partition("@")
    if not has_id_shape(name) or (at and not (revision and _REVISION.fullmatch(pinned))):
        return False
    return not Path(text).exists()


def split_id(text: str) -> tuple[str, str | None]:
    """`owner/name@revision` -> (owner/name, revision); None without one."""
    name, _, revision = text.partition("@")
    return name, revision or None


def split_file(text: str) -> tuple[str, str | None]:
    """`owner/name#folder/file.pth` -> (owner/name, folder/file.pth); None without one.
    Raises UserError: what stands behind the # is no plain path inside a repository.
    """
    name, sharp, file = text.partition("#")
    if sharp and has_id_shape(name) and (not _FILE.fullmatch(file) or ".." in file):
        raise UserError(f"{text}: expected owner/name#file with the path of a file in the repository, got {file!r} behind the #.")
    return name, file or None


def repository_of(model: str) -> str | None:
    """The id in a model's `owner/name` or `owner/name#file`; None for what is no such text, or names something on this machine."""
    name = split_file(model)[0]
    return name if is_hub_id(name) and not Path(model).expanduser().exists() else None


def fetch(
    name: str,
    revision: str | None = None,
    *,
    patterns: Sequence[str],
    ignore: Sequence[str] = (f"{STATE}/*",),
    kind: Kind = "model",
    field: str = "model",
    advice: Mapping[Reason, str] | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A repository's files in the hub's cache, downloaded if they are not there yet; the folder's name is the commit.

    Args:
        revision: branch, tag or commit; None: the newest.
        patterns, ignore: which files; by default no training state.
        field: what the messages begin with: the recipe's key, the keyword or the flag that named the repository.
        advice: a further sentence by the error's reason.
    Raises HubError: for everything that the hub, the network or the cache can do; errors of the disk stay OSErrors.
    """
    places = "no folder here and not in the local cache"
    with _asking(name, revision=revision, kind=kind, field=field, token=token, advice=advice, places=places):
        from huggingface_hub import snapshot_download

        chosen: dict[str, Any] = {"repo_type": kind, "allow_patterns": [*patterns], "ignore_patterns": [*ignore]}
        where: dict[str, Any] = {"token": token, "endpoint": endpoint, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return Path(snapshot_download(name, revision=revision, **chosen, **where))


def cached(
    name: str,
    revision: str | None = None,
    *,
    patterns: Sequence[str] = (),
    ignore: Sequence[str] = (f"{STATE}/*",),
    kind: Kind = "model",
    cache_dir: str | Path | None = None,
) -> Path | None:
    """The folder that `fetch` would give without a network, or None; without patterns, that of whatever was fetched of it."""
    try:
        return fetch(name, revision, patterns=patterns, ignore=ignore, kind=kind, cache_dir=cache_dir, local_files_only=True)
    except (HubError, OSError):
        return None


def look_up(
    name: str,
    kind: Kind = "model",
    revision: str | None = None,
    timeout: float = 5.0,
    *,
    field: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    advice: Mapping[Reason, str] | None = None,
) -> Found:
    """The commit and the file names that the hub has under an id now, if its files may be had; nothing is downloaded.
    Raises HubError: as `fetch`, but the cache is not asked.
    """
    with _asking(name, revision=revision, kind=kind, field=field, token=token, advice=advice):
        from huggingface_hub import HfApi

        api = HfApi(endpoint=endpoint, token=token)
        info = api.repo_info(name, revision=revision, repo_type=kind, timeout=timeout)
        if getattr(info, "gated", False):  # everybody may read its list of files
            api.auth_check(name, repo_type=kind)
        return Found(str(info.sha), tuple(file.rfilename for file in info.siblings or ()))


def read_head(name: str, file: str, revision: str) -> dict[str, str]:
    """What stands in a repository's safetensors file beside its tensors, none of which is fetched.
    Raises HubError: as `look_up`. UserError: the file is damaged.
    """
    with _asking(name, revision=revision, kind="model", field="model", token=None):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import SafetensorsParsingError

        with contextlib.suppress(SafetensorsParsingError):
            told = HfApi().parse_safetensors_file_metadata(name, file, revision=revision).metadata
            return {key: text for key, text in told.items() if isinstance(text, str)}
    raise UserError(f"model {name}: expected a safetensors file, got {file}, whose head cannot be read; fetch or publish it again.")


def commit_of(name: str, kind: Kind = "model", revision: str | None = None, timeout: float = 10.0) -> str | None:
    """Today's commit as the hub says, or that of the local cache where the hub does not answer; None if neither knows."""
    try:
        return look_up(name, kind, revision, timeout).commit
    except HubError:  # what cannot be opened is reported by whoever opens it
        folder = cached(name, revision, kind=kind)
        return folder.name if folder else None


class Repository:
    """One model repository, to be written. What the hub refuses is a HubError, without any token in it."""

    def __init__(self, name: str, *, token: str | None = None, endpoint: str | None = None) -> None:
        self.name, self._token, self._endpoint = name, token, endpoint

    def create(self, *, private: bool) -> None:
        """Make it, if it is not there."""
        with self._writing() as api:
            api.create_repo(self.name, private=private, exist_ok=True)

    def files(self) -> set[str]:
        with self._writing() as api:
            return set(api.list_repo_files(self.name))

    def read(self, path: str) -> bytes:
        with self._writing() as api, tempfile.TemporaryDirectory() as scratch:
            return Path(api.hf_hub_download(self.name, path, local_dir=scratch)).read_bytes()

    def commit(self, message: str, add: Mapping[str, Path | bytes], remove: Iterable[str] = ()) -> str:
        """One commit: files by their path in the repository, and paths that go; gives its id."""
        with self._writing() as api:
            from huggingface_hub import CommitOperationAdd, CommitOperationDelete

            operations: list[Any] = [CommitOperationDelete(path, is_folder=False) for path in sorted(remove)]
            operations += [CommitOperationAdd(path, content) for path, content in sorted(add.items())]
            return str(api.create_commit(self.name, operations, commit_message=message).oid)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Any]:
        from huggingface_hub import HfApi

        try:
            with _no_bars():
                yield HfApi(endpoint=self._endpoint, token=self._token)
        except Exception as error:
            if _of_this_machine(error):
                raise
            raise HubError(_reason(error), _told(error, self._token), retry_after=_retry_after(error)) from error


def without_tokens(text: str, *known: str | None) -> str:
    """A message of the client or the hub, without the tokens that are in use and all that look like one."""
    from huggingface_hub import get_token

    for secret in (*known, get_token()):
        text = text.replace(secret, "***") if secret else text
    return _TOKEN.sub("hf_***", text)


@contextlib.contextmanager
def _asking(
    name: str,
    *,
    revision: str | None,
    kind: Kind,
    field: str | None,
    token: str | None,
    advice: Mapping[Reason, str] | None = None,
    places: str = "no folder here",
) -> Iterator[None]:
    """Whatever the client raises, as the one sentence for it."""
    from huggingface_hub.errors import HFValidationError

    try:
        if kind == "model" and not has_id_shape(name):  # the client allows models without an owner, who are no more
            raise HFValidationError(name)
        yield
    except Exception as error:  # a network, a proxy and a client fail in more ways than there are classes for
        if _of_this_machine(error):
            raise
        reason = _reason(error)
        what = "repository" if kind == "model" else "data set"
        said = _SENTENCES[reason].format(name=name, revision=revision, what=what, places=places, told=_told(error, token))
        said = " ".join([said, *([advice[reason]] if advice and reason in advice else [])])
        raise HubError(reason, said, field=field, retry_after=_retry_after(error)) from error


def _reason(error: Exception) -> Reason:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):  # is a RepositoryNotFoundError, too
        return "gated"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "missing"
    if isinstance(error, errors.RevisionNotFoundError):
        return "revision"
    if isinstance(error, errors.HFValidationError):
        return "invalid"
    status = getattr(_response(error), "status_code", 0)
    busy = (408, 425, 429)
    return "refused" if isinstance(error, errors.LocalTokenNotFoundError) or (400 <= status < 500 and status not in busy) else "unreachable"


def _response(error: Exception) -> Any:
    """The hub's answer behind an error; "not in the cache" has it one step away."""
    found = [getattr(link, "response", None) for link in (error, error.__cause__)]
    return next((response for response in found if response is not None), None)


def _told(error: Exception, token: str | None) -> str:
    """The first line of an answer and the hub's own words for it; without an answer, what kind of error the network had."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    lines = str(cause).strip().splitlines()
    words = [] if lines and _response(cause) is not None else [type(cause).__name__]
    words += [lines[0].rstrip(" .:")] if lines else []
    words += [line for line in str(getattr(cause, "server_message", None) or "").splitlines()[:1] if line not in words[-1]]
    return without_tokens(": ".join(words), token)[:200]


def _of_this_machine(error: Exception) -> bool:
    """A full disk or a folder that may not be written: the command line has its own sentence for these."""
    return isinstance(error, OSError) and error.errno in _DISK and _response(error) is None


def _retry_after(error: Exception) -> float | None:
    """Seconds that a 429 or 503 answer asks to wait (at most ten minutes); None for all else."""
    response = _response(error)
    if getattr(response, "status_code", None) not in (429, 503):
        return None
    try:
        return min(max(1.0, float(response.headers["Retry-After"])), _LONGEST_WAIT_S)  # in this order nan is 1
    except (KeyError, ValueError):
        return None


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of the upload across the one of the training."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
