"""What the page's server keeps while it runs: uploads, results, and the views of them that a browser may ask for."""

import html
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.scoring import load_rgb
from sslsr_diffusion.images import resize_bicubic, to_array
from sslsr_diffusion.page.views import comparison_page

ADDRESS = "/views"


@dataclass(frozen=True)
class Shelf:
    """Folders below one that is deleted at the end; nobody finds a view who was not told its name."""

    root: Path

    @property
    def views(self) -> Path:
        return self.root / "views"

    @property
    def uploads(self) -> Path:
        return self.root / "uploads"

    def new(self, parent: Path | None = None) -> Path:
        """A new folder, for the results of a job for example."""
        folder = (parent or self.root / "made") / secrets.token_hex(16)
        folder.mkdir(parents=True)
        return folder

    def page(self, text: str) -> str:
        """The address of a page."""
        folder = self.new(self.views)
        (folder / "index.html").write_text(text, encoding="utf-8")
        return f"{ADDRESS}/{folder.name}/"

    def compared(self, source: Path, results: Mapping[str, Path]) -> str:
        """HTML that shows a comparison, or says why it cannot: the results are there all the same."""
        try:
            return self.frame(self.comparison(source, results))
        except UserError as error:
            return f"<p>The pictures cannot be shown here, only downloaded: {html.escape(str(error))}</p>"

    def comparison(self, source: Path, results: Mapping[str, Path]) -> str:
        """The address of a picture's bicubic enlargement and its results, by name, in the viewer; 8 bits, on white.

        Raises UserError: one is too large to be read whole.
        """
        from PIL import Image

        folder = self.new(self.views)
        pictures = {name: load_rgb(path) for name, path in results.items()}
        height, width = next(iter(pictures.values())).shape[-2:]
        pictures = {"bicubic": resize_bicubic(load_rgb(source), (height, width)).clamp(0, 1), **pictures}
        listed = []
        for number, (name, picture) in enumerate(pictures.items()):
            Image.fromarray(to_array(picture[0])).save(folder / f"{number}.png", compress_level=1)
            listed.append({"name": name, "src": f"{number}.png"})
        (folder / "index.html").write_text(comparison_page(source.name, listed), encoding="utf-8")
        return f"{ADDRESS}/{folder.name}/"

    @staticmethod
    def frame(address: str) -> str:
        """HTML that shows a view inside the page."""
        return f'<iframe src="{address}" title="viewer" style="width: 100%; height: 85vh; border: 0"></iframe>'
