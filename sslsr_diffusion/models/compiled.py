"""Networks by torch.compile, in place: their tensors keep their names, and a copy of them is as it was written."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sslsr_diffusion.errors import UserError

BACKEND: Any = "inductor"
GRAPHS = 64  # of one function: blocks of several widths, with and without gradient; torch stops at 8, and goes on uncompiled


def compile_parts(parts: Mapping[str, Any], device: torch.device, *, field: str, dynamic: bool | None = None) -> None:
    """Let networks be compiled when they are first called, each of its `regions` by itself.

    Args:
        parts: by their names in a saved model; a text encoder, which reads a text or two, stays as it is.
        device: where they will compute.
        field: what a message begins with.
        dynamic: None: the second size of a picture makes a graph for all others; False: each size has its own, whatever was seen before.
    Raises UserError: nothing can be compiled for this device here.
    """
    _try(device, field)
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    for name, part in parts.items():
        if isinstance(part, nn.Module) and not name.startswith("text_encoder"):
            for region in regions(part):
                region.compile(backend=BACKEND, dynamic=dynamic)


def regions(network: nn.Module) -> list[nn.Module]:
    """The blocks that diffusers says repeat, which compile once for all; else an autoencoder's halves, which are called in its place;
    else the network."""
    names = getattr(network, "_repeated_blocks", None) or ()
    repeated = [part for part in network.modules() if type(part).__name__ in names]
    halves = [half for name in ("encoder", "decoder") if isinstance(half := getattr(network, name, None), nn.Module)]
    return repeated or halves or [network]


def eagerly(network: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Around calls in which nothing of a network is compiled. A graph does not notice hooks that were added or removed later."""
    if all(part._compiled_call_impl is None for part in network.modules()):
        return contextlib.nullcontext()  # and torch's compiler, which takes seconds to import, is not needed
    return torch.compiler.set_stance("force_eager")


def _try(device: torch.device, field: str) -> None:
    try:
        torch.compile(_doubled, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:  # of dynamo, of the backend, or of the compiler that it calls
        reason = " ".join(str(error).partition("\n\n")[0].split())[:200].rstrip(".")  # then follows how to debug it
        raise UserError(
            f"{field}: expected a machine on which torch.compile works, got {type(error).__name__} ({reason}); install a C++ compiler, "
            "for a GPU triton as well, or go on without it."
        ) from None


def _doubled(x: Tensor) -> Tensor:
    return 2 * x
