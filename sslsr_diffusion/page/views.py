"""One HTML file that shows pictures: the assets beside this file and the data that they show, nothing from a network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).with_name("assets")


def explorer_page(title: str, data: Mapping[str, Any]) -> str:
    """The explorer of what `explorer.explorer_data` gives."""
    return _page(title, "explore", ("graph", "viewer", "explorer"), data)


def comparison_page(title: str, pictures: Sequence[Mapping[str, str]]) -> str:
    """Pictures of one size, each {name, src}, side by side or under one slider; without a heading, to stand in another page."""
    return _page(title, "compare", ("viewer",), pictures, heading=False)


def _page(title: str, start: str, scripts: Sequence[str], data: Any, heading: bool = True) -> str:
    import jinja2

    def asset(name: str) -> str:
        return (ASSETS / name).read_text(encoding="utf-8")

    template = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(asset("view.html.j2"))
    code = "".join(asset(f"{name}.js") for name in scripts).replace('"use strict";\n', "")
    parts = {"style": jinja2.filters.do_mark_safe(asset("style.css")), "scripts": jinja2.filters.do_mark_safe('"use strict";\n' + code)}
    return template.render(title=title, heading=heading, start=start, data=data, **parts)
