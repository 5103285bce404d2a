"""The operator's own tests, where they lie beside the package."""

from pathlib import Path
from typing import Any

from sslsr_diffusion.checkup.steps import PACKAGE, NotHere

FILE = PACKAGE.parent / "tests" / "test_ssg_cuda.py"


class _Counts:
    """A pytest plugin that keeps how the tests ended."""

    def __init__(self) -> None:
        self.ended: dict[str, list[str]] = {}

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for how in ("passed", "failed", "error", "skipped"):
            self.ended[how] = [report.nodeid.partition("::")[2] for report in terminalreporter.stats.get(how, [])]


def own_tests(file: str | Path = FILE) -> dict[str, Any]:
    """How many tests of a file ended how; AssertionError with the names of those that failed, NotHere without the file."""
    import pytest

    if not Path(file).is_file():
        raise NotHere("needs the tests of a checkout; the wheel has none.")
    counts = _Counts()
    pytest.main([str(file), "-q", "-p", "no:cacheprovider"], plugins=[counts])
    bad = [*counts.ended.get("failed", []), *counts.ended.get("error", [])]
    if bad or not counts.ended.get("passed"):
        raise AssertionError(f"{len(bad)} failed ({', '.join(bad[:4])}), {len(counts.ended.get('passed', []))} passed.")
    return {how: len(names) for how, names in counts.ended.items() if names}
