"""The pipeline and its parts; names are resolved at first use, because diffusers takes seconds to import."""

from typing import TYPE_CHECKING

from sslsr_diffusion.tables import lazily

_HOME = {"StableSRPipeline": "sslsr_diffusion.inference.pipeline", "StableSRPipelineOutput": "sslsr_diffusion.inference.pipeline"}

__all__ = ["StableSRPipeline", "StableSRPipelineOutput"]

if TYPE_CHECKING:
    from sslsr_diffusion.inference.pipeline import StableSRPipeline, StableSRPipelineOutput

__getattr__, __dir__ = lazily(__name__, _HOME)
