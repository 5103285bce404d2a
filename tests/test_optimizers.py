"""What a recipe says about the learning rate and the average is what the optimizer and the average do."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import MultiStepLR

from sslsr_diffusion.config import RecipeError, parse
from sslsr_diffusion.training.optimizers import build_ema, build_optimizer, build_schedule
from sslsr_diffusion.training.settings import EMASettings, OptimizerSettings, ScheduleSettings


def test_adamw_without_decay_is_adam():
    """The recipes of the published GAN methods, which were trained with Adam, say so."""
    start, gradients = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.linspace(-2, 3, 50)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    betas = (0.9, 0.99)
    optimizers = build_optimizer(OptimizerSettings(lr=1e-3, betas=betas, weight_decay=0), [ours]), torch.optim.Adam([theirs], 1e-3, betas)
    for step in range(1, 5):
        for parameter, optimizer in zip((ours, theirs), optimizers):
            parameter.grad = gradients / step
            optimizer.step()
    assert torch.equal(ours, theirs)


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


@pytest.mark.parametrize(("milestones", "gamma"), [((2, 3, 6), 0.5), ((1,), 0.3), ((4,), 1.0)])
def test_multistep_is_torchs_and_goes_on_where_it_was(milestones, gamma):
    """A milestone first acts in the step after it, as in the published training."""
    settings = ScheduleSettings(kind="multistep", milestones=milestones, gamma=gamma)
    ours, theirs = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4) for _ in range(2))
    schedule, reference = build_schedule(settings, ours, 8), MultiStepLR(theirs, milestones, gamma)
    for step in range(8):
        if step == 3:  # what a resume does
            own = {"lr_lambdas": schedule.state_dict()["lr_lambdas"]}
            state = {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"}
            schedule = build_schedule(settings, ours, 8)
            schedule.load_state_dict({**state, **own})
        assert schedule.get_last_lr() == pytest.approx(reference.get_last_lr(), rel=1e-12)
        for part in (ours, theirs, schedule, reference):
            part.step()


def test_multistep_warms_up_too():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = build_schedule(ScheduleSettings(kind="multistep", warmup_steps=2, milestones=(3,)), optimizer, 5)
    found = []
    for _ in range(5):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert found == [0, 0.5, 1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "multistep"}, "expected milestones exactly when kind is multistep, got kind multistep and []."),
        ({"milestones": [5]}, "expected milestones exactly when kind is multistep, got kind constant and [5]."),
        ({"kind": "multistep", "milestones": [5, 5]}, "expected milestones in rising order, got [5, 5]."),
        ({"kind": "multistep", "milestones": [0]}, "milestones.0: expected greater than or equal to 1; got 0."),
    ],
)
def test_milestones_that_make_no_schedule(values, message):
    with pytest.raises(RecipeError) as caught:
        parse(ScheduleSettings, values)
    assert message in str(caught.value)


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
