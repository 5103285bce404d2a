"""The small upscalers' own autoencoder: untrained it shows the picture, its latents are a point, others read what it writes."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sslsr_diffusion.models import ShuffleAutoencoder
from sslsr_diffusion.models.codec import Codec


def smooth(*shape: int, seed: int = 0) -> torch.Tensor:
    noise = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, scale_factor=8, mode="bicubic").clamp(0, 1)


def small(**config: object) -> ShuffleAutoencoder:
    torch.manual_seed(0)
    return ShuffleAutoencoder(
        **{"latent_channels": 8, "block_out_channels": (8, 12, 16), "encoder_layers": 1, "decoder_layers": 2, **config}
    )


def test_untrained_it_shows_the_picture_at_latent_resolution() -> None:
    codec, picture = Codec(small()), smooth(1, 3, 6, 8)
    latents = codec.encode(picture, torch.zeros(codec.noise_shape(picture)))
    assert latents.shape == (1, 8, 12, 16)
    torch.testing.assert_close(latents[:, :3], F.avg_pool2d(picture, 4) * 2 - 1)
    shown = codec.decode(latents)
    assert shown.shape == picture.shape
    assert (shown - picture).abs().mean() < 0.02 < (picture - picture.mean()).abs().mean() / 4


def test_nothing_is_drawn_and_flat_colours_stay() -> None:
    codec, picture = Codec(small()), torch.tensor([0.2, 0.5, 0.9]).reshape(1, 3, 1, 1).expand(1, 3, 16, 16)
    shape = codec.noise_shape(picture)
    first, second = (codec.encode(picture, torch.randn(shape, generator=torch.Generator().manual_seed(seed))) for seed in (1, 2))
    assert torch.equal(first, second)
    torch.testing.assert_close(codec.decode(first), picture, atol=1e-6, rtol=0)


def test_what_is_drawn_has_no_raster() -> None:
    """Away from the border a decoder drawn at random makes a flat picture of flat latents, though each pixel has its own weights."""
    vae = small()
    torch.nn.init.normal_(vae.decoder[-1].weight)
    drawn = vae.decode(torch.ones(1, 8, 16, 16), return_dict=False)[0][..., 24:-24, 24:-24]
    assert drawn.std(dim=(2, 3)).max() < 1e-5
    with torch.no_grad():
        next(layer for layer in vae.decoder if isinstance(layer, torch.nn.Conv2d) and layer.out_channels == 48).weight[0] += 1
    assert vae.decode(torch.ones(1, 8, 16, 16), return_dict=False)[0][..., 24:-24, 24:-24].std(dim=(2, 3)).max() > 1e-3


def test_every_weight_learns_after_the_first_step() -> None:
    vae = small()
    optimizer = torch.optim.SGD(vae.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (vae(smooth(2, 3, 4, 4) * 2 - 1) - smooth(2, 3, 4, 4, seed=1)).abs().mean().backward()
        optimizer.step()
    without = [name for name, value in vae.named_parameters() if value.grad is None or not value.grad.abs().sum()]
    assert not without


def test_it_is_written_and_read(tmp_path: Path) -> None:
    vae = small(scaling_factor=0.5)
    vae.save_pretrained(tmp_path)
    again = ShuffleAutoencoder.from_pretrained(tmp_path)
    pixels = smooth(1, 3, 4, 4) * 2 - 1
    assert torch.equal(vae(pixels), again(pixels))
    assert Codec(again).scale == 4
    assert again.config.scaling_factor == 0.5


@pytest.mark.parametrize("config", [{"latent_channels": 3}, {"block_out_channels": (16,)}])
def test_too_few_channels_or_levels_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected more than 3 latent_channels and at least 2 block_out_channels, got"):
        small(**config)
