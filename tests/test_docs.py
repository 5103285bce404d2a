"""What the pages under docs/ tell the reader to type exists: commands and options are parsed, `data:` sections too."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from sslsr_diffusion.cli import app
from sslsr_diffusion.config import parse
from sslsr_diffusion.data import DataSettings

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
COMMANDS = [
    (page.name, line.split("  #")[0].strip())
    for page in PAGES
    for line in re.sub(r" *\\\n *", " ", page.read_text(encoding="utf-8")).splitlines()
    if line.strip().startswith("sslsr ")
]
# scripts are the verbs of the same name
COMMANDS += [
    (page.name, f"sslsr {verb} {options.split('  #')[0].strip()}")
    for page in PAGES
    for verb, options in re.findall(r"^.*\b(train|infer)\.py (-.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    if "`" not in options
]
SECTIONS = [
    (page.name, block)
    for page in PAGES
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if block.startswith("data:")
]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_commands_exist(page, line):
    command = typer.main.get_command(app)
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
    assert len(COMMANDS) >= 12
    assert len(SECTIONS) >= 2
