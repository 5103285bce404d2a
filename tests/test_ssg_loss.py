"""SelfSimilarityLoss on every portable backend: golden values and gradients, means over processes, the corners."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens import load_golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ssg_inputs import assert_close, make_pair

from sslsr_diffusion.ops import SelfSimilarityLoss, apply_mask_stride, laplacian_edge_mask, self_similarity_graph

GOLDEN = load_golden("ssl/loss")
FLOAT32, FLOAT64 = torch.float32, torch.float64
EVERY = [("reference", FLOAT64), ("reference", FLOAT32), ("torch", FLOAT64), ("torch", FLOAT32), ("cpu", FLOAT32)]
FUSED = ["reference", "torch", "cpu"]
SMALL = {"search_size": 7, "window_size": 3, "sigma": 0.05}  # a size that the golden cases compile anyway


@pytest.mark.parametrize(("backend", "dtype"), EVERY)
@pytest.mark.parametrize("case", GOLDEN.index, ids=lambda case: case["name"])
def test_golden(case, backend, dtype):
    name = case["name"]
    sr, gt = (GOLDEN.tensors[f"{name}.{side}"].to(dtype) for side in ("sr", "gt"))
    mask = GOLDEN.tensors[f"{name}.mask"][:, None]
    exact = dtype == FLOAT64
    for weights, key in (((1, 0), "grad_l1"), ((0, 1), "grad_kl"), ((1000, 1000), "grad_both")):
        want = GOLDEN.tensors.get(f"{name}.{key}")
        if want is None:
            continue
        ssl = SelfSimilarityLoss(
            case["search"], case["window"], case["sigma"], case["normalise"], *weights, max(1, case["mask_stride"]), backend
        )
        x = sr.clone().requires_grad_()
        loss, terms = ssl(x, gt, mask, return_terms=True)
        loss.backward()
        assert terms["rows"] == case["rows"]
        assert loss.item() == pytest.approx(weights[0] * terms["l1"].item() + weights[1] * terms["kl"].item(), rel=1e-6)
        # the golden README's tolerances
        if name == "identical":
            assert abs(terms["l1"]) <= 1e-8
            assert abs(terms["kl"]) <= 1e-8
            unit = x.grad.abs().max() / max(weights)
            assert unit == 0 if key == "grad_l1" else unit <= (1e-9 if exact else 1e-7)
            continue
        for term in ("l1", "kl"):
            assert terms[term].item() == pytest.approx(case[term], rel=1e-10 if exact else 5e-5)
        assert (x.grad - want).abs().max() <= (1e-9 if exact else 5e-4) * want.abs().max()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    size=st.tuples(st.integers(1, 2), st.integers(13, 26), st.integers(13, 26)),
    extent=st.sampled_from(((9, 1.0), (13, 0.2), (25, 0.02), (25, 0.1))),  # the definition keeps 608 kB per row
    sigma=st.sampled_from((0.004, 0.02, 1.0)),
    normalize=st.booleans(),
    weights=st.sampled_from(((0.0, 1.0), (1.0, 0.0), (1000.0, 500.0))),
    upstream=st.floats(-3, 3),
    seed=st.integers(0, 99),
)
def test_matches_float64_reference(backend, size, extent, sigma, normalize, weights, upstream, seed):
    search, density = extent
    sr, gt, mask = make_pair(size[0], 3, *size[1:], density=density, seed=seed)
    options = {
        "search_size": search,
        "window_size": 9,
        "sigma": sigma,
        "normalize": normalize,
        "l1_weight": weights[0],
        "kl_weight": weights[1],
    }

    def run(name, dtype):
        x = sr.to(dtype, copy=True).requires_grad_()
        loss, terms = SelfSimilarityLoss(**options, backend=name)(x, gt.to(dtype), mask, num_rows=17.5, return_terms=True)
        (gradient,) = torch.autograd.grad(loss, x, torch.tensor(upstream, dtype=dtype))
        return loss.detach(), terms, gradient

    want, want_terms, want_gradient = run("reference", FLOAT64)
    got, terms, gradient = run(backend, FLOAT32)
    # values: rounding of distances, magnified by 1 / sigma; gradients: sign(T_sr - T_gt) may flip at near-ties in any float32 code
    for key in ("l1", "kl"):
        assert terms[key].item() == pytest.approx(want_terms[key].item(), rel=1e-4, abs=1e-9)
    assert got.item() == pytest.approx(want.item(), rel=1e-4, abs=1e-9)
    assert_close(gradient, want_gradient, 2e-3 if weights[0] else 2e-4, "gradient")


@pytest.mark.parametrize("backend", FUSED)
def test_kl_of_nearly_equal_images(backend):
    """The KL is second order in a small difference: log Z kept in float32 alone would miss this by 1e-4 (measured)."""
    sr, gt, mask = make_pair(1, 3, 48, 48, density=0.1, seed=3)
    sr = (gt + 0.13 * (sr - gt)).float().double()
    want = SelfSimilarityLoss(backend="reference")(sr, gt, mask, return_terms=True)[1]["kl"].item()
    got = SelfSimilarityLoss(backend=backend)(sr.float(), gt.float(), mask, return_terms=True)[1]["kl"].item()
    assert 1e-7 < want < 1e-6
    assert got == pytest.approx(want, rel=5e-5)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_images(backend, normalize):
    image = make_pair(2, 3, 20, 21, density=0.3, seed=1)[1].float()
    mask = torch.rand(2, 1, 20, 21) < 0.2
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        x = image.clone().requires_grad_()
        ssl = SelfSimilarityLoss(25, 9, 0.004, normalize, *weights, backend=backend)
        loss, terms = ssl(x, image, mask, return_terms=True)
        loss.backward()
        assert terms["l1"] == 0
        assert abs(terms["kl"]) <= (0 if backend == "cpu" else 1e-9)
        if weights[0]:
            assert (x.grad == 0).all()
        elif normalize:
            assert x.grad.abs().max() <= 1e-7
        else:
            assert x.grad.abs().max() > 1e-4  # un-normalised rows are no distributions: documented


@pytest.mark.parametrize("batch", [2, 0])
@pytest.mark.parametrize("backend", FUSED)
def test_empty_mask_or_batch_is_zero_with_a_graph(backend, batch):
    sr, mask = torch.full((batch, 3, 16, 16), float("nan"), requires_grad=True), torch.zeros(batch, 1, 16, 16)
    loss, terms = SelfSimilarityLoss(**SMALL, backend=backend)(sr, torch.rand(batch, 3, 16, 16), mask, return_terms=True)
    loss.backward()
    assert loss.item() == terms["l1"] == terms["kl"] == terms["rows"] == 0
    assert (sr.grad == 0).all()
    assert self_similarity_graph(sr, mask, **SMALL, backend=backend).shape == (0, 49)


@pytest.mark.parametrize("num_rows", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
@pytest.mark.parametrize("backend", FUSED)
def test_no_rows_on_any_process_is_zero_with_a_graph(backend, num_rows):
    """A mean over nothing is 0 here, also where the mask disagrees: a batch of flat pictures must not end a distributed run."""
    sr, gt, mask = make_pair(1, 3, 16, 16, density=0.3, seed=0)
    x = sr.float().requires_grad_()
    loss, terms = SelfSimilarityLoss(**SMALL, backend=backend)(x, gt.float(), mask, num_rows=num_rows, return_terms=True)
    loss.backward()
    assert loss.item() == terms["l1"] == terms["kl"] == 0
    assert (x.grad == 0).all()


@pytest.mark.parametrize("backend", FUSED)
def test_a_broken_prediction_shows(backend):
    """One NaN reaches the loss, the rows whose windows see it and their pixels' gradient; no clamp swallows it."""
    sr, gt, mask = make_pair(1, 3, 20, 20, density=0.3, seed=0)
    sr[0, 1, 5, 5] = float("nan")
    x = sr.float().requires_grad_()
    loss = SelfSimilarityLoss(**SMALL, backend=backend)(x, gt.float(), mask)
    loss.backward()
    reached = (x.grad.isnan().any(1) & mask[:, 0]).nonzero()
    assert loss.isnan()
    assert 0 < len(reached) < mask.sum()
    graph = self_similarity_graph(sr.float(), mask, **SMALL, backend=backend)
    ys, xs = mask[0, 0].nonzero().unbind(1)
    assert torch.equal(graph.isnan().any(1), ((ys - 5).abs() <= 3) & ((xs - 5).abs() <= 3))


