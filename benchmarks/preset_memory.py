"""What the memory estimate says of every preset of the shipped recipes:

    python benchmarks/preset_memory.py [RECIPE ...]

Writes benchmarks/results/preset_memory.json: recipe -> preset -> the estimate in GiB, and a fingerprint of all that it depends on. Of
recipes that stand there with the same fingerprint nothing is counted again. Needs the packages of all losses (open_clip for
`discriminator: convnext`), or the estimate would lack their networks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from sslsr_diffusion.config import read_family, shipped_recipes
from sslsr_diffusion.losses import LOSSES
from sslsr_diffusion.losses.base import Means
from sslsr_diffusion.runs.memory import GIB, step_bytes
from sslsr_diffusion.runs.presets import load_presets
from sslsr_diffusion.runs.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "preset_memory.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*")
    asked = parser.parse_args().recipes
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    own = [name for name, path in shipped_recipes().items() if read_family(path)[0][1].get("presets")]
    for name in asked or own:
        for size, preset in load_presets(name).items():
            mark, key = fingerprint(preset.recipe), f"{size}gb"
            if rows.get(name, {}).get(key, {}).get("of") == mark:
                continue
            for loss in preset.recipe.losses:
                if loss.kind == "gan" and LOSSES["gan"].build(loss, Means(side=preset.recipe.picture_side, shapes=True)) is None:
                    parser.error(f"{name}: expected the packages of its losses, {loss.called}'s is missing")
            rows.setdefault(name, {})[key] = {"gib": round(sum(step_bytes(preset.recipe).values()) / GIB, 2), "of": mark}
            print(name, key, rows[name][key]["gib"], flush=True)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    rows = {name: {f"{size}gb": rows[name][f"{size}gb"] for size in load_presets(name)} for name in own if name in rows}
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def fingerprint(recipe: Recipe) -> str:
    """Ten characters that change when anything does that the memory of a step depends on."""
    training = recipe.training
    kinds = [recipe.model.kind, recipe.task.kind, *(loss.kind for loss in recipe.losses), training.optimizer.kind]
    values = recipe.model_dump(mode="json", include={"model", "task", "losses", "scale"}, exclude_defaults=True)
    step = [training.batch_size, training.crop_size, training.mixed_precision, training.gradient_checkpointing, training.ema is not None]
    text = json.dumps([kinds, values, step], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


if __name__ == "__main__":
    main()
