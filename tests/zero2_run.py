"""toy_run.py under DeepSpeed's engine on the CPU, started by torchrun with ACCELERATE_USE_DEEPSPEED=true and DS_ACCELERATOR=cpu.

accelerate 1.15 counts one process when there is no accelerator and DeepSpeed is asked for, so the processes are counted here.
"""

from __future__ import annotations

import deepspeed
import torch.distributed as dist
import toy_run
from accelerate import DistributedType, PartialState


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs two minutes of a C++ compiler; gloo does the same
    deepspeed.comm.init_distributed(dist_backend="gloo")
    PartialState()
    PartialState._shared_state.update(
        num_processes=dist.get_world_size(),
        process_index=dist.get_rank(),
        local_process_index=dist.get_rank(),
        distributed_type=DistributedType.DEEPSPEED,
        backend="gloo",
    )
    toy_run.main()


if __name__ == "__main__":
    main()
