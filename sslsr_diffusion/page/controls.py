"""The fields of the page for the options of a call: which a model has is asked of its restorer, an empty one is the model's own value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.inference.choices import COLOR_FIXES, SAMPLERS, parse_tile

LEAST_SCALE, MOST_SCALE = 0.01, 64.0


@dataclass(frozen=True)
class Control:
    label: str
    info: str
    kind: type[int] | type[float] | type[str] = float
    choices: tuple[str, ...] = ()


CONTROLS: dict[str, Control] = {
    "num_inference_steps": Control("Steps", "sampling steps", int),
    "detail": Control("Detail", "0 bicubic to 1 all that the model adds"),
    "back_projection": Control("Back projection", "0 to 1: puts back what the picture lacks of the input"),
    "antiring": Control("Antiring", "0 to 1: takes back seams beside edges"),
    "fidelity": Control("Fidelity", "0 to 1: how much of the input the decoder takes over"),
    "strength": Control("Strength", "1 all steps; 0.3 the last 30 % of them"),
    "sampler": Control("Sampler", "how the steps are taken", str, tuple(SAMPLERS)),
    "color_fix": Control("Colours", "those of the input are kept this way", str, tuple(COLOR_FIXES)),
    "tile": Control("Tile", "side in output pixels, auto or none", str),
    "prompt": Control("Prompt", "what the picture shows", str),
    "negative_prompt": Control("Negative prompt", "what the guidance leads away from", str),
    "noise_level": Control("Noise level", "noise on the input; more adds more of the model's own", int),
    "lora_scale": Control("LoRA scale", "1 as trained, 0 the base alone"),
    "guidance_scale": Control("Guidance", "1 is off"),
}


def fields() -> dict[str, Any]:
    """A gradio component per option, hidden until a model has it."""
    import gradio as gr

    made: dict[str, Any] = {}
    for name, control in CONTROLS.items():
        told = {"label": control.label, "info": control.info, "visible": False, "min_width": 140}
        made[name] = gr.Dropdown(["", *control.choices], value="", **told) if control.choices else gr.Textbox(value="", max_lines=2, **told)
    return made


def shown(options: frozenset[str], defaults: Mapping[str, Any]) -> list[Any]:
    """The updates of `fields` for models with these options; their own values stand where nothing is given."""
    import gradio as gr

    updates = []
    for name, control in CONTROLS.items():
        own = defaults.get(name)
        hint = {"info": control.info if own is None else f"{control.info} [{own}]"} if control.choices else {"placeholder": str(own or "")}
        updates.append(gr.update(visible=name in options, **hint))
    return updates


def scale_of(value: float | None) -> float:
    """Raises UserError: no enlargement that the page makes."""
    if value is None or not LEAST_SCALE <= value <= MOST_SCALE:
        raise UserError(f"Scale: expected {LEAST_SCALE:g} to {MOST_SCALE:g}, such as 4, got {'none' if value is None else f'{value:g}'}.")
    return float(value)


def call_of(values: Mapping[str, str | None]) -> dict[str, Any]:
    """The options of a call from the values of `fields`. Raises UserError: no number where one is wanted."""
    call: dict[str, Any] = {}
    for name, text in values.items():
        control, text = CONTROLS[name], (text or "").strip()
        if name == "tile" and text:
            call[name] = parse_tile(text)
        elif text:
            try:
                call[name] = control.kind(text)
            except ValueError:
                wanted = "a whole number" if control.kind is int else "a number"
                raise UserError(f"{control.label}: expected {wanted}, or nothing for the model's own, got {text!r}.") from None
    return call
