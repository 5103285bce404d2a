"""All trained networks as one module: sharded training and DDP take exactly one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from sslsr_diffusion.models.stablesr.structural_encoder import StructuralEncoder
    from sslsr_diffusion.models.stablesr.unet import SFTUNet2DConditionModel


class Denoiser(nn.Module):
    """Structural encoder and UNet in one forward; both see t. A plain UNet without encoder is a base: it sees no low-resolution picture."""

    def __init__(self, unet: SFTUNet2DConditionModel | UNet2DConditionModel, structural_encoder: StructuralEncoder | None) -> None:
        super().__init__()
        self.unet = unet
        self.structural_encoder = structural_encoder

    def forward(self, zt: Tensor, t: Tensor, z_lr: Tensor | None, text: Tensor) -> Tensor:
        """What the UNet says about the noisy latent: epsilon or v, only the schedule knows which.

        Args:
            zt: [B, C, h, w] noisy latent.
            t: [B] int64.
            z_lr: [B, C, h, w] latent of the upsampled low-resolution picture; None for a base.
            text: [1 or B, L, D] text context.

        Returns:
            [B, C, h, w].
        """
        context = text.expand(zt.shape[0], -1, -1)
        given = {} if self.structural_encoder is None else {"features": self.structural_encoder(z_lr, t)}
        return self.unet(zt, t, context, return_dict=False, **given)[0]

    def set_trainable(self, which: Literal["sft", "all"]) -> list[str]:
        """Choose what trains, by name: "sft" is StableSR's scheme (structural encoder and SPADE layers), "all" everything.

        Returns:
            The names of the trained parameters.
        """
        if which not in ("sft", "all"):
            raise ValueError(f"expected 'sft' or 'all', got {which!r}.")
        trained = []
        for name, parameter in self.named_parameters():
            train = which == "all" or name.startswith("structural_encoder.") or ".spade." in name
            parameter.requires_grad_(train)
            if train:
                trained.append(name)
        return trained

    def enable_gradient_checkpointing(self) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.unet.enable_gradient_checkpointing()
        if self.structural_encoder is not None:
            self.structural_encoder.enable_gradient_checkpointing()
