"""The dense CUDA path of the loss on a CPU, by emulation: values and gradients against float64, alone and beside the path by rows."""

from __future__ import annotations

import pytest
import torch
from emulation.emulator import COMPILER, SHARED_LIMIT, EmulatedLauncher
from goldens import load_golden
from ssg_cuda_cases import assert_same_gradient, golden_mask

from sslsr_diffusion.checkup.cases import DENSE_CASES, Case, Inputs, make_inputs, reference_loss
from sslsr_diffusion.ops import ssg_cuda_launch
from sslsr_diffusion.ops.settings import GraphSettings
from sslsr_diffusion.ops.ssg_cuda_dense import dense_geometry, run_loss

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ on Linux")

WEIGHTS = (700.0, 900.0)
ALL = 1  # a single masked pixel makes a tile dense
PATH = ["ssg_dense_choose", "ssg_loss", "ssg_gather", "ssg_dense_sums", "ssg_dense_sums", "ssg_dense_scales", "ssg_dense_values"]
BACKWARD = ["ssg_dense_gradient", "ssg_gather"]


def emulate(inputs: Inputs, settings: GraphSettings, weights=WEIGHTS, *, reverse=False, with_gradient=True, least=ALL, **named):
    launch = EmulatedLauncher(reverse)
    named = {"with_gradient": with_gradient, "shared_limit": SHARED_LIMIT, "least": least, **named}
    return *run_loss(launch, *inputs, settings, weights, **named), launch.launches


@pytest.mark.parametrize("case", DENSE_CASES.values(), ids=DENSE_CASES.keys())
def test_loss_matches_float64_reference(case):
    inputs = make_inputs(case)
    entries = int(inputs.mask.sum()) * case.search**2
    for weights in ((0.0, 900.0), (700.0, 0.0)):
        _, l1, kl, want = reference_loss(inputs, case, weights)
        sums, gradient, launches = emulate(inputs, case.inner(), weights)
        assert launches == ([*PATH, *BACKWARD] if case.normalize else [name for name in (*PATH, *BACKWARD) if name != "ssg_dense_sums"])
        assert sums[0] / entries == pytest.approx(float(l1), rel=1e-5)  # tolerances as for the path by rows
        assert sums[1] / entries == pytest.approx(float(kl), rel=2e-5)
        assert_same_gradient(gradient / entries, want)


SMALL_GOLDENS = [entry for entry in load_golden("ssl/loss").index if entry["search"] < 25]  # the others take minutes here


@pytest.mark.parametrize("entry", SMALL_GOLDENS, ids=lambda entry: entry["name"])
def test_golden_losses(entry):
    name, tensors = entry["name"], load_golden("ssl/loss").tensors
    mask = golden_mask(tensors[f"{name}.mask"], entry["mask_stride"])
    inputs = Inputs(tensors[f"{name}.sr"].float().contiguous(), tensors[f"{name}.gt"].float().contiguous(), mask)
    settings = GraphSettings(entry["search"], entry["window"], entry["sigma"], entry["normalise"])
    entries = entry["rows"] * entry["search"] ** 2
    for weights, term in (((1.0, 0.0), "l1"), ((0.0, 1.0), "kl")):
        sums, gradient, _ = emulate(inputs, settings, weights)
        want = tensors[f"{name}.grad_{term}"]
        error = (gradient.double() / entries - want).abs().max()
        if name == "identical":
            assert torch.equal(sums, torch.zeros(2, dtype=torch.float64))
            assert error <= (0 if term == "l1" else 1e-7)
        else:
            got = {"l1": float(sums[0]) / entries, "kl": float(sums[1]) / entries}
            assert got == pytest.approx({"l1": entry["l1"], "kl": entry["kl"]}, rel=5e-5)
            assert error <= 5e-4 * want.abs().max()


@pytest.mark.parametrize("density", [0.05, 0.3, 0.7, 1.0])
def test_each_tile_takes_the_path_that_its_mask_is_for(density):
    """One picture of six tiles: one is full, one is empty, the others have the density."""
    case = Case((1, 1, 40, 70), search=5, window=3, density=density)
    inputs = make_inputs(case)
    inputs.mask[..., :32, :30], inputs.mask[..., 32:, 60:] = True, False
    want, want_gradient, _ = emulate_by_rows(inputs, case)
    sums, gradient, _ = emulate(inputs, case.inner(), least=500)
    torch.testing.assert_close(sums, want, rtol=1e-6, atol=0)
    assert_same_gradient(gradient, want_gradient.double())


