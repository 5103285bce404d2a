"""All trained networks as one module: sharded training and DDP take exactly one."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from sslsr_diffusion.models.condition import Condition

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from sslsr_diffusion.models.stablesr.structural_encoder import StructuralEncoder
    from sslsr_diffusion.models.stablesr.unet import SFTUNet2DConditionModel


class Denoiser(nn.Module):
    """Structural encoder and UNet in one forward; both see t. A plain UNet without encoder is a base: it sees no low-resolution picture."""

    def __init__(self, unet: "SFTUNet2DConditionModel | UNet2DConditionModel", structural_encoder: "StructuralEncoder | None") -> None:
        super().__init__()
        self.unet = unet
        self.structural_encoder = structural_encoder

    def forward(self, zt: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the UNet says about the noisy latent, [B, C, h, w]: epsilon, v or the clean one, only the process knows which.

        Args:
            zt: [B, C, h, w] noisy latent.
            t: [B] what the process tells the network of the timestep.
            condition: `z_lr` [B, C, h, w], or [B/k, C, h, w] for a batch that repeats k times (guidance); a base does not see it.
                `text`: a sequence of [1 or B, L, D].
        """
        assert condition.text is not None
        context, z_lr, encoder = condition.text.repeated(len(zt)).sequence, condition.z_lr, self.structural_encoder
        if encoder is None or z_lr is None:
            return self.unet(zt, t, context, return_dict=False)[0]
        features = tuple(each.to(self.unet.dtype) for each in encoder(z_lr.to(encoder.dtype), t[: len(z_lr)]))
        return self.unet(zt, t, context, features=features, return_dict=False)[0]

    def set_trainable(self, which: str) -> list[str]:
        """Choose what trains and name it: "sft" is StableSR's scheme (structural encoder and SPADE layers), "all" everything."""
        if which not in ("sft", "all"):
            raise ValueError(f"expected 'sft' or 'all', got {which!r}.")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(which == "all" or name.startswith("structural_encoder.") or ".spade." in name)
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]
