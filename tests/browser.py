"""A headless Chromium for tests, where playwright and a Chromium are; and node, which runs the pages' scripts without one."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs a Chromium (Debian: apt-get install chromium) and its driver: pip install playwright",
)


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def tab(browser: Any, **how: Any) -> Iterator[tuple[Any, list[str]]]:
    """A new page, and what went wrong in it: errors of its scripts, and requests that leave this machine."""
    context = browser.new_context(**how)
    page, wrong = context.new_page(), list[str]()
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(HERE) else wrong.append(asked.url))
    yield page, wrong
    context.close()


HERE = ("file:", "data:", "blob:", "http://127.0.0.1:")
