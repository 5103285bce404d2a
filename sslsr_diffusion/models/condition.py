"""What a denoiser is told beside the noisy latent and the timestep."""

from typing import NamedTuple

from torch import Tensor


class Condition(NamedTuple):
    """Tensors that travel with the call; nothing is stored on a module, where gradient checkpointing would find the wrong ones.

    A named tuple, so that DDP, FSDP2 and torch's pytrees see the tensors in it.
    """

    z_lr: Tensor | None = None  # [B, C, h, w] latent of the enlarged low-resolution picture; None: the networks see none
    text: Tensor | None = None  # [1 or B, L, D] text context
