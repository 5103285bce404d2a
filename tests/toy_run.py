"""Runs a toy job as a script, for tests that need processes: toy_run.py RUN_FOLDER JSON_OF_TRAINING_SETTINGS [--resume]

Beside training settings the JSON may hold `max_timestep`, `gan`, `checkpoints`, `decode_crop` and `validation`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from toys import toy_job, toy_losses, toy_validation

from sslsr_diffusion.losses.gan import GANLoss, GANSettings
from sslsr_diffusion.training import outputs
from sslsr_diffusion.training.loop import train_job
from sslsr_diffusion.training.settings import CheckpointSettings


def main() -> None:
    run, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    outputs.plot_losses = lambda history, path: path.touch()  # drawing takes longer than the steps
    losses = toy_losses(max_timestep=options.pop("max_timestep", None))
    if "gan" in options:
        losses.append(GANLoss(GANSettings(**options.pop("gan"))))
    checkpoints = CheckpointSettings(**options.pop("checkpoints", {"every": 0}))
    validation = toy_validation(**options.pop("validation")) if "validation" in options else None
    job = toy_job(run, losses=losses, dropout=0, decode_crop=options.pop("decode_crop", None), **options)
    train_job(replace(job, checkpoints=checkpoints, validation=validation), resume="latest" if "--resume" in sys.argv else None)
    print("threads:", *(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")))


if __name__ == "__main__":
    main()
