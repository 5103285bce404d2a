"""A registered loss for BasicSR, neosr and traiNNer-redux. Copy this file into their folder `losses`; docs/integrations.md goes on."""

from typing import Any

from basicsr.utils.registry import LOSS_REGISTRY  # neosr: neosr.utils.registry; traiNNer-redux: traiNNer.utils.registry
from torch import Tensor

from sslsr_diffusion import SelfSimilarityLoss

BEGIN = {"l1_weight": 100, "kl_weight": 100, "mask_stride": 3, "prefilter_sigma": 1.8}


@LOSS_REGISTRY.register()
class SSLLoss(SelfSimilarityLoss):
    """`loss_weight`: factor of the whole; `options`: any argument of SelfSimilarityLoss."""

    def __init__(self, loss_weight: float = 1.0, **options: Any) -> None:
        super().__init__(**{**BEGIN, **options})
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor, weight: None = None, **_: Any) -> Tensor:  # both [B, 3, H, W] in [0, 1]
        return self.loss_weight * super().forward(pred, target)
