"""Where networks live while they are called: on their device, or wherever a diffusers pipeline's hooks take them."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from sslsr_diffusion.inference.memory import Offload


class Host:
    """Networks that stay on their device, and no bar for the steps."""

    def __init__(self, networks: Any) -> None:
        self._networks = networks

    @property
    def device(self) -> torch.device:
        return self._networks.device

    def offload(self) -> Offload:
        return "none"

    def release(self) -> None:
        """Send networks that wait on the CPU back there."""

    def progress(self, total: int) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


class PipelineHost(Host):
    """diffusers' hooks move the networks of a pipeline, its progress bar shows the steps."""

    @property
    def device(self) -> torch.device:
        return self._networks._execution_device

    def offload(self) -> Offload:
        if getattr(self._networks, "_all_hooks", None):
            return "model"
        parts = (part for part in self._networks.components.values() if isinstance(part, torch.nn.Module))
        return "sequential" if any(hasattr(part, "_hf_hook") for part in parts) else "none"

    def release(self) -> None:
        self._networks.maybe_free_model_hooks()

    def progress(self, total: int) -> contextlib.AbstractContextManager[Any]:
        return self._networks.progress_bar(total=total)


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
