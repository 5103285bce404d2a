"""OpenCV with one thread: a process that forks after OpenCV has started its thread pool leaves workers that hang at their first call."""

from __future__ import annotations

import functools
from types import ModuleType


@functools.cache
def opencv() -> ModuleType:
    """The cv2 module, told to use one thread; the loader's parallelism is its workers."""
    import cv2

    cv2.setNumThreads(1)
    return cv2
