"""README and docs/ are true: what they tell to type exists, what the tables hold is named where a user looks, links lead somewhere."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import typer
import yaml

from sslsr_diffusion.cli import app
from sslsr_diffusion.config import OF_THE_FILE, Settings, parse, shipped_recipes
from sslsr_diffusion.data import DataSettings
from sslsr_diffusion.data.degradation import DEGRADATIONS
from sslsr_diffusion.data.settings import MaskSettings
from sslsr_diffusion.data.steps import Step
from sslsr_diffusion.evaluation.metrics import METRICS
from sslsr_diffusion.inference.choices import COLOR_FIXES, SAMPLERS
from sslsr_diffusion.losses import LOSSES
from sslsr_diffusion.models.families import FAMILIES
from sslsr_diffusion.models.lora import TARGETS
from sslsr_diffusion.models.one_step.backbone import BACKBONES
from sslsr_diffusion.models.one_step.settings import OneStepSettings
from sslsr_diffusion.models.process import PROCESSES
from sslsr_diffusion.models.stablesr.settings import StableSRSettings
from sslsr_diffusion.models.x4.settings import X4Settings
from sslsr_diffusion.runs.recipe import Recipe
from sslsr_diffusion.tasks.kinds import TASKS

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TOLD = {name: text for name, text in PAGES.items() if name != "architecture.md"}  # that one is played by test_walks.py
COMMAND: Any = typer.main.get_command(app)
COMMANDS = [
    (name, line.split("  #")[0].strip())
    for name, text in PAGES.items()
    for line in re.sub(r" *\\\n *", " ", text).splitlines()
    if line.strip().startswith("sslsr ")
]
# scripts are the verbs of the same name
COMMANDS += [
    (name, f"sslsr {verb} {options.split('  #')[0].strip()}")
    for name, text in PAGES.items()
    for verb, options in re.findall(r"^.*\b(train|infer)\.py (-.*)$", text, re.MULTILINE)
    if "`" not in options
]


def blocks(language: str, pages: dict[str, str]) -> list[tuple[str, str]]:
    return [
        (name, block) for name, text in pages.items() for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


YAML = blocks("yaml", PAGES)
SECTIONS = [(name, block) for name, block in YAML if block.startswith("data:")]
PYTHON = blocks("python", TOLD)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_commands_exist(page, line):
    command = COMMAND
    words = shlex.split(line)[1:]
    context = command.make_context("sslsr", list(words), resilient_parsing=True)
    while hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands, f"{page}: no command {name}"
        command = command.commands[name]
    command.make_context(line, words, parent=context)  # raises for an option that is not there, or a value that does not fit


@pytest.mark.parametrize(("page", "text"), SECTIONS)
def test_data_sections_parse(page, text):
    settings = parse(DataSettings, yaml.safe_load(text)["data"])
    assert settings.sources or settings.degradation.steps


def test_there_are_some():
    assert len(COMMANDS) >= 20
    assert len(SECTIONS) >= 3
    assert len(PYTHON) >= 4
    assert len(KEYS) >= 30


@pytest.mark.parametrize(("page", "text"), PYTHON)
def test_what_python_imports_exists(page, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("sslsr_diffusion"):
            module = import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def sections(annotation: Any) -> set[type[Settings]]:
    """The settings classes inside a type: of unions, lists, tuples, dicts and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return {annotation}
    return {found for part in get_args(annotation) for found in sections(part)}


def is_key(path: str) -> bool:
    """Whether some recipe has this key; numbers are places in lists, and keys of `data` may be told without it."""
    at: set[type[Settings]] = {Recipe, DataSettings}
    for word in path.split("."):
        if word.isdigit():
            continue
        annotations = [cls.model_fields[word].annotation for cls in at if word in cls.model_fields]
        if not annotations:
            return False
        if any(get_origin(annotation) is dict and not sections(annotation) for annotation in annotations):
            return True  # what stands below has names of the user's
        at = {cls for annotation in annotations for cls in sections(annotation)}
    return True


def keys_of(raw: Any, above: str = "") -> Iterator[str]:
    """The dotted keys of plain data."""
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ():
        yield f"{above}{key}"
        yield from keys_of(value, f"{above}{key}.")


def told_keys(text: str) -> Iterator[str]:
    """Keys that a page mentions: `training.steps`, `output: {hub_id: me/mine}`, --set KEY=VALUE, and those of its recipes."""
    heads = {*Recipe.model_fields, *DataSettings.model_fields}
    for code in re.findall(r"`([^`\n]+)`", text):
        found = re.match(r"(\w+)((?:\.\w+)+)(?=$|[:= ])", code)
        if found is not None and found[1] in heads and Path(code).suffix not in (".json", ".yaml", ".md", ".py"):
            yield found[0]
        if re.fullmatch(r"\w+: \{.*\}", code) and code.split(":")[0] in heads:
            yield from keys_of(yaml.safe_load(code))
    yield from re.findall(r"--set ['\"]?([\w.]+)=", text)


KEYS = [(name, key) for name, text in TOLD.items() for key in dict.fromkeys(told_keys(text))]
RECIPES = [(name, yaml.safe_load(block)) for name, block in YAML]
KEYS += [(name, key) for name, raw in RECIPES for key in keys_of({k: v for k, v in raw.items() if k not in OF_THE_FILE})]


@pytest.mark.parametrize(("page", "key"), KEYS, ids=[f"{page}-{key}" for page, key in KEYS])
def test_keys_exist(page, key):
    assert is_key(key), f"{page} tells of {key}, which no recipe has"


