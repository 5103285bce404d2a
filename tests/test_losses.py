"""The losses against what they say, on values small enough to check by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from toys import smooth

from sslsr_diffusion.imresize import matlab_bicubic
from sslsr_diffusion.losses import LOSSES, Means, build_losses
from sslsr_diffusion.losses.diffusion import DiffusionLoss, DiffusionSettings
from sslsr_diffusion.losses.latent_kl import LatentKLLoss, LatentKLSettings
from sslsr_diffusion.losses.pixel import PixelL1Loss, PixelL1Settings
from sslsr_diffusion.losses.self_similarity import SelfSimilarityLoss, SelfSimilaritySettings, stride_pattern
from sslsr_diffusion.ops import SelfSimilarityLoss as Operator
from sslsr_diffusion.ops import apply_mask_stride
from sslsr_diffusion.types import Given, Outputs


def outputs(samples: int = 2, **values) -> Outputs:
    defaults = {"t": torch.tensor([10, 900])[:samples], "noise_level": torch.tensor([50.0, 0.1])[:samples].rsqrt()}
    return Outputs(**{**defaults, **values})


def test_diffusion_is_the_mean_squared_error():
    pred, target = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    value, terms = DiffusionLoss(DiffusionSettings(weight=2.0))(outputs(pred=pred, target=target))
    assert terms["diffusion"] == pytest.approx((2.5 + 2.0) / 2)
    assert value == pytest.approx(4.5)


@pytest.mark.parametrize(("kind", "factors"), [("epsilon", (5 / 50, 1.0)), ("v_prediction", (5 / 51, 0.1 / 1.1)), ("sample", (5.0, 0.1))])
def test_min_snr_weights(kind, factors):
    pred, target = torch.ones(2, 3), torch.zeros(2, 3)
    snr = torch.tensor([50.0, 0.1])
    gain = {"epsilon": snr.rsqrt(), "v_prediction": (1 + snr).rsqrt(), "sample": torch.ones(2)}[kind]  # Process.clean_gain
    value, terms = DiffusionLoss(DiffusionSettings(min_snr_gamma=5.0))(outputs(pred=pred, target=target, clean_gain=gain))
    assert terms["diffusion"] == 1  # raw is what is plotted
    assert float(value) == pytest.approx(sum(factors) / 2)


def test_pixel_gate_by_timestep_and_by_snr():
    sr, hr = torch.zeros(2, 3, 4, 4), torch.stack([torch.full((3, 4, 4), 0.5), torch.ones(3, 4, 4)])
    everything = outputs(sr=sr, hr=hr, decoded=torch.arange(2))
    assert PixelL1Loss(PixelL1Settings(weight=1))(everything)[0] == 0.75
    assert PixelL1Loss(PixelL1Settings(weight=1, max_timestep=500))(everything)[0] == 0.5
    assert PixelL1Loss(PixelL1Settings(weight=1, min_snr=1.0))(everything)[0] == 0.5
    assert PixelL1Loss(PixelL1Settings(weight=1, max_timestep=5))(everything)[0] == 0
    given = Given(t=torch.tensor([499, 500, 501]), noise_level=torch.tensor([0.5, 1.0, 2.0]))
    assert PixelL1Settings(max_timestep=500).passes(given).tolist() == [True, True, False]  # up to and with the bound
    assert PixelL1Settings(min_snr=1.0).passes(given).tolist() == [True, True, False]


def test_latent_kl_is_zero_for_a_unit_gaussian():
    loss = LatentKLLoss(LatentKLSettings(weight=1.0))
    assert loss(outputs(moments=torch.zeros(2, 8, 3, 3)))[0] == 0
    shifted = torch.zeros(2, 8, 3, 3)
    shifted[:, :4] = 2.0
    assert loss(outputs(moments=shifted))[0] == 2.0


def test_self_similarity_equals_the_operator_with_stride_and_weights():
    hr, sr = torch.stack([smooth(1), smooth(2)]), torch.stack([smooth(3), smooth(4)])
    mask = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.2
    settings = SelfSimilaritySettings(search_size=7, window_size=3, mask_stride=3, l1_weight=7, kl_weight=11, weight=0.5, backend="torch")
    value, terms = SelfSimilarityLoss(settings)(outputs(sr=sr, hr=hr, mask=mask, decoded=torch.arange(2)))
    want, parts = Operator(7, 3, l1_weight=7, kl_weight=11, mask_stride=3, backend="torch")(sr, hr, mask, return_terms=True)
    torch.testing.assert_close(value, 0.5 * want)
    assert terms["self_similarity/l1"] == parts["l1"]
    assert SelfSimilarityLoss(settings).count(outputs(sr=sr, hr=hr, mask=mask, decoded=torch.arange(2))) == parts["rows"]


def test_self_similarity_counts_only_samples_behind_the_gate():
    mask = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    given = Given(t=torch.tensor([10, 900]), noise_level=torch.ones(2), decoded=torch.arange(2), mask=mask)
    loss = SelfSimilarityLoss(SelfSimilaritySettings(max_timestep=500, mask_stride=1))
    assert loss.count(given) == 32 * 32


def test_stride_pattern_agrees_with_the_operator_and_is_anchored_at_the_crop():
    full = torch.ones(1, 1, 30, 30, dtype=torch.bool)
    whole = stride_pattern(Given(t=torch.zeros(1), noise_level=torch.zeros(1), mask=full), 3)
    assert torch.equal(whole, apply_mask_stride(full, 3))
    window = Given(t=torch.zeros(1), noise_level=torch.zeros(1), mask=full[..., 4:20, 7:25], origin=torch.tensor([[4, 7]]))
    assert torch.equal(stride_pattern(window, 3), whole[..., 4:20, 7:25])


@pytest.mark.parametrize(
    ("values", "reason"),
    [({"search_size": 24}, "odd"), ({"search_size": 7, "window_size": 9}, "must not exceed"), ({"weight": -1.0}, "at least 0")],
)
def test_impossible_self_similarity_settings(values, reason):
    with pytest.raises(ValidationError, match=reason):
        SelfSimilaritySettings(**values)


def test_a_missing_input_is_named():
    with pytest.raises(ValueError, match=r"Outputs\.sr"):
        PixelL1Loss(PixelL1Settings())(outputs())
    with pytest.raises(ValueError, match=r"Outputs\.moments"):
        LatentKLLoss(LatentKLSettings())(outputs())


def test_every_kind_can_be_built_from_its_defaults():
    given = {"rank": {"file": "ranker.pth"}}  # that must be given, and is not read where shapes are enough
    means = Means(shapes=True, prior=lambda **asked: SimpleNamespace(network=torch.nn.Linear(1, 1)))  # the networks' part, of vsd
    built = build_losses([loss.settings_class(**given.get(kind, {})) for kind, loss in LOSSES.items()], means)
    assert [loss.name for loss in built] == list(LOSSES)


def test_a_loss_has_the_name_that_the_recipe_gives_it():
    named = PixelL1Loss(PixelL1Settings(name="coarse"))
    assert named.name == "coarse"
    _, terms = named(outputs(sr=torch.zeros(2, 3, 4, 4), hr=torch.ones(2, 3, 4, 4), decoded=torch.arange(2)))
    assert list(terms) == ["coarse"]
    with pytest.raises(ValidationError, match="pattern"):
        PixelL1Settings(name="../x")


OF_SAMPLES = ["pixel_l1", "pixel_l2", "charbonnier", "ldl", "best_buddy", "back_projection", "gradient", "gradient_branch"]


def pictures() -> Outputs:
    hr, sr, average, branch = (torch.stack([smooth(10 * k + i) for i in range(3)]) for k in range(4))
    lr = torch.nn.functional.avg_pool2d(hr, 4)
    t, level = torch.tensor([10, 400, 900]), torch.ones(3)
    return Outputs(t=t, noise_level=level, decoded=torch.arange(3), hr=hr, sr=sr, lr=lr, sr_ema=average, branch=branch)


def part(given: Outputs, *places: int) -> Outputs:
    keep = list(places)
    fields = {name: getattr(given, name)[keep] for name in ("t", "noise_level", "hr", "sr", "lr", "sr_ema", "branch")}
    return Outputs(**fields, decoded=torch.arange(len(keep)))


@pytest.mark.parametrize("kind", OF_SAMPLES)
def test_micro_batches_add_up_and_gates_leave_samples_out(kind):
    (loss,) = build_losses([LOSSES[kind].settings_class(weight=2.0)])
    given, total = pictures(), torch.tensor(3.0)
    value, terms = loss(given)
    assert value > 0
    assert value.item() == pytest.approx(2 * terms[kind].item(), rel=1e-6)
    split = sum(loss(part(given, *places), total)[0].item() for places in ((0, 2), (1,)))
    assert split == pytest.approx(value.item(), rel=1e-5)
    (gated,) = build_losses([LOSSES[kind].settings_class(weight=2.0, max_timestep=500)])
    assert gated(given)[0].item() == pytest.approx(loss(part(given, 0, 1))[0].item(), rel=1e-5)
    (nothing,) = build_losses([LOSSES[kind].settings_class(max_timestep=5)])
    given.sr.requires_grad_()
    empty, _ = nothing(given)
    empty.backward()
    assert empty == 0
    assert not given.sr.grad.any()


def test_what_the_pixel_losses_are():
    sr, hr = torch.full((1, 3, 4, 4), 0.5), torch.full((1, 3, 4, 4), 0.2)
    given = outputs(1, sr=sr, hr=hr, decoded=torch.arange(1))
    for kind, want in (("pixel_l1", 0.3), ("pixel_l2", 0.09), ("charbonnier", (0.09 + 0.01**2) ** 0.5)):
        more = {"epsilon": 0.01} if kind == "charbonnier" else {}
        (loss,) = build_losses([LOSSES[kind].settings_class(weight=1.0, **more)])
        assert loss(given)[0].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "field"), [("ldl", "sr_ema"), ("back_projection", "lr"), ("gradient_branch", "branch"), ("best_buddy", "sr")]
)
def test_what_a_loss_reads_and_does_not_get_is_named(kind, field):
    given = pictures()
    (loss,) = build_losses([LOSSES[kind].settings_class()])
    with pytest.raises(ValueError, match=rf"Outputs\.{field}"):
        loss(replace(given, **{field: None}))


def test_reducing_shapes_alone_leaves_numbers_for_later():
    """A dry run's estimate and a training may share a process, and the kernel's rows are kept."""
    pictures = torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        assert matlab_bicubic(pictures.to("meta"), 1 / 4).shape == (1, 3, 5, 7)
    assert matlab_bicubic(pictures, 1 / 4).isfinite().all()
    assert torch.allclose(matlab_bicubic(torch.full_like(pictures, 0.3), 1 / 4), torch.tensor(0.3))
