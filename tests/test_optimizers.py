"""What a recipe says about the learning rate and the average is what the optimizer and the average do."""

from __future__ import annotations

import pytest
import torch

from sslsr_diffusion.training.optimizers import build_ema, build_schedule
from sslsr_diffusion.training.settings import EMASettings, ScheduleSettings


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup"])
@pytest.mark.parametrize(("warmup_steps", "rates"), [(0, [1, 1, 1, 1]), (2, [0, 0.5, 1, 1])])
def test_a_constant_rate_warms_up_as_long_as_the_recipe_says(kind, warmup_steps, rates):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = build_schedule(ScheduleSettings(kind=kind, warmup_steps=warmup_steps), optimizer, 4)
    found = []
    for _ in rates:
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert found == rates


@pytest.mark.parametrize(("warmup", "decays"), [(False, [0.9] * 4), (True, [1 - (1 + step) ** -0.75 for step in range(1, 5)])])
def test_the_average_begins_with_the_decay_that_the_recipe_says(warmup, decays):
    """decay * average + (1 - decay) * weights; with a warm-up the first update takes the weights as they are."""
    weight = torch.nn.Parameter(torch.full((1,), -2.0))
    ema = build_ema(EMASettings(decay=0.9, warmup=warmup), [weight])
    average = weight.item()
    if warmup:
        average = weight.data.fill_(0.5).item()
        ema.step([weight])
    for value, decay in zip((1.0, 2.0, -1.0, 3.0), decays):
        weight.data.fill_(value)
        ema.step([weight])
        average = decay * average + (1 - decay) * value
        assert ema.shadow_params[0].item() == pytest.approx(average, rel=1e-5)
