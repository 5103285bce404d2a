"""All trained networks as one module: sharded training and DDP take exactly one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from sslsr_diffusion.models.condition import Condition

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

    def forward(self, zt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the UNet says about the noisy latent: epsilon, v or the clean one, only the process knows which.

        Args:
            zt: [B, C, h, w] noisy latent.
            t: [B] what the process tells the network of the timestep.
            condition: `z_lr` [B, C, h, w], or [B/k, C, h, w] for a batch that repeats k times (guidance); a base does not see it.
                `text` [1 or B, L, D].

        Returns:
            [B, C, h, w].
        """
        assert condition.text is not None
        context = condition.text.expand(zt.shape[0], -1, -1)
        return self.unet(zt, t, context, return_dict=False, **self._features(condition.z_lr, t))[0]

    def _features(self, z_lr: Tensor | None, t: Tensor) -> dict[str, tuple[Tensor, ...]]:
        if self.structural_encoder is None or z_lr is None:
            return {}
        features = self.structural_encoder(z_lr.to(self.structural_encoder.dtype), t[: len(z_lr)])
        same = self.structural_encoder.dtype == self.unet.dtype
        return {"features": features if same else tuple(each.to(self.unet.dtype) for each in features)}

    def set_trainable(self, which: str) -> list[str]:
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
