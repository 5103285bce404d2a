"""Fine-tune image upscalers with the self-similarity loss (SSL).

Names are resolved at first use: importing the package costs milliseconds and touches neither a GPU nor diffusers.
"""

import logging
from typing import TYPE_CHECKING

from sslsr_diffusion.tables import lazily

__version__ = "0.1.0"

# Importing diffusers imports bitsandbytes where it is installed, which then warns that it lacks 4-bit kernels of the package `kernels`
# (on processors with AVX512-BF16). Nothing here uses them.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOME = {
    "self_similarity_graph": "sslsr_diffusion.ops",
    "SelfSimilarityLoss": "sslsr_diffusion.ops",
    "BackendUnavailable": "sslsr_diffusion.ops",
    "laplacian_edge_mask": "sslsr_diffusion.ops",
    "StableSRPipeline": "sslsr_diffusion.inference",
    "load_recipe": "sslsr_diffusion.runs.recipe",
    "open_upscaler": "sslsr_diffusion.runs.start",
    "train": "sslsr_diffusion.runs.start",
}

__all__ = [
    "BackendUnavailable",
    "SelfSimilarityLoss",
    "StableSRPipeline",
    "__version__",
    "laplacian_edge_mask",
    "load_recipe",
    "open_upscaler",
    "self_similarity_graph",
    "train",
]

if TYPE_CHECKING:
    from sslsr_diffusion.inference import StableSRPipeline
    from sslsr_diffusion.ops import BackendUnavailable, SelfSimilarityLoss, laplacian_edge_mask, self_similarity_graph
    from sslsr_diffusion.runs.recipe import load_recipe
    from sslsr_diffusion.runs.start import open_upscaler, train

__getattr__, __dir__ = lazily(__name__, _HOME)
