"""Presets: every drawn number has the published range and probability; the pipeline is repeatable and never breaks."""

from __future__ import annotations

import collections
import math

import pytest
import torch
import torch.nn.functional as F

from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.data.degradation import DEGRADATIONS, Degradation, DegradationSettings
from sslsr_diffusion.data.draws import Frame, RandomNumbers
from sslsr_diffusion.data.operations import describe

COUNT = 20_000
FAMILIES = {"iso": 0.45, "aniso": 0.25, "generalized_iso": 0.12, "generalized_aniso": 0.03, "plateau_iso": 0.12, "plateau_aniso": 0.03}
MILD_FAMILIES = {"iso": 0.7, "aniso": 0.3}
TARGET = 128  # a crop of 512 at scale 4

# The published numbers, written down a second time: (kernel sizes, sigma, beta generalized, beta plateau), resize, noise, quality
PUBLISHED = {
    "stablesr_ssl": {
        "blur": [
            (1.0, 3, 21, 0.2, 1.5, (0.5, 2.0), (1.0, 1.5), 0.1, FAMILIES),
            (0.5, 3, 11, 0.2, 1.0, (0.5, 2.0), (1.0, 1.5), 0.1, FAMILIES),
        ],
        "resize": [(0.2, 0.7, 0.3, 1.5), (0.3, 0.4, 0.6, 1.2)],
        "noise": [(1, 15, 0.05, 2.0, 0.4), (1, 12, 0.05, 1.0, 0.4)],
        "jpeg": [(60, 95), (60, 100)],
        "sinc": (0.8, 3, 11),
    },
    "real_esrgan": {
        "blur": [
            (1.0, 7, 21, 0.2, 3.0, (0.5, 4.0), (1.0, 2.0), 0.1, FAMILIES),
            (0.8, 7, 21, 0.2, 1.5, (0.5, 4.0), (1.0, 2.0), 0.1, FAMILIES),
        ],
        "resize": [(0.2, 0.7, 0.15, 1.5), (0.3, 0.4, 0.3, 1.2)],
        "noise": [(1, 30, 0.05, 3.0, 0.4), (1, 25, 0.05, 2.5, 0.4)],
        "jpeg": [(30, 95), (30, 95)],
        "sinc": (0.8, 7, 21),
    },
    "mild": {
        "blur": [(1.0, 3, 7, 0.1, 0.6, None, None, 0.01, MILD_FAMILIES), (0.8, 3, 5, 0.1, 0.4, None, None, 0.01, MILD_FAMILIES)],
        "resize": [(0.1, 0.85, 0.9, 1.1), (0.1, 0.85, 0.9, 1.1)],
        "noise": [(1, 8, 0.05, 0.5, 0.2), (0, 4, 0, 0.3, 0.2)],
        "jpeg": [(85, 95), (87, 95)],
        "sinc": (0.1, 3, 5),
    },
}


def share(seen: int, of: int, wanted: float) -> None:
    """Five standard deviations of a binomial: a right probability fails once in two million."""
    assert abs(seen - wanted * of) <= 5 * math.sqrt(of * wanted * (1 - wanted)) + 1e-9, (seen / of, wanted)


def uniform(values: list[float], low: float, high: float) -> None:
    """Kolmogorov-Smirnov against U(low, high); 2.2 / sqrt(n) is passed by a right one but for once in 8000 (draws are seeded)."""
    from scipy.stats import kstest

    assert low <= min(values)
    assert max(values) <= high
    if high > low:
        assert kstest(values, "uniform", (low, high - low)).statistic < 2.2 / math.sqrt(len(values))


def drawn(step, seed: int = 0) -> list:
    random, frame = RandomNumbers(torch.Generator().manual_seed(seed)), Frame(512, 512, 4)
    return [step.draw(random, frame) for _ in range(COUNT)]


