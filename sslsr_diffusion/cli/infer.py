from __future__ import annotations


def infer() -> None:
    """Stub."""
