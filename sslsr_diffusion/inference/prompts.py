"""Texts of a call, one per picture."""

from collections.abc import Sequence

from sslsr_diffusion.errors import UserError


def per_picture(prompt: str | Sequence[str] | None, count: int, name: str) -> list[str]:
    """As many texts as there are pictures; one for all, or none, is repeated.

    Raises:
        UserError: another number of texts.
    """
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""] * count
    if len(prompt) != count:
        raise UserError(f"{name}: expected one text, or as many as there are images ({count}), got {len(prompt)}.")
    return list(prompt)
