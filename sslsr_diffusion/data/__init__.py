"""Training data: pictures or real pairs in, endless aligned batches out. Names are resolved at first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "DEGRADATIONS": "degradation",
    "DataSettings": "settings",
    "Degradation": "degradation",
    "DegradationSettings": "degradation",
    "TrainingLoader": "loader",
    "ValidationPair": "loader",
    "open_training_data": "loader",
    "open_validation_pairs": "loader",
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


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
