"""Training data: pictures or real pairs in, endless aligned batches out."""

from sslsr_diffusion.data.degradation import DEGRADATIONS, Degradation, DegradationSettings
from sslsr_diffusion.data.loader import TrainingLoader, ValidationPair, open_training_data, open_validation_pairs
from sslsr_diffusion.data.settings import DataSettings

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