def emulate_by_rows(inputs: Inputs, case: Case):
    launch = EmulatedLauncher()
    named = {"with_gradient": True, "shared_limit": SHARED_LIMIT}
    return *ssg_cuda_launch.run_loss(launch, *inputs, case.inner(), WEIGHTS, **named), launch.launches


def test_the_mask_of_dense_tiles_is_taken_from_the_rows():
    case = Case((2, 1, 20, 70), search=5, window=3, density=0.5)
    inputs, dense = make_inputs(case), dense_geometry(torch.Size(case.shape), 5, 3)
    inputs.mask[0, :, :, 30:60] = True
    counts, others = torch.full((6,), -1, dtype=torch.int32), torch.empty_like(inputs.mask)
    sides = [torch.tensor(side, dtype=torch.int32).numpy()[()] for side in (20, 70, 1, 3, 600)]
    EmulatedLauncher()("ssg_dense.cu", "ssg_dense_choose", dense.defines(), 6, 32, 0, [inputs.mask, *sides, counts, others])
    assert counts.tolist() == [0, 600, 0, 0, 0, 0]
    assert torch.equal(others, inputs.mask & ((torch.arange(70) < 30) | (torch.arange(70) >= 60) | (torch.arange(2) > 0).view(2, 1, 1, 1)))


def test_kl_of_almost_equal_images_keeps_its_digits():
    case = Case((1, 3, 20, 20), sigma=0.004)
    inputs = make_inputs(case)
    inputs = inputs._replace(sr=inputs.gt + 0.002 * (inputs.sr - inputs.gt))
    _, _, want, _ = reference_loss(inputs, case, WEIGHTS)
    sums, _, _ = emulate(inputs, case.inner(), with_gradient=False)
    assert sums[1] / (int(inputs.mask.sum()) * 625) == pytest.approx(float(want), rel=1e-3, abs=1e-11)


@pytest.mark.parametrize("name", ["one channel", "two and a half tiles, two pictures"])
def test_same_bits_in_any_order_of_threads(name):
    inputs = make_inputs(DENSE_CASES[name])
    forward, backward = (emulate(inputs, DENSE_CASES[name].inner(), reverse=reverse) for reverse in (False, True))
    assert torch.equal(forward[0], backward[0])
    assert torch.equal(forward[1], backward[1])


@pytest.mark.parametrize("slot_bytes", [1, 20_000])
def test_what_does_not_fit_is_done_in_several_launches(slot_bytes):
    case = DENSE_CASES["two and a half tiles, two pictures"]
    whole, pieces = (emulate(make_inputs(case), case.inner(), **named) for named in ({}, {"slot_bytes": slot_bytes}))
    assert whole[2].count("ssg_dense_gradient") == 1
    assert pieces[2].count("ssg_dense_gradient") > 1
    torch.testing.assert_close(pieces[0], whole[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(pieces[1], whole[1], rtol=1e-4, atol=1e-5 * float(whole[1].abs().max()))


def test_without_a_gradient_the_values_are_the_same():
    case = DENSE_CASES["full mask"]
    with_gradient, without = (emulate(make_inputs(case), case.inner(), with_gradient=flag) for flag in (True, False))
    assert not {*BACKWARD} & {*without[2]}
    assert without[1].numel() == 0
    assert torch.equal(with_gradient[0], without[0])


def test_what_is_no_number_is_not_lost():
    """As by rows: a prediction that is no number makes a loss that is none, so that a run that diverges is seen."""
    case = DENSE_CASES["full mask"]
    inputs = make_inputs(case)
    broken = inputs.sr.clone()
    broken[..., broken.shape[-2] // 2, broken.shape[-1] // 2] = float("nan")
    sums, _, _ = emulate(inputs._replace(sr=broken), case.inner())
    assert sums.isnan().any()


def test_empty_masks_and_strange_pictures():
    case = DENSE_CASES["full mask"]
    inputs = make_inputs(case)
    sums, gradient, _ = emulate(inputs._replace(mask=torch.zeros_like(inputs.mask)), case.inner())
    assert torch.equal(sums, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(gradient, torch.zeros_like(inputs.sr))
    for image in (torch.full((1, 3, 14, 15), 0.7), torch.randn(1, 3, 14, 15, generator=torch.Generator().manual_seed(0)) * 50):
        mask = torch.ones(1, 1, 14, 15, dtype=torch.bool)
        sums, gradient, _ = emulate(Inputs(image, image.flip(3).contiguous(), mask), GraphSettings(7, 3, 0.004, True))
        assert sums.isfinite().all()
        assert gradient.isfinite().all()