@pytest.mark.parametrize("backend", FUSED)
def test_processes_equal_one_big_batch(backend):
    """Three processes with one image each, gradients averaged as DDP does; one of them has no masked pixel."""
    sr, gt, mask = make_pair(3, 3, 20, 22, density=0.2, seed=7)
    sr, gt = sr.float(), gt.float()
    ssl = SelfSimilarityLoss(**SMALL, l1_weight=700, kl_weight=900, backend=backend)
    whole = sr.clone().requires_grad_()
    want = ssl(whole, gt, mask)
    want.backward()
    rows = mask.sum() / 3  # all_reduce(rows) / world_size
    got, gradients = 0.0, []
    for i in range(3):
        part = sr[i : i + 1].clone().requires_grad_()
        loss = ssl(part, gt[i : i + 1], mask[i : i + 1], num_rows=rows)
        loss.backward()
        got += loss.item() / 3
        gradients.append(part.grad / 3)
    assert got == pytest.approx(want.item(), rel=1e-5)
    assert_close(torch.cat(gradients), whole.grad.double(), 1e-5, "gradient")


@pytest.mark.parametrize("backend", FUSED)
def test_mask_default_stride_and_terms(backend):
    sr, gt, _ = (t.float() if t.is_floating_point() else t for t in make_pair(2, 3, 24, 27, density=0.5, seed=2))
    ssl = SelfSimilarityLoss(**SMALL, mask_stride=3, backend=backend)
    by_default, terms = ssl(sr, gt, return_terms=True)
    mask = apply_mask_stride(laplacian_edge_mask(gt), 3)
    assert terms["rows"] == mask.sum() > 0
    options = {**SMALL, "backend": backend}
    difference = self_similarity_graph(sr, mask, **options) - self_similarity_graph(gt, mask, **options)
    assert terms["l1"].item() == pytest.approx(difference.abs().mean().item(), rel=1e-4)
    assert torch.equal(by_default, SelfSimilarityLoss(**SMALL, backend=backend)(sr, gt, mask))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_inference_saves_nothing(backend):
    sr, gt, mask = make_pair(1, 3, 20, 20, density=0.3, seed=0)
    ssl = SelfSimilarityLoss(**SMALL, backend=backend)
    with_gradient = ssl(sr.float().requires_grad_(), gt.float(), mask)
    with torch.no_grad():
        without = ssl(sr.float().requires_grad_(), gt.float(), mask)
    assert without.grad_fn is None
    assert without.item() == with_gradient.item()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_second_derivatives_raise(backend):
    sr, gt, mask = make_pair(1, 3, 16, 16, density=0.3, seed=0)
    x = sr.float().requires_grad_()
    loss = SelfSimilarityLoss(**SMALL, backend=backend)(x, gt.float(), mask)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        gradient.square().sum().backward()


