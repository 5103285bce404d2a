"""The pipeline and its parts; names are resolved at first use, because diffusers takes seconds to import."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "StableSRPipeline": "sslsr_diffusion.inference.pipeline",
    "StableSRPipelineOutput": "sslsr_diffusion.inference.pipeline",
}

__all__ = ["StableSRPipeline", "StableSRPipelineOutput"]

if TYPE_CHECKING:
    from sslsr_diffusion.inference.pipeline import StableSRPipeline, StableSRPipelineOutput


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
