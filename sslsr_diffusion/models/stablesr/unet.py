"""Stable Diffusion's UNet with one SPADE layer per residual block, fed by the structural encoder's features."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.models.stablesr.extend import extends_signature


class Conditioning(NamedTuple):
    """What every residual block receives in the place of the time embedding.

    The features travel with the call instead of being stored on the modules: under gradient checkpointing a block runs
    again in the backward pass, when a later forward would have replaced a stored value.
    """

    temb: Tensor  # [B, D]
    features: Sequence[Tensor]  # per level, finest first: [B or B/k, C, h_level, w_level]


class SPADE(nn.Module):
    """n (1 + gamma(f)) + beta(f) with n = GroupNorm(h): the feature map modulates the residual branch pixel by pixel.

    The GroupNorm is affine and trained, and nothing starts at zero, as in StableSR.
    """

    def __init__(self, channels: int, feature_channels: int, hidden_channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-5)
        self.shared = nn.Conv2d(feature_channels, hidden_channels, 3, padding=1)
        self.gamma = nn.Conv2d(hidden_channels, channels, 3, padding=1)
        self.beta = nn.Conv2d(hidden_channels, channels, 3, padding=1)

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        """h [B, C, H, W]; features [B, F, H, W], or [B/k, F, H, W] for a batch that repeats k times (guidance)."""
        if features.shape[-2:] != h.shape[-2:] or h.shape[0] % features.shape[0]:
            raise ValueError(
                f"expected features of size {tuple(h.shape[-2:])} for {h.shape[0]} samples, got {tuple(features.shape[-2:])} for "
                f"{features.shape[0]}: they must come from a latent of the denoised latent's size."
            )
        a = F.relu(self.shared(features))
        gamma, beta = self.gamma(a), self.beta(a)
        repeats = h.shape[0] // features.shape[0]
        if repeats > 1:
            gamma, beta = gamma.repeat(repeats, 1, 1, 1), beta.repeat(repeats, 1, 1, 1)
        return self.norm(h) * (1 + gamma) + beta


class SFTResnetBlock2D(ResnetBlock2D):
    """diffusers' residual block, its branch modulated last; the skip is not."""

    def __init__(self, plain: ResnetBlock2D, level: int, feature_channels: int, hidden_channels: int) -> None:
        with torch.device("meta"):  # attributes only; the layers are taken over from `plain`
            super().__init__(
                in_channels=plain.in_channels,
                out_channels=plain.out_channels,
                temb_channels=plain.time_emb_proj.in_features,
                groups=plain.norm1.num_groups,
                eps=plain.norm1.eps,
                output_scale_factor=plain.output_scale_factor,
            )
        for name, child in plain.named_children():
            setattr(self, name, child)
        self.level = level
        self.spade = SPADE(plain.out_channels, feature_channels, hidden_channels, plain.norm2.num_groups)

    def forward(self, input_tensor: Tensor, temb: Conditioning) -> Tensor:
        emb, features = temb
        h = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        h = h + self.time_emb_proj(self.nonlinearity(emb))[:, :, None, None]
        h = self.conv2(self.dropout(self.nonlinearity(self.norm2(h))))
        h = self.spade(h, features[self.level])
        skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor.contiguous())
        return (skip + h) / self.output_scale_factor


class ConditioningEmbedding(TimestepEmbedding):
    """The time embedding, tied together with the features: UNet2DConditionModel hands both to every residual block."""

    def forward(self, sample: Tensor, condition: Sequence[Tensor] | None = None) -> Conditioning:
        if condition is None:
            raise ValueError("expected features=StructuralEncoder(latents, t), got none: this UNet does not run without them.")
        return Conditioning(super().forward(sample), condition)


class SFTUNet2DConditionModel(UNet2DConditionModel):
    """UNet2DConditionModel whose residual blocks are modulated by a structural encoder's features.

    Attention processors, gradient checkpointing, LoRA, quantization and offload hooks are diffusers' own.
    """

    __module__ = "sslsr_diffusion.models"  # what model_index.json stores
    _no_split_modules: ClassVar = [*UNet2DConditionModel._no_split_modules, "SFTResnetBlock2D"]

    @register_to_config
    @extends_signature(UNet2DConditionModel)
    def __init__(self, feature_channels: int = 256, spade_hidden_channels: int = 128, **unet: Any) -> None:
        super().__init__(**unet)
        _check_supported(self.config)
        embedding: TimestepEmbedding = self.time_embedding  # type: ignore[has-type]
        with torch.device("meta"):
            self.time_embedding = ConditioningEmbedding(embedding.linear_1.in_features, embedding.linear_1.out_features)
        for name, child in embedding.named_children():
            setattr(self.time_embedding, name, child)
        last = len(self.down_blocks) - 1
        up = [(last - position, block) for position, block in enumerate(self.up_blocks)]
        for level, block in (*enumerate(self.down_blocks), (last, self.mid_block), *up):
            block.resnets = nn.ModuleList(
                SFTResnetBlock2D(resnet, level, feature_channels, spade_hidden_channels) for resnet in block.resnets
            )

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, feature_channels: int = 256, spade_hidden_channels: int = 128) -> Self:
        """A UNet that takes over the tensors of a plain Stable Diffusion one; the SPADE layers are new."""
        config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
        with torch.device("meta"):
            model = cls(**config, feature_channels=feature_channels, spade_hidden_channels=spade_hidden_channels)
        model.load_state_dict(unet.state_dict(), strict=False, assign=True)
        for module in model.modules():
            if isinstance(module, SPADE):
                module.to_empty(device=unet.device)
                for layer in module.children():
                    layer.reset_parameters()  # type: ignore[operator]
                module.to(dtype=unet.dtype)
        return model

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        features: Sequence[Tensor] | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor, ...]:
        """Predict from a noisy latent, the text and the low-resolution picture's features.

        Args:
            sample: [B, C, h, w]; any sizes.
            timestep: [B] or a number, 0..999.
            encoder_hidden_states: [B, L, D] text context.
            features: StructuralEncoder's output for B samples, or for B/k when the batch repeats k times (guidance).
            kwargs: UNet2DConditionModel's other arguments.
        """
        if features is not None and len(features) != len(self.down_blocks):
            raise ValueError(f"expected {len(self.down_blocks)} feature maps, one per level, got {len(features)}.")
        conditions = None if features is None else tuple(features)
        return super().forward(sample, timestep, encoder_hidden_states, timestep_cond=conditions, return_dict=return_dict, **kwargs)


def _check_supported(config: Any) -> None:
    """The residual blocks and the embedding path must be Stable Diffusion's."""
    wanted = {
        "resnet_time_scale_shift": "default",
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "class_embed_type": None,
        "addition_embed_type": None,
        "resnet_skip_time_act": False,
        "act_fn": "silu",
        "mid_block_type": "UNetMidBlock2DCrossAttn",
    }
    for name, value in wanted.items():
        if config[name] != value:
            raise ValueError(f"expected a UNet of the Stable Diffusion 2 family ({name}={value!r}), got {name}={config[name]!r}.")
