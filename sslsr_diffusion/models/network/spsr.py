"""SPSRNet, a picture and a gradient branch that help each other (Ma et al., CVPR 2020)."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslsr_diffusion.models.network.architecture import Architecture, Tensors, at_least, conv3, count
from sslsr_diffusion.models.network.rrdb import RRDB

_TAPS = (5, 10, 15, 20)  # after which blocks of the trunk the branch listens, counted from 1
_SLOPE = 0.2


class GradientMap(nn.Module):
    """M(x) = sqrt((x[y+1] - x[y-1])^2 + (x[x+1] - x[x-1])^2 + 1e-6), per channel, zeros outside."""

    def __init__(self) -> None:
        super().__init__()
        difference = torch.tensor([-1.0, 0.0, 1.0])
        self.register_buffer("weight_h", F.pad(difference.view(1, 1, 1, 3), (0, 0, 1, 1)))
        self.register_buffer("weight_v", F.pad(difference.view(1, 1, 3, 1), (1, 1, 0, 0)))

    weight_h: Tensor
    weight_v: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> the same shape"""
        channels = x.flatten(0, 1)[:, None]
        across, down = (F.conv2d(channels, kernel.to(x), padding=1) for kernel in (self.weight_h, self.weight_v))
        return torch.sqrt(across.square() + down.square() + 1e-6).view_as(x)


def _rrdb(features: int, growth: int) -> RRDB:
    return RRDB(features, growth, nested=True)


def _conv(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(conv3(inside, outside))


class SPSRNet(Architecture):
    """Four times larger, with the gradient map of the larger picture beside it. Tensor names are the published ones.

    The trunk is RRDBNet's. The branch begins with M(x), takes the trunk's features after blocks 5, 10, 15 and 20 in, and is enlarged
    on its own; its features are fused with the trunk's for the picture. Nothing is detached between the two.
    """

    has_branch: ClassVar[bool] = True

    def __init__(self, in_nc: int = 3, out_nc: int = 3, nf: int = 64, nb: int = 23, gc: int = 32) -> None:
        at_least(1, in_nc=in_nc, out_nc=out_nc, nf=nf, gc=gc)
        at_least(_TAPS[-1], nb=nb)
        super().__init__(in_nc=in_nc, out_nc=out_nc, nf=nf, nb=nb, gc=gc)
        self.scale = 4
        trunk = nn.ModuleList([*(_rrdb(nf, gc) for _ in range(nb)), conv3(nf, nf)])
        last = conv3(nf, nf)
        ups = {str(i): conv3(nf, nf) for i in (3, 6)}
        self.model = nn.ModuleDict({"0": conv3(in_nc, nf), "1": nn.ModuleDict({"sub": trunk}), **ups, "8": last})
        self.HR_conv0_new = nn.Sequential(last)  # one layer under two names, as published
        self.HR_conv1_new = _conv(nf, nf)
        self.get_g_nopadding = GradientMap()
        self.b_fea_conv = _conv(in_nc, nf)
        for k in range(1, 1 + len(_TAPS)):
            self.add_module(f"b_concat_{k}", _conv(2 * nf, nf))
            self.add_module(f"b_block_{k}", _rrdb(2 * nf, gc))
        self.b_LR_conv = _conv(nf, nf)
        self.b_module = nn.ModuleDict({str(i): conv3(nf, nf) for i in (1, 4, 6, 8)})
        self.conv_w = nn.Sequential(nn.Conv2d(nf, out_nc, 1))
        self.f_concat, self.f_block = _conv(2 * nf, nf), _rrdb(2 * nf, gc)
        self.f_HR_conv0, self.f_HR_conv1 = _conv(nf, nf), _conv(nf, out_nc)

    def forward(self, lr: Tensor, *, branch: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[B, 3, h, w] -> [B, 3, 4 h, 4 w]; with `branch` also the branch's idea of that picture's gradient map, of the same shape."""
        picture, features = self._both(lr)
        if branch:
            return picture, self.conv_w(features)
        if self.training and torch.is_grad_enabled():  # DDP waits for a gradient of every parameter
            picture = picture + 0 * self.conv_w(features).mean()
        return picture

    def _both(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        """The picture, and the last features of the branch."""
        first = made = self.model["0"](lr)
        *blocks, after = self.model["1"]["sub"]  # type: ignore[index]  # a ModuleDict in a ModuleDict
        taps = []
        for i, block in enumerate(blocks, 1):
            made = self.step(block, made)
            taps += [made] if i in _TAPS else []
        features = _larger(first + after(made), self.model["3"], self.model["6"], self.model["8"])
        features = self.HR_conv1_new(features)
        start = branch = self.b_fea_conv(self.get_g_nopadding(lr))
        for k, tap in enumerate(taps, 1):
            mixed = self.step(self.get_submodule(f"b_block_{k}"), torch.cat([branch, tap], dim=1))
            branch = self.get_submodule(f"b_concat_{k}")(mixed)
        branch = _larger(self.b_LR_conv(branch) + start, *(self.b_module[i] for i in ("1", "4", "6")))
        branch = self.b_module["8"](branch)
        fused = self.f_concat(self.step(self.f_block, torch.cat([branch, features], dim=1)))
        return self.f_HR_conv1(F.leaky_relu(self.f_HR_conv0(fused), _SLOPE)), branch

    @classmethod
    def renamed(cls, tensors: Tensors) -> Tensors:
        """A file that keeps the shared layer once has it twice then."""
        first, second = "model.8.", "HR_conv0_new.0."
        shared = {name: tensor for name, tensor in tensors.items() if name.startswith((first, second))}
        others = {(second + n.removeprefix(first) if n.startswith(first) else first + n.removeprefix(second)): t for n, t in shared.items()}
        return {**others, **tensors}

    @classmethod
    def arguments_of(cls, tensors: Tensors) -> dict[str, Any] | None:
        if not {"b_block_1.RDB1.conv1.0.weight", "f_block.RDB1.conv1.0.weight"} <= {*tensors}:
            return None
        features, inside = tensors["model.0.weight"].shape[:2]
        growth = tensors["model.1.sub.0.RDB1.conv1.0.weight"].shape[0]
        channels = {"in_nc": inside, "out_nc": tensors["f_HR_conv1.0.weight"].shape[0]}
        return {**channels, "nf": features, "nb": count(tensors, "model.1.sub.") - 1, "gc": growth}


def _larger(features: Tensor, *convs: nn.Module) -> Tensor:
    """Two steps up, and the convolution after them; lrelu after each."""
    first, second, third = convs
    for conv in (first, second):
        features = F.leaky_relu(conv(F.interpolate(features, scale_factor=2, mode="nearest")), _SLOPE)
    return F.leaky_relu(third(features), _SLOPE)
