"""The model card: what was trained, from what, how good it is, how to use it. Nothing of the machine or its user gets into it."""

import contextlib
import getpass
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from sslsr_diffusion import __version__
from sslsr_diffusion.evaluation.metrics import METRICS
from sslsr_diffusion.evaluation.summary import markdown_table
from sslsr_diffusion.hub import repository_of
from sslsr_diffusion.models.families import FAMILIES
from sslsr_diffusion.models.family import Card
from sslsr_diffusion.shipped_model import SMALL, shipped_folder

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_SECRET_KEY = re.compile(r"token|secret|passw|api_?key|credential", re.IGNORECASE)
_TOKEN = re.compile(r"\b(?:hf|sk|gh[pousr]|github_pat|xox[a-z])[_-][A-Za-z0-9_-]{8,}")
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_PATH = re.compile(r"(?:file:/*|(?<![\w:/.~])(?:[A-Za-z]:[\\/]|\\\\|~[\w.-]*/|/(?=[\w.~-])))[^\s'\"`,;()\[\]{}<>|]*")
_WHOLE_PATH = re.compile(r"(?:file:/|[A-Za-z]:[\\/]|\\\\|~|/(?!/)|\.\.[\\/])")
_COMMON_NAMES = {"root", "user", "users", "home", "ubuntu", "admin", "nobody", "docker", "runner", "localhost"}
LICENCES = {  # of known bases; the model is derived from its base
    SMALL: "apache-2.0",
    "sd2-community/": "openrail++",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-x4-upscaler": "openrail++",
    "stable-diffusion-v1-5/": "creativeml-openrail-m",
    "black-forest-labs/FLUX.2-klein-4B": "apache-2.0",
    "black-forest-labs/FLUX.2-klein-base-4B": "apache-2.0",
    "Tongyi-MAI/Z-Image": "apache-2.0",
}
TERMS = {  # of bases whose licence has no id on the hub
    "stabilityai/stable-diffusion-3": "the base is under Stability AI's community licence, whose terms its page asks to accept first",
    "stabilityai/sd-turbo": "the base is under a licence of Stability AI, whose page refers commercial use to https://stability.ai/license",
}


def model_card(
    repo_id: str,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    pictures: Sequence[str] = (),
    *,
    base: str | None = None,
    base_revision: str | None = None,
    licence: str | None = None,
) -> str:
    """A README.md with YAML metadata.

    Args:
        recipe: the resolved recipe; keys of secrets and the output section are left out, absolute paths shortened.
        metrics: measured values by name; a row of the run's history does as well ("validation/psnr", with the same of
            bicubic enlargement as "validation_bicubic/psnr", of the model before its training as "validation_base/psnr", and "step").
        pictures: paths of sample pictures in the repository.
        base: hub id of what was fine-tuned; a local folder is not named; None: random weights.
        licence: a licence id of the hub; default: that of a known base, apache-2.0 for random weights, else "other".
    """
    from jinja2 import Environment, StrictUndefined

    family = FAMILIES.get((recipe.get("model") or {}).get("kind", ""))
    card = family.card if family else Card()
    if (recipe.get("model") or {}).get("lora"):
        card = replace(card, tags=(*card.tags, "lora"))
    repository = repository_of(base) if base else None
    shipped = base == SMALL and shipped_folder(SMALL) is not None
    origin = SMALL if shipped else repository or ""
    of_base = next((licence for prefix, licence in LICENCES.items() if origin.startswith(prefix)), "other")
    terms = next((terms for prefix, terms in TERMS.items() if origin.startswith(prefix)), "see the base model")
    licence = licence or ("apache-2.0" if base is None else of_base)
    link = f"[{base}](https://huggingface.co/{repository})" if repository else "a local model"
    metrics = metrics or {}
    values = _metrics(metrics, "validation/" if any(name.startswith("validation/") for name in metrics) else "")
    others = {"bicubic": _metrics(metrics, "validation_bicubic/"), "before training": _metrics(metrics, "validation_base/")}
    style: dict[str, Any] = {"sort_keys": False, "allow_unicode": True}
    template = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False)  # noqa: S701 - Markdown, not HTML
    return template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=yaml.safe_dump(_metadata(repo_id, repository, licence, values, card), **style),
        card=card,
        python=card.python.format(repo_id=repo_id, scale=recipe.get("scale", 4)),
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        version=__version__,
        base=base,
        base_link=f"`{SMALL}`, the model that comes with sslsr-diffusion" if shipped else link,
        base_revision=base_revision if base_revision and re.fullmatch(r"[\w.-]+", base_revision) else None,
        loss_names=_loss_names(recipe),
        table=markdown_table({name: found for name, found in others.items() if found} | {"this model": values}) if values else None,
        no_better=_no_better(recipe, others["before training"], values),
        step=metrics.get("step"),
        pictures=[{"alt": Path(path).stem, "path": path.replace(" ", "%20")} for path in pictures],
        recipe=yaml.safe_dump(scrub({k: v for k, v in recipe.items() if k != "output"}), **style).replace("```", "'''"),
        licence_text=f"`{licence}`" + (f" ({terms})" if licence == "other" else "") + ".",
    )


