"""Processes leave a finished run together: one that exits early cuts the connection under one that is still reading."""

from __future__ import annotations

import itertools
import time

import torch.distributed as dist

_runs = itertools.count()


def leave_together(patience: float = 30.0) -> None:
    """Wait until every process has finished its last collective call, at most `patience` seconds; alone, do nothing.

    gloo fails a receive that is posted after the sender has gone, although the data arrived. The rendezvous store
    answers each request on its own, so a count there has no such gap; its host leaves last.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return
    store, key = dist.distributed_c10d._get_default_store(), f"sslsr/left/{next(_runs)}"
    deadline = time.monotonic() + patience
    try:
        store.add(key, 1)
        while store.add(key, 0) < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(0.02)
    except RuntimeError:  # the store's host has gone, so everybody was counted
        return
    if dist.get_rank() == 0:
        time.sleep(0.2)