def test_the_check_of_keys_can_fail():
    assert is_key("task.inference.antiring")
    assert is_key("losses.1.weight")
    assert is_key("validation.refuse.grid")
    assert is_key("degradation.pool_size")
    assert not is_key("task.antiring")
    assert not is_key("training.crop_sizes")
    assert list(told_keys("`training.crop_sizes: 3` in `model_index.json`, `output: {there: 1}`, --set 'model.basis=x'")) == [
        "training.crop_sizes",
        "output",
        "output.there",
        "model.basis",
    ]


def code_words(page: str) -> set[str]:
    """Words that stand as code on a page, in a line or in a block."""
    code = re.findall(r"^```.*?^```|`[^`\n]+`", PAGES[page], re.MULTILINE | re.DOTALL)
    return {word for piece in code for word in re.findall(r"[\w+-]+", piece)}


def help_words(*command: str) -> set[str]:
    """Words in the help of a command's options."""
    found = COMMAND
    for name in command:
        found = found.commands[name]
    return {word for option in found.params for word in re.findall(r"[\w+-]+", option.help or "")}


def verbs(command: Any = COMMAND) -> Iterator[str]:
    for name, below in command.commands.items():
        yield name
        yield from verbs(below) if hasattr(below, "commands") else ()


def kinds(classes: Iterable[type[Settings]]) -> set[str]:
    return {cls.model_fields["kind"].default for cls in classes}


def recipes_in(folder: str) -> list[str]:
    return [name.split("/")[1] for name in shipped_recipes() if name.startswith(f"{folder}/")]


MASKS = set(get_args(MaskSettings.model_fields["kind"].annotation))
IN_USE = {task for family in FAMILIES.values() for task in family.tasks}  # tasks that a shipped family can have
INFER_OPTIONS = {option.opts[0] for option in COMMAND.commands["infer"].params if option.opts[0].startswith("-")}
TRAIN_OPTIONS = {option.opts[0] for option in COMMAND.commands["train"].params}
PAGE_OPTIONS = {option.opts[0] for verb in ("page", "explore") for option in COMMAND.commands[verb].params}
# RESTORERS are not here: which one a family has is no choice of the user's
WHERE: dict[str, tuple[Iterable[str], set[str]]] = {
    "losses": (LOSSES, code_words("training.md")),
    "families": (FAMILIES, code_words("training.md")),
    "tasks": (IN_USE, code_words("training.md")),
    "tasks for families to come": (TASKS.keys() - IN_USE, code_words("architecture.md")),
    "noise processes, by a base's scheduler": (PROCESSES, code_words("training.md")),
    "presets of a model": (StableSRSettings.presets(), code_words("training.md")),
    "presets of the x4 upscaler": (X4Settings.presets(), code_words("x4_upscaler.md")),
    "sets of LoRA layers": (TARGETS, code_words("training.md")),
    "recipes": ((name for name in shipped_recipes() if "/" not in name), code_words("training.md")),
    "recipes of the GAN methods": (recipes_in("gan"), code_words("gan.md")),
    "recipes of one-step models": (recipes_in("one_step"), code_words("one_step.md")),
    "presets of one-step models": (OneStepSettings.presets(), code_words("one_step.md")),
    "bases of one-step models": (BACKBONES, code_words("one_step.md")),
    "sources": (kinds(sections(DataSettings.model_fields["sources"].annotation)), code_words("data.md")),
    "degradations": (DEGRADATIONS, code_words("data.md")),
    "steps of a degradation": (kinds(sections(Step)), code_words("data.md")),
    "masks": (MASKS, code_words("data.md")),
    "masks, sslsr prepare masks --help": (MASKS - {"files"}, help_words("prepare", "masks")),
    "metrics": (METRICS, code_words("evaluation.md")),
    "samplers": (SAMPLERS, code_words("upscaling.md")),
    "samplers, sslsr infer --help": (SAMPLERS, help_words("infer")),
    "colour fixes": (COLOR_FIXES, code_words("upscaling.md")),
    "options of sslsr train": (TRAIN_OPTIONS, code_words("training.md")),
    "options of sslsr infer": (INFER_OPTIONS, code_words("upscaling.md")),
    "options of sslsr page and explore": (PAGE_OPTIONS, code_words("page.md")),
    "commands": (verbs(), set().union(*map(code_words, PAGES))),
}


@pytest.mark.parametrize("what", WHERE)
def test_what_a_table_holds_is_told(what):
    entries, told = WHERE[what]
    assert {str(entry) for entry in entries} - told == set()


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """The first table under a heading: first cell without backticks -> all cells."""
    section = PAGES[page].split(f"\n## {heading}\n")[1]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[0].splitlines()[2:]]
    return {line[0].strip("` "): line for line in cells}


def test_which_loss_goes_with_which_task():
    told = rows("training.md", "Losses")
    for kind, loss in LOSSES.items():
        possible = {task for task in IN_USE if loss.reads <= TASKS[task].gives}
        reads, tasks = (set(re.findall(r"`(\w+)`", cell)) for cell in told[kind][2:4])
        assert (reads, tasks) == (set(loss.reads), possible), kind
    for kind, cells in rows("training.md", "Tasks").items():
        assert set(re.findall(r"`(\w+)`", cells[3])) == set(TASKS[kind].gives), kind


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_lines_fit_a_screen(page):
    """At most 120 columns outside tables, blocks of code and addresses."""
    text = PAGES.get(page) or (ROOT / page).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"\]\([^)]*\)|<https?:[^>]*>", "]", line) for line in prose.splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 120] == []


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    here = ROOT / (page if page == "README.md" else f"docs/{page}")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = here.parent / path if path else here
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target