def steps_of(preset: str, kind: str) -> list:
    return [step for step in Degradation(DegradationSettings(preset=preset), 4).steps if step.kind == kind]


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("preset", PUBLISHED)
def test_blur_draws(preset, stage):
    prob, least, most, low, high, generalized, plateau, sinc_prob, families = PUBLISHED[preset]["blur"][stage]
    ops = [op for made in drawn(steps_of(preset, "blur")[stage]) for op in made]
    share(len(ops), COUNT, prob)
    sizes = collections.Counter(op.values["size"] for op in ops)
    assert set(sizes) == set(range(least, most + 1, 2))
    for size in sizes:
        share(sizes[size], len(ops), 1 / len(sizes))
    sinc = [op.values for op in ops if op.values["family"] == "sinc"]
    share(len(sinc), len(ops), sinc_prob)
    for small in (True, False):
        cutoffs = [v["cutoff"] for v in sinc if (v["size"] < 13) == small]
        if cutoffs:
            uniform(cutoffs, math.pi / (3 if small else 5), math.pi)
    rest = [op.values for op in ops if op.values["family"] != "sinc"]
    for family, weight in families.items():
        of = [v for v in rest if v["family"] == family]
        share(len(of), len(rest), weight)
        uniform([v["sigma_x"] for v in of], low, high)
        if family.endswith("aniso"):
            uniform([v["sigma_y"] for v in of], low, high)
            uniform([v["theta"] for v in of], -math.pi, math.pi)
        beta_range = generalized if family.startswith("generalized") else plateau if family.startswith("plateau") else None
        if beta_range:
            betas = [v["beta"] for v in of]
            below = [b for b in betas if b < 1]
            assert min(betas) >= beta_range[0]
            if beta_range[0] < 1:
                share(len(below), len(betas), 0.5)
                uniform(below, beta_range[0], 1.0)
                uniform([b for b in betas if b >= 1], 1.0, beta_range[1])
            else:  # half of the plateau kernels have beta exactly 1
                share(betas.count(1.0), len(betas), 0.5)
                uniform([b for b in betas if b > 1], 1.0, beta_range[1])


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("preset", PUBLISHED)
def test_resize_draws(preset, stage):
    up, down, low, high = PUBLISHED[preset]["resize"][stage]
    ops = [made[0].values for made in drawn(steps_of(preset, "resize")[stage])]
    assert len(ops) == COUNT
    modes = collections.Counter(op["mode"] for op in ops)
    assert set(modes) == {"area", "bilinear", "bicubic"}
    for mode in modes:
        share(modes[mode], COUNT, 1 / 3)
    if stage == 0:
        factors = [op["factor"] for op in ops]
        larger, smaller = [f for f in factors if f > 1], [f for f in factors if f < 1]
        share(len(larger), COUNT, up)
        share(len(smaller), COUNT, down)
        uniform(larger, 1.0, high)
        uniform(smaller, low, 1.0)
    else:
        sides = [op["size"][0] for op in ops]
        assert all(op["size"][0] == op["size"][1] for op in ops)
        assert int(TARGET * low) <= min(sides) <= math.ceil(TARGET * low) + 1
        assert int(TARGET * high) - 1 <= max(sides) <= int(TARGET * high)
        # int() of a factor just above 1 is the target itself: compare from one pixel on
        share(sum(s > TARGET for s in sides), COUNT, up * (1 - 1 / (TARGET * (high - 1))))
        share(sum(s < TARGET for s in sides), COUNT, down)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("preset", PUBLISHED)
def test_noise_draws(preset, stage):
    low, high, scale_low, scale_high, gray = PUBLISHED[preset]["noise"][stage]
    ops = [made[0] for made in drawn(steps_of(preset, "noise")[stage])]
    normal, photon = ([op.values for op in ops if op.name == name] for name in ("gaussian", "poisson"))
    share(len(normal), COUNT, 0.5)
    assert len(normal) + len(photon) == COUNT
    uniform([v["sigma"] * 255 for v in normal], low, high * (1 + 1e-12))
    uniform([v["scale"] for v in photon], scale_low, scale_high)
    for kind in (normal, photon):
        share(sum(v["gray"] for v in kind), len(kind), gray)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_jpeg_and_final_draws(preset):
    first, second = PUBLISHED[preset]["jpeg"]
    uniform([made[0].values["quality"] for made in drawn(steps_of(preset, "jpeg")[0])], *first)
    made = drawn(steps_of(preset, "shuffle")[0])
    uniform([op.values["quality"] for ops in made for op in ops if op.name == "jpeg"], *second)
    share(sum(ops[0].name == "jpeg" for ops in made), COUNT, 0.5)
    sinc_prob, least, most = PUBLISHED[preset]["sinc"]
    sincs = [op.values for ops in made for op in ops if op.name == "blur"]
    share(len(sincs), COUNT, sinc_prob)
    assert {v["size"] for v in sincs} == set(range(least, most + 1, 2))
    uniform([v["cutoff"] for v in sincs], math.pi / 3, math.pi)
    for ops in made[:200]:  # the resize and its filter stay together
        names = [op.name for op in ops]
        assert "blur" not in names or names.index("blur") == names.index("resize") + 1


