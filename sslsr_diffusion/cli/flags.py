"""Messages carry the name of a keyword; on the command line it is a flag."""

import contextlib
import re
from collections.abc import Iterator

from sslsr_diffusion.errors import UserError

RENAMED = {"num_inference_steps": "steps", "vae_tile": "tile"}


def flagged(text: str, *names: str) -> str:
    """`model runs/x: no such folder` becomes `--model runs/x: no such folder` where `model` is among the names."""
    found = re.match(r"(\w+)(?=[: ])", text)
    name = RENAMED.get(found[1], found[1]) if found else None
    return text if found is None or name not in names else f"--{name.replace('_', '-')}{text[found.end() :]}"


@contextlib.contextmanager
def as_flags(*names: str) -> Iterator[None]:
    """A UserError that begins with one of these keywords begins with the flag of that name instead."""
    try:
        yield
    except UserError as error:
        text = flagged(str(error), *names)
        if text == str(error):
            raise
        raise UserError(text) from error
