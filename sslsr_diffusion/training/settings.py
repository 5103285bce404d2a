"""The sections of a recipe that belong to the loop: training, validation, checkpoints, output."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from sslsr_diffusion.config import Settings

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    """The optimizer, by name."""

    kind: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw: torch's AdamW; adamw8bit: bitsandbytes, 8-bit states (CUDA).")
    lr: float = Field(5e-5, gt=0, description="Learning rate after warm-up (StableSR: 5e-5).")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="Decay of the first and second moment (StableSR: 0.9, 0.999).")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay (StableSR: 0.01).")
    eps: float = Field(1e-8, gt=0, description="Added to the denominator of the update.")


class ScheduleSettings(Settings):
    """The learning-rate schedule: one of diffusers' names, or multistep."""

    kind: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "multistep"] = Field(
        "constant", description="Shape of the learning rate over the run (StableSR: constant; GAN methods: multistep)."
    )
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps of linear warm-up, in every kind.")
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="multistep: after each of these optimizer steps the rate is multiplied by gamma (ESRGAN: 50k, 100k, 200k, 300k)."
    )
    gamma: float = Field(0.5, gt=0, le=1, description="multistep: that factor (ESRGAN: 0.5).")

    @model_validator(mode="after")
    def _milestones_go_with_multistep(self) -> Self:
        if (self.kind == "multistep") != bool(self.milestones):
            raise ValueError(f"expected milestones exactly when kind is multistep, got kind {self.kind} and {list(self.milestones)}.")
        if any(later <= earlier for earlier, later in pairwise(self.milestones)):
            raise ValueError(f"expected milestones in rising order, got {list(self.milestones)}.")
        return self


class EMASettings(Settings):
    """Exponential moving average of the trained weights; what is validated and published."""

    decay: Decay = Field(0.9999, description="Largest decay per optimizer step.")
    warmup: bool = Field(True, description="Begin with a small decay that grows with the step count; false: `decay` from the start.")
    power: float = Field(0.75, gt=0, le=1, description="Exponent of the warm-up, 1 - (1 + step)^-power.")


class TrainingSettings(Settings):
    """How long, how much at once, and with which numerics."""

    steps: int = Field(20000, ge=1, description="Optimizer steps of the whole run.")
    batch_size: int = Field(1, ge=1, description="Samples per micro-batch and process.")
    accumulate: int = Field(1, ge=1, description="Micro-batches per optimizer step; all means run over all of them, on all processes.")
    crop_size: int = Field(512, ge=16, description="Side of the square HR crop in pixels.")
    # YAML reads a bare no as False
    mixed_precision: Annotated[Literal["no", "bf16", "fp16", "auto"], BeforeValidator(lambda value: "no" if value is False else value)] = (
        Field("no", description="Arithmetic inside the networks; losses are always float32. auto: bf16 where the device is faster in it.")
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations of UNet and VAE decoder in the backward pass.")
    channels_last: bool = Field(False, description="Keep pictures and kernels pixel by pixel in memory: faster bf16 and fp16 convolutions.")
    compile: bool = Field(
        False,
        description="Compile the networks by torch.compile when they are first called: longer first steps, others may take less. Needs a "
        "C++ compiler; not with FSDP or DeepSpeed.",
    )
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradients are scaled down to this norm; null: never.")
    optimizer: OptimizerSettings = Field(OptimizerSettings(), description="The optimizer.")
    schedule: ScheduleSettings = Field(ScheduleSettings(), description="The learning-rate schedule.")
    turns: Literal["together", "alternate"] = Field(
        "together",
        description="alternate: odd steps move the trained networks, even ones what learns beside them (the losses gan and vsd), as HYPIR "
        "and StrSR do; both count as steps.",
    )
    ema: EMASettings | None = Field(None, description="Moving average of the trained weights; null: off.")
    log_every: int = Field(10, ge=1, description="Optimizer steps between two lines in the tracker.")
    non_finite_limit: int = Field(20, ge=1, description="Stop after this many steps in a row with a loss or gradient that is not a number.")
    spike_factor: float = Field(10.0, gt=1, description="A loss this many times its running mean is logged with its batch's file names.")
    tf32: bool = Field(True, description="Allow TF32 in float32 matrix products (CUDA).")
    cpu_threads: int | None = Field(None, ge=1, description="Threads of torch on the CPU; null: torch's own choice.")


class ValidationSettings(Settings):
    """What is upscaled and measured on held-out pictures every so often. Their source stands under `data`."""

    every: int = Field(1000, ge=0, description="Optimizer steps between two validation passes; 0: only at the end.")
    limit: int = Field(8, ge=0, description="Held-out pictures per pass; 0: no validation at all.")
    size: int = Field(512, ge=16, description="Side of the held-out HR crop in pixels.")
    metrics: tuple[str, ...] = Field(("psnr", "ssim"), description="Names of metrics over the restored pictures.")
    best: str = Field(
        "psnr",
        description="The metric that decides which weights are the best. psnr picks the smoothest of a model that makes up detail; "
        "features (extra `features`) does not. One that cannot be measured here has no stand-in: no weights are kept as the best then.",
    )
    refuse: dict[str, float] = Field(
        {},
        description="Metric -> the largest mean (of one where higher is better: the smallest) that weights may have to become the best, "
        "for example {grid: 4} against a raster of 8 or 16 pixels.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="End the run when `best` has not improved by more than its noise (the paired 95 % interval over the pictures, at least "
        "5 of them) in so many looks; null: never before training.steps.",
    )
    pictures: int = Field(4, ge=0, description="Rows of the picture grid.")
    seed: int = Field(1234, ge=0, description="Seed of the sampler's noise; the same in every pass.")


class CheckpointSettings(Settings):
    """What a stopped run goes on from."""

    every: int = Field(500, ge=0, description="Optimizer steps between two checkpoints; 0: only when the run ends or is stopped.")
    keep: int = Field(2, ge=1, description="The newest so many checkpoints stay on disk.")
    on_failure: Literal["continue", "stop"] = Field(
        "continue", description="When a checkpoint cannot be written (a full disk): go on with a warning, or stop the run."
    )


class OutputSettings(Settings):
    """Where the run's files go, and what is published."""

    dir: str = Field("runs/run", min_length=1, description="The run folder, relative to the current directory.")
    trackers: tuple[str, ...] = Field(("tensorboard",), description="Experiment trackers by accelerate's names; empty: none.")
    pipeline: Literal["last", "best"] = Field("last", description="Which weights become the final pipeline folder.")
    push_to_hub: bool = Field(False, description="Publish the pipeline at best and end.")
    hub_id: str | None = Field(None, description="Repository to publish to, `user/name`.")
    private: bool = Field(True, description="Whether a newly made repository is private.")
    push_state: bool = Field(False, description="Publish the last checkpoint too, so that `--resume HUB_ID` works.")