def test_order_of_the_second_order_pipeline():
    kinds = [step.kind for step in Degradation(DegradationSettings(), 4).steps]
    assert kinds == ["blur", "resize", "noise", "jpeg", "blur", "resize", "noise", "shuffle"]
    for preset in ("real_esrgan", "mild"):
        assert [step.kind for step in Degradation(DegradationSettings(preset=preset), 4).steps] == [*kinds, "quantize"]


def test_bsrgan_draws():
    step = steps_of("bsrgan", "bsrgan")[0]
    made = drawn(step)
    halved = [m for m in made if (m[0].name == "reduce") or (m[0].name == "resize" and m[0].values["size"] == (256, 256))]
    share(len(halved), COUNT, 0.25 + 0.75 * 0)  # a first reduction to exactly 256 cannot happen otherwise: 0.85 * 512 > 256
    share(sum(m[0].name == "reduce" for m in made), COUNT, 0.125)
    share(sum(any(op.name == "every" for op in m) for m in made), COUNT, 0.25)
    share(sum(sum(op.name == "jpeg_codec" for op in m) == 2 for m in made), COUNT, 0.9)
    share(sum(any(op.name == "correlated" for op in m) for m in made), COUNT, 0.2)
    share(sum(any(op.name == "gaussian" and op.values["gray"] for op in m) for m in made), COUNT, 0.4)
    share(
        sum(op.values["family"] == "variance" for m in made for op in m if op.name == "blur" and op.values["family"] != "shifted"),
        2 * COUNT,
        0.3,
    )
    levels = collections.Counter(round(op.values["sigma"] * 255) for m in made for op in m if op.name == "gaussian")
    assert set(levels) == set(range(1, 13))
    strengths = lambda made: {op.values["level"] for m in made for op in m if op.name == "correlated"}  # noqa: E731
    assert strengths(made) == {12 / 255}
    assert strengths(drawn(step.model_copy(update={"noise": (0, 0)}))) == {0}
    qualities = {op.values["quality"] for m in made for op in m if op.name == "jpeg_codec"}
    assert qualities == set(range(75, 96))
    for m in made[:500]:
        assert m[-1].name == "jpeg_codec"
        sizes = [op.values.get("size") for op in m if op.name == "resize"]
        assert sizes[-1] == (128, 128)  # the first reduction never follows the last one
        shrunk = [i for i, op in enumerate(m) if op.name in ("resize", "every")]
        assert m[shrunk[-1]].name == "resize"


def test_no_degradation_probability():
    degradation = Degradation(DegradationSettings(), 4)
    plain = 0
    for seed in range(4000):
        ops = degradation.draw(64, 64, torch.Generator().manual_seed(seed))
        plain += [op.name for op in ops] == ["reduce"]
    share(plain, 4000, 0.01)
    always = Degradation(DegradationSettings(no_degradation_prob=1.0), 1)
    hr = _picture(32)
    assert torch.equal(always.apply(hr, always.draw(32, 32, torch.Generator()), torch.Generator()), hr)


