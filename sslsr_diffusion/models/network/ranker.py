"""The ranker of RankSRGAN (Zhang et al., ICCV 2019, section 3): a network that learned to order pictures by a perceptual measure."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.models.network.architecture import at_least, conv3
from sslsr_diffusion.models.network.files import read_tensors

_SLOPE = 0.2
_WIDTHS = (1, 2, 4, 8, 8)  # of the levels, in multiples of nf


class Ranker(nn.Module):
    """Ranker_VGG12_296: per level lrelu(bn(conv 3 / 1)), lrelu(bn(conv 4 / 2)), the first without norm; mean over the map; two layers.

    Less is better. Names and layers are the published ones.
    """

    def __init__(self, in_nc: int = 3, nf: int = 64) -> None:
        at_least(1, in_nc=in_nc, nf=nf)
        super().__init__()
        inside = in_nc
        for k, times in enumerate(_WIDTHS):
            width = nf * times
            self.add_module(f"conv{k}_0", conv3(inside, width))
            self.add_module(f"conv{k}_1", nn.Conv2d(width, width, 4, stride=2, padding=1))
            if k > 0:
                self.add_module(f"bn{k}_0", nn.BatchNorm2d(width))
            self.add_module(f"bn{k}_1", nn.BatchNorm2d(width))
            inside = width
        self.classifier = nn.ModuleDict({"0": nn.Linear(inside, 100), "2": nn.Linear(100, 1)})

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1], both sides at least 32 -> [B, 1] scores"""
        if min(pictures.shape[-2:]) < 32:
            raise UserError(f"the ranker needs pictures of at least 32 pixels, got {tuple(pictures.shape[-2:])}; raise the crop size.")
        features = pictures
        for k in range(len(_WIDTHS)):
            for half in (0, 1):
                features = self.get_submodule(f"conv{k}_{half}")(features)
                if (k, half) != (0, 0):
                    features = self.get_submodule(f"bn{k}_{half}")(features)
                features = F.leaky_relu(features, _SLOPE)
        hidden = F.leaky_relu(self.classifier["0"](features.mean(dim=(-2, -1))), _SLOPE)
        return self.classifier["2"](hidden)


def load_ranker(path: Path | str, *, meta: bool = False) -> Ranker:
    """The ranker in a file of RankSRGAN's release (`Ranker_VGG12_296`), in evaluation mode, frozen; with `meta` its shapes alone.
    Raises UserError: the file cannot be read, or holds another network.
    """
    tensors = read_tensors(Path(path)).tensors
    wrong = f"ranker {path}: expected a Ranker_VGG12_296 (conv0_0 to conv4_1, bn0_1 to bn4_1, classifier.0 and .2), "
    if "conv0_0.weight" not in tensors or "classifier.0.weight" not in tensors:
        raise UserError(f"{wrong}got {', '.join(sorted(tensors)[:3])}, ...; give RankSRGAN's file.")
    nf, in_nc = tensors["conv0_0.weight"].shape[:2]
    with torch.device("meta"):
        ranker = Ranker(in_nc, nf)
    needed = {name: tensor for name, tensor in ranker.state_dict().items() if not name.endswith("num_batches_tracked")}
    odd = [name for name, tensor in needed.items() if name not in tensors or tensors[name].shape != tensor.shape]
    odd += [name for name in tensors if name not in ranker.state_dict()]
    if odd:
        raise UserError(f"{wrong}got a file whose {odd[0]} is missing, unknown or misshaped; give RankSRGAN's file.")
    if not meta:
        ranker = ranker.to_empty(device="cpu")
        ranker.load_state_dict({name: tensors.get(name, torch.zeros((), dtype=torch.long)) for name in ranker.state_dict()})
    return ranker.eval().requires_grad_(False)
