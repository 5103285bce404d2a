"""What callers choose by name. Strings alone: the help of the command line is made of these tables without importing torch."""

from sslsr_diffusion.errors import UserError

SAMPLERS: dict[str, str] = {
    "ddpm": "sampling:SpacedDDPM",
    "ddim": "sampling:SpacedDDIM",
    "ddim-original": "sampling:OriginalDDIM",
    "dpm++": "diffusers:DPMSolverMultistepScheduler",
    "unipc": "diffusers:UniPCMultistepScheduler",
    "euler": "diffusers:EulerDiscreteScheduler",
}
COLOR_FIXES: dict[str, str] = {
    "wavelet": "color_fix:wavelet",
    "adain": "color_fix:adain",
    "none": "color_fix:unchanged",
}
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "tif": "TIFF"}  # of the results: suffix -> Pillow's name


def parse_tile(text: str) -> int | str | None:
    """The `tile` of a call: "auto", None (written none: the whole picture) or a side in output pixels. Raises UserError."""
    if text in ("auto", "none"):
        return None if text == "none" else text
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise UserError(f"tile {text}: expected a side in output pixels such as 512, auto or none.")
    return int(text)