def test_autocast_and_half():
    sr, gt, mask = make_pair(1, 3, 20, 20, density=0.3, seed=0)
    ssl = SelfSimilarityLoss(**SMALL)
    low = sr.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ssl(low, gt.float(), mask)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == ssl(low.detach().float(), gt.float(), mask).item()
    assert low.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "both_sides"),
    [
        ({"gt": torch.rand(1, 3, 16, 17)}, r"shape of sr \[1, 3, 16, 16\], got \[1, 3, 16, 17\]"),
        ({"gt": torch.rand(1, 3, 16, 16).double()}, r"dtype of sr torch.float32, got torch.float64"),
        ({"gt": torch.rand(1, 3, 16, 16).to("meta")}, r"device of sr cpu, got on meta"),
        ({"mask": torch.ones(1, 16, 16)}, r"\[1, 1, 16, 16\].*got \[1, 16, 16\]"),
        ({"num_rows": -1}, r"num_rows: .*got -1"),
        ({"num_rows": float("nan")}, r"num_rows: .*got nan"),
        ({"num_rows": np.float32(-5)}, r"num_rows: .*got .*-5"),
        ({"sr": np.zeros((1, 3, 16, 16))}, r"sr: expected a torch tensor, got ndarray"),
        ({"mask": [1, 0]}, r"mask: expected a torch tensor, got list"),
        ({"num_rows": torch.ones(2)}, r"0-dim tensor, got shape \[2\]"),
    ],
)
def test_mistakes_show_both_sides(change, both_sides):
    inputs = {"sr": torch.rand(1, 3, 16, 16), "gt": torch.rand(1, 3, 16, 16), "mask": torch.ones(1, 1, 16, 16), **change}
    with pytest.raises(ValueError, match=both_sides):
        SelfSimilarityLoss(**SMALL)(**inputs)


