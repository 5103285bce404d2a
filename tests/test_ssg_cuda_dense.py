"""How the CUDA loss by tiles is laid out, and where it is used; needs no GPU. Values: test_kernels_dense.py, test_ssg_cuda.py."""

from __future__ import annotations

import pytest
import torch

from sslsr_diffusion.ops.ssg_cuda_dense import dense_geometry
from sslsr_diffusion.ops.ssg_cuda_launch import SLOT_BYTES


@pytest.mark.parametrize("shape", [(1, 3, 512, 512), (8, 3, 512, 512), (1, 1, 64, 64), (1, 3, 13, 14), (64, 3, 64, 64)])
@pytest.mark.parametrize("slot_bytes", [1, 2**20, SLOT_BYTES])
def test_geometry_of_dense_tiles(shape, slot_bytes):
    dense = dense_geometry(torch.Size(shape), 25, 9, slot_bytes)
    tiling = dense.tiling
    launches = list(tiling.launches())
    assert (tiling.tile_h, tiling.tile_w) == (32, 24)
    assert tiling.tiles == shape[0] * -(-shape[2] // 32) * -(-shape[3] // 24)
    assert [tile for launch in launches for tile in launch] == list(range(tiling.tiles))
    assert 1 <= dense.gradient_splits <= dense.splits <= 25
    assert tiling.slot_floats == dense.gradient_splits * shape[1] * 56 * 48
    if max(map(len, launches)) > 1:
        assert max(map(len, launches)) * tiling.slot_floats * 4 <= slot_bytes
    assert dense.pull_bytes <= 48 * 1024  # fits any GPU, and need not be asked for


def test_which_sizes_have_a_dense_path():
    def geometry(search, window, channels):
        return dense_geometry(torch.Size((1, channels, 64, 64)), search, window)

    assert geometry(25, 1, 3) is geometry(31, 17, 3) is geometry(25, 9, 5) is None
    shares = [geometry(25, window, 3).least / (32 * (33 - window)) for window in (3, 5, 7, 9, 11, 13, 15)]
    assert 1 > shares[0] > shares[-1] > 0
    assert shares == sorted(shares, reverse=True)  # the larger the window, the more there is to share