def _picture(size: int) -> torch.Tensor:
    small = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(3))
    return F.interpolate(small, (size, size), mode="bicubic", align_corners=False).clamp(0, 1)


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("preset", DEGRADATIONS)
def test_size_range_and_repeatability(preset, scale):
    degradation = Degradation(DegradationSettings(preset=preset), scale)
    hr = _picture(48)
    before = hr.clone()
    for seed in range(6):
        ops = degradation.draw(48, 48, torch.Generator().manual_seed(seed))
        lr = degradation.apply(hr, ops, torch.Generator().manual_seed(seed))
        assert lr.shape == (1, 3, 48 // scale, 48 // scale)
        assert torch.isfinite(lr).all()
        assert 0 <= lr.min() <= lr.max() <= 1
        assert torch.equal(lr, degradation.apply(hr, ops, torch.Generator().manual_seed(seed)))
        assert describe(ops)
    assert torch.equal(hr, before)


def test_shared_draws_are_the_same_for_a_batch_and_the_rest_is_not():
    degradation = Degradation(DegradationSettings(no_degradation_prob=0), 4)
    made = [degradation.draw(512, 512, torch.Generator().manual_seed(own), torch.Generator().manual_seed(7)) for own in range(8)]
    for name in ("resize", "noise kind"):
        seen = {
            tuple(str(op.values) for op in ops if op.name == "resize")
            if name == "resize"
            else tuple(op.name for op in ops if op.name in ("gaussian", "poisson"))
            for ops in made
        }
        assert len(seen) == 1
    assert (
        len(
            {
                ops[-1].values.get("quality", 0) if ops[-1].name == "jpeg" else next(o.values["quality"] for o in ops if o.name == "jpeg")
                for ops in made
            }
        )
        > 1
    )


def test_own_steps_and_another_final_size():
    settings = parse(
        DegradationSettings, {"steps": [{"kind": "noise", "sigma": [5, 5], "gaussian_prob": 1}, {"kind": "jpeg", "codec": "real"}]}
    )
    degradation = Degradation(settings, 4)
    ops = degradation.draw(64, 64, torch.Generator().manual_seed(0))
    assert [op.name for op in ops] == ["gaussian", "jpeg_codec"]
    assert degradation.apply(_picture(64), ops, torch.Generator()).shape == (1, 3, 16, 16)
    assert not degradation.sharpen_target


def test_the_sharpened_target():
    hr = _picture(64)
    assert torch.equal(Degradation(DegradationSettings(), 4).target(hr), hr)
    sharpened = Degradation(DegradationSettings(preset="real_esrgan"), 4).target
    assert not torch.equal(sharpened(hr), hr)
    # a step of 2 n grey levels differs from its blur by n: sharpened from 10 on, as published
    for levels, changed in ((19.0, False), (22.0, True)):
        step = torch.full((1, 3, 64, 64), 0.5)
        step[..., 32:] += levels / 255
        assert torch.equal(sharpened(step), step) != changed


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"preset": "realesrgan"}, "did you mean real_esrgan"),
        ({"preset": "mild", "steps": [{"kind": "quantize"}]}, "either preset or steps"),
        ({"steps": [{"kind": "blur", "sizes": [4, 8]}]}, "two odd sizes"),
        ({"steps": [{"kind": "blur", "sigma": [2, 1]}]}, r"\[least, most\]"),
        ({"steps": [{"kind": "jpeg", "quality": [0, 50]}]}, "numbers from 1 to 100"),
        ({"steps": [{"kind": "bsrgan", "quality": [95, 75]}]}, r"numbers from 1 to 100, got \[95, 75\]"),
        ({"steps": [{"kind": "bsrgan", "noise": [-1, 3]}]}, r"numbers from 0 to 255, got \[-1, 3\]"),
        ({"steps": [{"kind": "bsrgan", "factors": [0, 1]}]}, "numbers from 0.01 to 1, got"),
        ({"steps": [{"kind": "sinc", "cutoff": [0, 1]}]}, "numbers from 0.01 to 3.15"),
        ({"steps": [{"kind": "noise", "sigma": [-5, 1]}]}, "numbers from 0 to 255"),
        ({"steps": [{"kind": "noise", "poisson_scale": [2, 1]}]}, "numbers from 0 to 100"),
        ({"steps": [{"kind": "blur", "beta_plateau": [0, 1]}]}, "numbers from 0.05 to 20"),
        ({"steps": [{"kind": "resize", "up_prob": 0.7, "down_prob": 0.7}]}, "at most 1"),
        ({"steps": [{"kind": "shuffle", "groups": [[{"kind": "blurr"}]]}]}, "did you mean blur"),
        ({"steps": [{"kind": "noise", "sgma": [1, 2]}]}, "did you mean"),
    ],
)
def test_mistakes_are_explained(raw, message):
    with pytest.raises(RecipeError, match=message):
        parse(DegradationSettings, raw)


@pytest.mark.cuda
@pytest.mark.parametrize("preset", DEGRADATIONS)
def test_cuda_runs_every_preset(preset):
    degradation = Degradation(DegradationSettings(preset=preset), 4)
    for seed in range(4):
        ops = degradation.draw(128, 128, torch.Generator().manual_seed(seed))
        lr = degradation.apply(_picture(128).cuda(), ops, torch.Generator("cuda").manual_seed(seed))
        assert lr.shape == (1, 3, 32, 32)
        assert torch.isfinite(lr).all()
