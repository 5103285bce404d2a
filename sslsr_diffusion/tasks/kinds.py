"""The tasks by the recipe's `task.kind`: a new one is a file and a line here."""

from typing import Any, ClassVar, Protocol

from sslsr_diffusion.tables import named
from sslsr_diffusion.tasks.frame import Frame, TaskSettings
from sslsr_diffusion.tasks.task import Task


class TaskKind(Task, Protocol):
    """One entry of the table: a Task's class, which a recipe's section builds."""

    settings: ClassVar[type[TaskSettings]]  # of the recipe's task section

    makes_upscaler: ClassVar[bool]  # whether the result enlarges pictures; the others make parts for later runs
    reads_latents: ClassVar[bool]  # whether it can train on stored latents

    @classmethod
    def build(cls, settings: Any, frame: Frame) -> Task:
        """The task of a recipe; UserError where it cannot be built."""


TASKS: dict[str, type[TaskKind]] = {
    kind: named(f"sslsr_diffusion.tasks.{where}")
    for kind, where in {
        "diffusion": "diffusion:DiffusionTask",
        "base": "base:BaseTask",
        "autoencoder": "autoencoder:AutoencoderTask",
        "decoder": "decoder:DecoderTask",
        "network": "network:NetworkTask",
        "one_step": "one_step:OneStepTask",
    }.items()
}
