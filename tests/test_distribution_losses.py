"""losses/fdl.py and losses/dists.py with drawn weights: against an independent computation, gradients in float64, files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from test_gan import outputs, part
from test_loss_networks import hub, recipe, verdicts  # noqa: F401 - a fixture
from torch import Tensor
from torch.nn import functional as F
from toys import smooth

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.losses import LOSSES, Means
from sslsr_diffusion.losses.backbones import VGG, reduction
from sslsr_diffusion.losses.dists import DistsLoss, DistsSettings, L2Pooling
from sslsr_diffusion.losses.fdl import FDLLoss, FDLSettings
from sslsr_diffusion.seeding import sample_generator
from sslsr_diffusion.types import Outputs
from sslsr_diffusion.weights import WEIGHTS

WIDTHS = (4, 5, 6, 7, 8)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Weights of thin networks, by torchvision's names, and alpha and beta of DISTS for them."""
    folder, found = tmp_path_factory.mktemp("weights"), {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for kind in ("vgg16", "vgg19"):
            found[kind] = str(folder / f"{kind}.pth")
            torch.save(VGG(WIDTHS, kind).state_dict(), found[kind])
        found["alpha_beta"] = str(folder / "dists.pt")
        channels = 3 + sum(WIDTHS)
        torch.save({name: torch.rand(1, channels, 1, 1) for name in ("alpha", "beta")}, found["alpha_beta"])
    return found


@pytest.fixture
def built(files):
    def build(kind: str, **values):
        own = {"fdl": {"file": files["vgg19"], "projections": 8, "layers": {"relu1_2": 1.0, "conv3_4": 0.5}}}
        own["dists"] = {"file": files["vgg16"], "weights": files["alpha_beta"]}
        return LOSSES[kind].build(LOSSES[kind].settings_class(**{**own[kind], **values}), Means(seed=9))

    return build


def pair() -> tuple[Tensor, Tensor]:
    """Two noisy smooth pictures: noise keeps the spectrum away from 0, where a phase means nothing."""
    noise = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    hr = torch.stack([smooth(1), smooth(2)]) + 0.2 * noise[0]
    return hr, hr + 0.3 * torch.stack([smooth(3), smooth(4)]) + 0.2 * noise[1]


def given(sr: Tensor, hr: Tensor) -> Outputs:
    t = torch.zeros(len(sr), dtype=torch.int64)
    return Outputs(t=t, noise_level=t.float(), sr=sr, hr=hr, decoded=torch.arange(len(sr)))


def frequency_distance(network: VGG, sr: Tensor, hr: Tensor) -> Tensor:
    """FDL of one pair in the precision of its inputs, patch by patch."""
    total = torch.zeros((), dtype=sr.dtype)
    for layer, weight in (("relu1_2", 1.0), ("conv3_4", 0.5)):
        own, true = (torch.fft.fftn(network(side[None], (layer,))[0][0], dim=(-2, -1)) for side in (sr, hr))
        directions = torch.randn(8, len(own), 5, 5, generator=sample_generator(9, "fdl", layer)).to(sr)
        directions = directions / directions.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
        for factor, read in ((1.0, torch.abs), (0.25, lambda z: torch.atan2(z.imag, z.real))):
            ranks = []
            for side in (own, true):
                patches = read(side).unfold(-2, 5, 1).unfold(-2, 5, 1)  # [C, h-4, w-4, 5, 5]
                ranks.append(torch.einsum("chwij,dcij->dhw", patches, directions).flatten(1).sort(dim=1).values)
            total = total + weight * factor * (ranks[0] - ranks[1]).abs().mean()
    return total


def test_fdl_is_the_sliced_distance_of_amplitudes_and_phases(built):
    loss, (hr, sr) = built("fdl", weight=2.0, phase_weight=0.25), pair()
    sr.requires_grad_()
    value, terms = loss(given(sr, hr))
    value.backward()
    double = sr.detach().double().requires_grad_()
    want = sum(frequency_distance(loss.network.double(), a, b) for a, b in zip(double, hr.double())) / 2
    want.backward()
    assert terms["fdl"].item() == pytest.approx(want.item(), rel=1e-4)
    assert (sr.grad - 2 * double.grad).norm() <= 0.02 * 2 * double.grad.norm()  # ranks that swap and phases near 0 amplify rounding
    assert all(parameter.grad is None for parameter in loss.network.parameters())


def structure_and_texture(network: VGG, alpha: np.ndarray, beta: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """DISTS of one pair [3, H, W] by numpy, its poolings window by window."""

    def features(picture: np.ndarray) -> list[np.ndarray]:
        found, h = [picture], (picture - [[[0.485]], [[0.456]], [[0.406]]]) / [[[0.229]], [[0.224]], [[0.225]]]
        for k, module in enumerate(network.features):
            if isinstance(module, torch.nn.Conv2d):
                weights = (module.weight.double(), module.bias.double())
                h = F.conv2d(torch.from_numpy(h)[None], *weights, padding=1)[0].detach().numpy()
            elif isinstance(module, torch.nn.ReLU):
                h = h.clip(0)
                if k in (3, 8, 15, 22, 29):
                    found.append(h)
            elif k < 30:
                padded, window = np.pad(h**2, ((0, 0), (1, 1), (1, 1))), np.outer([1, 2, 1], [1, 2, 1]) / 16
                rows, columns = range(0, h.shape[1], 2), range(0, h.shape[2], 2)
                h = np.sqrt([[[(c[r : r + 3, q : q + 3] * window).sum() + 1e-12 for q in columns] for r in rows] for c in padded])
        return found

    place, total = 0, 0.0
    for f, g in zip(features(x), features(y)):
        for a, b in zip(f, g):
            luminance = (2 * a.mean() * b.mean() + 1e-6) / (a.mean() ** 2 + b.mean() ** 2 + 1e-6)
            structure = (2 * ((a - a.mean()) * (b - b.mean())).mean() + 1e-6) / (a.var() + b.var() + 1e-6)
            total += alpha[place] * luminance + beta[place] * structure
            place += 1
    return 1 - total / (alpha.sum() + beta.sum())


def test_dists_is_structure_and_texture(built):
    loss, (hr, sr) = built("dists", weight=2.0), pair()
    value, terms = loss(given(sr, hr))
    alpha, beta = (loss.network.get_buffer(name).double().flatten().numpy() for name in ("alpha", "beta"))
    pairs = zip(sr.double().numpy(), hr.double().numpy())
    want = np.mean([structure_and_texture(loss.network.vgg, alpha, beta, a, b) for a, b in pairs])
    assert terms["dists"].item() == pytest.approx(want, rel=1e-4)
    assert value.item() == pytest.approx(2 * want, rel=1e-4)
    assert loss(given(hr, hr))[0].item() == pytest.approx(0, abs=1e-5)


def test_gradients_of_dists_in_float64(built):
    loss, (hr, sr) = built("dists"), pair()
    sr.requires_grad_()
    loss(given(sr, hr))[0].backward()
    double = sr.detach().double().requires_grad_()
    loss.network.double()(double, hr.double()).mean().backward()
    assert (sr.grad - double.grad).norm() <= 1e-3 * double.grad.norm()
    x = torch.rand(1, 2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(L2Pooling(), x)


@pytest.mark.parametrize("kind", ["fdl", "dists"])
def test_micro_batches_add_up_and_gates_leave_samples_out(kind, built):
    loss, three, total = built(kind, weight=3.0), outputs(), torch.tensor(3.0)
    value, terms = loss(three)
    assert value.item() == pytest.approx(3 * terms[kind].item(), rel=1e-6)
    split = sum(loss(part(three, *places), total)[0].item() for places in ((0, 2), (1,)))
    assert split == pytest.approx(value.item(), rel=1e-5)
    gated = built(kind, weight=3.0, max_timestep=100)
    assert gated(three)[0].item() == pytest.approx(loss(part(three, 0))[0].item(), rel=1e-5)


def test_fdl_draws_from_the_seed_and_the_name(built):
    loss = built("fdl")
    again, other = built("fdl"), built("fdl", name="other")
    sr, hr = pair()
    values = [found(given(sr, hr))[0].item() for found in (loss, again, other)]
    assert values[0] == values[1] != values[2]


def test_files_are_read_and_refused_by_one_sentence(files, hub, monkeypatch):  # noqa: F811
    settings = {"kind": "dists", "file": files["vgg16"], "weights": files["alpha_beta"]}
    ((verdict, detail),) = verdicts(recipe(settings))
    assert verdict == "ok"
    assert files["alpha_beta"] in detail
    for lacking, said in (
        ("file", "dists: VGG16's weights are missing and no download was tried (offline); download"),
        ("weights", "dists.weights: DISTS's weights are missing and no download was tried (offline); download"),
    ):
        ((verdict, detail),) = verdicts(recipe({**settings, lacking: None}))
        assert (verdict, detail.startswith(said)) == ("missing", True), detail
        with pytest.raises(UserError, match="losses: dists"):
            DistsLoss.build(DistsSettings(**{**settings, lacking: None}), Means())
    torch.save({"alpha": torch.zeros(1, 1475, 1, 1)}, hub / "odd.pt")
    with pytest.raises(
        UserError, match=r"losses: dists\.weights: expected alpha of shape \[1, 33, 1, 1\] in .*, got \[1, 1475, 1, 1\]; give"
    ):
        DistsLoss.build(DistsSettings(**{**settings, "weights": str(hub / "odd.pt")}), Means())
    with pytest.raises(UserError, match=r"losses: dists: .*vgg19\.pth does not hold VGG16, by torchvision's names"):
        DistsLoss.build(DistsSettings(**{**settings, "file": files["vgg19"]}), Means())
    monkeypatch.setitem(WEIGHTS, "dists", tuple(dataclasses.replace(file, sha256="") for file in WEIGHTS["dists"]))
    for file, name in zip(WEIGHTS["dists"], ("vgg16", "alpha_beta")):  # where pyiqa has them
        file.path.parent.mkdir(parents=True, exist_ok=True)
        file.path.write_bytes(Path(files[name]).read_bytes())
    found, named = DistsLoss.build(DistsSettings(), Means()), DistsLoss.build(DistsSettings(**settings), Means())
    assert all(torch.equal(value, named.network.state_dict()[name]) for name, value in found.network.state_dict().items())


def test_how_far_layers_see():
    assert [reduction("vgg19", layer) for layer in ("conv1_1", "relu3_4", "conv5_4")] == [1, 4, 16]
    assert [reduction("efficientnet_lite1", f"block{k}") for k in (0, 3, 6, 7, 14, 20)] == [2, 4, 8, 16, 16, 32]
    said = [("layers", "relu5_4 needs pictures of at least 80 pixels a side, these have 64.")]
    assert list(FDLSettings().misfits(side=64, alone=False)) == said
    assert list(FDLSettings(backbone="efficientnet_lite2", layers={"block6": 1}).misfits(side=40, alone=False)) == []
    assert list(DistsSettings().misfits(side=8, alone=False)) == [
        ("kind", "dists needs pictures of at least 16 pixels a side, these have 8.")
    ]
    with torch.device("meta"):
        assert (
            FDLLoss.build(FDLSettings(), Means(shapes=True)).play(given(torch.zeros(1, 3, 96, 96), torch.zeros(1, 3, 96, 96))).shape == ()
        )
