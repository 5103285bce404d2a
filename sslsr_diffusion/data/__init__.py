"""Training data: pictures or real pairs in, endless aligned batches out. Names are resolved at first use."""

from typing import TYPE_CHECKING

from sslsr_diffusion.tables import lazily

_HOME = {
    "DEGRADATIONS": "sslsr_diffusion.data.degradation",
    "DataSettings": "sslsr_diffusion.data.settings",
    "Degradation": "sslsr_diffusion.data.degradation",
    "DegradationSettings": "sslsr_diffusion.data.degradation",
    "TrainingLoader": "sslsr_diffusion.data.loader",
    "ValidationPair": "sslsr_diffusion.data.loader",
    "open_training_data": "sslsr_diffusion.data.loader",
    "open_validation_pairs": "sslsr_diffusion.data.loader",
}

__all__ = [
    "DEGRADATIONS",
    "DataSettings",
    "Degradation",
    "DegradationSettings",
    "TrainingLoader",
    "ValidationPair",
    "open_training_data",
    "open_validation_pairs",
]

if TYPE_CHECKING:
    from sslsr_diffusion.data.degradation import DEGRADATIONS, Degradation, DegradationSettings
    from sslsr_diffusion.data.loader import TrainingLoader, ValidationPair, open_training_data, open_validation_pairs
    from sslsr_diffusion.data.settings import DataSettings

__getattr__, __dir__ = lazily(__name__, _HOME)
