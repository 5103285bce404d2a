"""The loss in a LightningModule."""

import lightning
import torch
from torch import Tensor

from sslsr_diffusion import SelfSimilarityLoss


class Upscaler(lightning.LightningModule):
    """Any network from a low-resolution picture to a high-resolution one, under L1 and the self-similarity loss."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network
        self.ssl = SelfSimilarityLoss(l1_weight=100, kl_weight=100, mask_stride=3, prefilter_sigma=1.8)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        lr, hr = batch  # [B, 3, h, w] and [B, 3, H, W] in [0, 1]
        sr = self.network(lr)
        terms = {"l1": torch.nn.functional.l1_loss(sr, hr), "ssl": self.ssl(sr, hr)}
        self.log_dict(terms)
        return terms["l1"] + terms["ssl"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)