@pytest.mark.parametrize(
    "option",
    [{"l1_weight": -1}, {"kl_weight": float("nan")}, {"mask_stride": 0}, {"window_size": 4}, {"backend": "fast"}, {"kl_weight": "1"}],
)
def test_settings_are_checked(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        SelfSimilarityLoss(**option)


@pytest.mark.parametrize("backend", FUSED)
def test_a_count_that_went_wrong_does_not_turn_the_loss_off(backend):
    """A reduction over processes that overflowed, for example: NaN is noticed, 0 would not be."""
    sr, gt, mask = make_pair(1, 3, 16, 16, density=0.3, seed=0)
    for wrong in (float("nan"), float("inf"), -5.0):
        picture = sr.float().requires_grad_()
        loss = SelfSimilarityLoss(**SMALL, backend=backend)(picture, gt.float(), mask, num_rows=torch.tensor(wrong))
        loss.backward()
        assert loss.isnan()
        assert picture.grad.isnan().any()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_second_derivative_raises_instead_of_leaving_the_curvature_out(backend):
    sr, gt, mask = make_pair(1, 3, 16, 16, density=0.3, seed=0)
    weight = torch.tensor(1.0, requires_grad=True)
    loss = SelfSimilarityLoss(**SMALL, backend=backend)(sr.float() * weight**2, gt.float(), mask)
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match='has no second derivative in its fast backends; backend="reference" has one'):
        torch.autograd.grad(gradient, weight)


@pytest.mark.parametrize("backend", FUSED)
def test_other_ranges_are_refused_by_the_first_call_and_not_looked_for_again(backend):
    sr, gt, mask = (x.float() for x in make_pair(1, 3, 16, 16, density=0.3, seed=0))

    def first(*given):
        return SelfSimilarityLoss(**SMALL, backend=backend)(*given)

    with pytest.raises(ValueError, match=r"gt: expected a picture in \[0, 1\], got values from .* to 2\d\d; give \(sr \+ 1\) / 2 and"):
        first(255 * sr, 255 * gt, mask)
    with pytest.raises(ValueError, match=r"got values from -"):
        first(2 * sr - 1, 2 * gt - 1)
    with pytest.raises(ValueError, match=r"mask: expected entries of exactly 1, got none \(the largest is 255\); give mask > 0"):
        first(sr, gt, 255 * mask)
    for other, name in ((2 * sr - 1, r"\[-1, 1\]"), (255 * sr, r"\[0, 255\]")):
        with pytest.warns(UserWarning, match=f"sr: seems to be in {name}, and gt is in") as caught:
            first(other, gt, mask)
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for beginning in (sr, 0 * sr, sr + torch.linspace(-0.4, 0.4, 16)):  # a network that knows nothing yet is no other range
            first(beginning, gt, mask)
        first(sr, gt, 0 * mask)
        ssl = SelfSimilarityLoss(**SMALL, backend=backend)
        ssl(sr, gt, mask)
        assert ssl(2 * sr - 1, 2 * gt - 1, mask).isfinite()


def test_gt_never_receives_a_gradient():
    sr, gt, mask = make_pair(1, 3, 16, 16, density=0.3, seed=0)
    gt = gt.float().requires_grad_()
    for backend in FUSED:
        SelfSimilarityLoss(**SMALL, backend=backend)(sr.float().requires_grad_(), gt, mask).backward()
        assert gt.grad is None


def test_the_example_runs(capsys):
    example = Path(__file__).parent.parent / "examples" / "add_the_loss.py"
    assert len(example.read_text().splitlines()) <= 30
    runpy.run_path(str(example), run_name="__main__")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0]
