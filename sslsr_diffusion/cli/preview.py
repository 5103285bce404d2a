from __future__ import annotations


def preview() -> None:
    """Stub."""
