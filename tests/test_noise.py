"""Noise fields: mean, variance, correlation, and the Poisson tables against the exact distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sslsr_diffusion.data.noise import _draw_poisson, correlated_noise, gaussian_noise, poisson_noise


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rate", [1.0, 16.0, 256.0])
def test_poisson_tables_have_the_exact_distribution(rate):
    from scipy.stats import chisquare, poisson

    for level in (1, 40, 255):
        mean = level / 255 * rate
        counts = _draw_poisson(np.full(200_000, level, dtype=np.uint8), rate, _generator(level)).numpy()
        edges = np.unique(poisson.ppf(np.linspace(0.02, 0.98, 15), mean))
        bins = [-1, *edges, 10_000]
        wanted = np.diff(poisson.cdf(bins, mean)) * len(counts)
        seen, _ = np.histogram(counts, [b + 0.5 for b in bins])
        assert chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-4  # draws are seeded
    assert not _draw_poisson(np.zeros(1000, dtype=np.uint8), rate, _generator()).any()


def test_gaussian_noise():
    image = torch.full((1, 3, 200, 200), 0.5)
    colour, gray = gaussian_noise(image, _generator(), 0.05), gaussian_noise(image, _generator(), 0.05, gray=True)
    assert (colour - 0.5).std().item() == pytest.approx(0.05, rel=0.02)  # 120,000 draws: 0.2 %
    assert torch.equal(gray[:, 0], gray[:, 2])
    assert not torch.equal(colour[:, 0], colour[:, 2])


def test_poisson_noise_has_the_variance_of_its_formula():
    image = torch.linspace(0.2, 0.8, 256).round(decimals=4).repeat(1, 3, 400, 1)
    levels = len((image * 255).round().unique())
    rate = 2 ** np.ceil(np.log2(levels))
    noise = poisson_noise(image, _generator(), 0.5) - image
    wanted = 0.25 * (image * 255).round() / 255 / rate
    assert (noise.var(dim=2).mean() / wanted.mean()).item() == pytest.approx(1, rel=0.03)
    assert noise.mean().abs() < 1e-3
    gray = poisson_noise(image, _generator(), 0.5, gray=True) - image
    assert torch.allclose(gray[:, 0], gray[:, 1], atol=1e-6)


def test_correlated_noise_has_correlated_channels():
    image = torch.full((1, 3, 300, 300), 0.5)
    noise = (correlated_noise(image, _generator(), 10 / 255, seed=3) - 0.5).reshape(3, -1)
    covariance = torch.cov(noise)
    assert covariance.diagonal().max() <= (10 / 255) ** 2 * 1.05
    assert covariance.fill_diagonal_(0).abs().max() > 1e-6


def test_a_batch_has_independent_fields_and_a_seed_repeats():
    image = torch.full((2, 3, 20, 20), 0.5)
    for add in (lambda g: gaussian_noise(image, g, 0.1), lambda g: poisson_noise(image, g, 1.0)):
        noisy = add(_generator())
        assert not torch.equal(noisy[0], noisy[1])
        assert torch.equal(noisy, add(_generator()))
