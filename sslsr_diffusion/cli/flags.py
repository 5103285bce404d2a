"""Messages carry the name of a keyword; on the command line it is a flag."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

from sslsr_diffusion.errors import UserError

RENAMED = {"num_inference_steps": "steps", "vae_tile": "tile"}


@contextlib.contextmanager
def as_flags(*names: str, renamed: Mapping[str, str] = RENAMED) -> Iterator[None]:
    """A UserError that begins with one of these keywords begins with the flag of that name instead.

    `model runs/x: no such folder` becomes `--model runs/x: no such folder`.
    """
    try:
        yield
    except UserError as error:
        text = str(error)
        found = re.match(r"(\w+)(?=[: ])", text)
        name = renamed.get(found[1], found[1]) if found else None
        if found is None or name not in names:
            raise
        raise UserError(f"--{name.replace('_', '-')}{text[found.end() :]}") from error
