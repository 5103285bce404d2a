"""The training loop and what belongs to it. Knows accelerate; knows no models, data or metrics: they come as objects and callables."""
