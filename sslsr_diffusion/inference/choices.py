"""What callers choose by name. Strings alone: the help of the command line is made of these tables without importing torch."""

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