def card_files(metrics: Mapping[str, Any], pictures: Sequence[Path], **card: Any) -> dict[str, Path | bytes]:
    """What goes beside the pipeline: `model_card(**card)` as README.md, and the pictures that it shows in samples/."""
    named: dict[str, Path | bytes] = {f"samples/{scrub_text(picture.name)}": picture for picture in pictures}
    text = model_card(metrics=metrics, pictures=list(named), **card)
    return {"README.md": text.encode(), **named}


def _metrics(row: Mapping[str, Any], prefix: str) -> dict[str, float]:
    chosen = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix) and name != "step"}
    return {name: float(value) for name, value in chosen.items() if isinstance(value, int | float) and math.isfinite(value)}


def _no_better(recipe: Mapping[str, Any], before: Mapping[str, float], now: Mapping[str, float]) -> str | None:
    """The name of the metric that chose the weights, where it says that the training gained nothing."""
    name = (recipe.get("validation") or {}).get("best")
    if name not in METRICS or name not in before or name not in now:
        return None
    metric = METRICS[name]
    return None if (now[name] > before[name] if metric.higher_is_better else now[name] < before[name]) else metric.label


def _metadata(repo_id: str, base: str | None, licence: str, metrics: Mapping[str, float], card: Card) -> dict[str, Any]:
    found: dict[str, Any] = {"library_name": card.library} if card.library else {}
    found |= {"pipeline_tag": "image-to-image", "license": licence}
    found |= {"license_name": "licence-of-the-base-model"} if licence == "other" else {}
    found |= {"base_model": base} if base else {}
    found["tags"] = ["super-resolution", "image-upscaling", *card.tags, "self-similarity", "sslsr-diffusion"]
    if metrics:
        result = {
            "task": {"type": "image-to-image", "name": "Image super-resolution"},
            "dataset": {"type": "held-out", "name": "Held-out pictures of the recipe"},
            "metrics": [{"type": name, "value": round(value, 6)} for name, value in metrics.items()],
        }
        found["model-index"] = [{"name": repo_id.rpartition("/")[2], "results": [result]}]
    return found


def _loss_names(recipe: Mapping[str, Any]) -> str:
    kinds = [str(loss.get("kind", "")).replace("_", " ") for loss in recipe.get("losses", []) if isinstance(loss, Mapping)]
    words = [f"the {kind} loss" for kind in kinds if kind]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def scrub(value: Any) -> Any:
    """The same data without secrets, absolute paths and the names of this user and machine."""
    if isinstance(value, Mapping):
        return {scrub_text(str(key)): scrub(inner) for key, inner in value.items() if not _SECRET_KEY.search(str(key))}
    if isinstance(value, list | tuple):
        return [scrub(inner) for inner in value]
    return scrub_text(value) if isinstance(value, str) else value


def scrub_text(text: str) -> str:
    text = _TOKEN.sub("(secret)", text)
    text = _USER_IN_URL.sub("", text)
    text = _last_part(text) if _WHOLE_PATH.match(text) else _PATH.sub(lambda match: _last_part(match[0]), text)
    for name in _private_names():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", "user", text)
    return text


def _last_part(path: str) -> str:
    """The name of the file or folder alone; not even that for a home folder."""
    parts = [part for part in re.split(r"[\\/]+", path) if part not in ("", ".", "..", "file:") and not part.startswith("~")]
    home = len(parts) <= 2 and parts[:1] in (["home"], ["Users"])
    return "(local path)" if home or not parts else parts[-1]


def _private_names() -> Iterable[str]:
    names = {os.environ.get(key, "") for key in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")} | {Path.home().name, platform.node()}
    with contextlib.suppress(KeyError, OSError):  # no such user in this container
        names.add(getpass.getuser())
    return sorted((name for name in names if len(name) > 2 and name.lower() not in _COMMON_NAMES), key=len, reverse=True)
