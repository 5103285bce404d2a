"""What a run folder shows while it trains and after: curves, validation grids over the steps, recipe."""

import time
from dataclasses import dataclass
from pathlib import Path

from sslsr_diffusion.training.reporting import plot_losses
from sslsr_diffusion.training.run_folder import RunFolder

CURVES = "curves.png"


@dataclass(frozen=True)
class Shown:
    """What there is of a run; `state` changes when there is more."""

    state: tuple[float, int]
    about: str
    recipe: str
    grids: tuple[Path, ...]  # by step


def list_runs(runs: Path) -> list[str]:
    """The names of the run folders in `runs`, the one that wrote last first."""
    return [path.name for path in sorted((p.parent for p in runs.glob("*/recipe.yaml")), key=_written, reverse=True)]


def look_at(run: Path) -> Shown:
    """What a run folder has now."""
    folder = RunFolder(run)
    rows = folder.history()
    grids = tuple(sorted(folder.pictures.glob("step-*.png")))
    recipe = folder.recipe.read_text(encoding="utf-8", errors="replace") if folder.recipe.is_file() else ""
    if not rows:
        return Shown((_written(run), len(grids)), "nothing is written down yet", recipe, grids)
    ago = time.time() - folder.history_file.stat().st_mtime
    numbers = {key: value for row in rows for key, value in row.items() if key.startswith(("loss/", "validation/"))}
    first = {key: value for row in rows if row["step"] == 0 for key, value in row.items()}
    before = {key: f" ({value:.4g} before training)" for key, value in first.items() if isinstance(value, float) and rows[-1]["step"]}
    told = ", ".join(f"{key} {value:.4g}{before.get(key, '')}" for key, value in numbers.items() if isinstance(value, float))
    return Shown((_written(run), len(grids)), f"step {rows[-1]['step']}, written {_ago(ago)} ago: {told}", recipe, grids)


def name_of(grid: Path) -> str:
    """What a validation grid shows, for people."""
    step = grid.stem.removeprefix("step-").lstrip("0")
    return f"step {step}" if step else "step 0: before training"


def draw_curves(run: Path, folder: Path) -> Path | None:
    """A picture of a run's losses and validation metrics, in `folder`; None where there is nothing to draw yet."""
    path = folder / CURVES
    path.unlink(missing_ok=True)
    plot_losses(RunFolder(run).history(), path)
    return path if path.exists() else None


def _written(run: Path) -> float:
    folder = RunFolder(run)
    return max((path.stat().st_mtime for path in (folder.history_file, folder.recipe) if path.exists()), default=0.0)


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
