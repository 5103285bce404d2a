"""Where networks live while they are called: on their device, or wherever a diffusers pipeline's hooks take them."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from sslsr_diffusion.inference.memory import Offload
from sslsr_diffusion.models.networks import LatentNetworks


class Host(Protocol):
    """Who moves the networks and shows the steps."""

    @property
    def device(self) -> torch.device: ...
    def offload(self) -> Offload: ...
    def release(self) -> None:
        """Send networks that wait on the CPU back there."""

    def progress(self, total: int) -> contextlib.AbstractContextManager[Any]: ...


class Resident:
    """Networks that stay on their device."""

    def __init__(self, networks: LatentNetworks) -> None:
        self._networks = networks

    @property
    def device(self) -> torch.device:
        return self._networks.device

    def offload(self) -> Offload:
        return "none"

    def release(self) -> None:
        pass

    def progress(self, total: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class PipelineHost:
    """diffusers' hooks move the networks, its progress bar shows the steps."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    @property
    def device(self) -> torch.device:
        return self._pipe._execution_device

    def offload(self) -> Offload:
        if getattr(self._pipe, "_all_hooks", None):
            return "model"
        parts = (part for part in self._pipe.components.values() if isinstance(part, torch.nn.Module))
        return "sequential" if any(hasattr(part, "_hf_hook") for part in parts) else "none"

    def release(self) -> None:
        self._pipe.maybe_free_model_hooks()

    def progress(self, total: int) -> contextlib.AbstractContextManager[Any]:
        return self._pipe.progress_bar(total=total)


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """No bar for a pipeline's components, and no advice to load in half precision by an argument that its versions name differently."""
    from diffusers.utils import logging

    level, bar = logging.get_verbosity(), getattr(logging, "is_progress_bar_enabled", lambda: True)()  # newer than 0.35
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype")  # its new name is unknown to the oldest diffusers we allow
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
