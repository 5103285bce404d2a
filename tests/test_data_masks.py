"""Masks of training samples: every kind, and a user's own files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import from_folder, open_small, picture, take, write_photos
from PIL import Image

from sslsr_diffusion.ops.edge_mask import laplacian_edge_mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize("kind", ["laplacian", "laplacian_abs", "sobel", "canny", "all", "random"])
def test_mask_kinds_and_cap(folder, kind):
    batch = next(open_small(from_folder(folder, mask={"kind": kind})))
    assert batch.mask.any()
    capped = next(open_small(from_folder(folder, mask={"kind": kind, "max_pixels": 25})))
    assert capped.mask.sum(dim=(1, 2, 3)).max() <= 25
    assert not (capped.mask & ~batch.mask).any()


@pytest.mark.parametrize("suffix", [".mat", ".png", ".npy"])
def test_mask_files_follow_crop_and_flip(folder, tmp_path, suffix):
    from scipy.io import savemat

    for path in folder.rglob("*.png"):
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
        mask = laplacian_edge_mask(image)[0, 0].numpy()
        if suffix == ".mat":
            savemat(tmp_path / f"{path.stem}.mat", {"mat": mask.astype(int)}, do_compression=True)
        elif suffix == ".npy":
            np.save(tmp_path / f"{path.stem}.npy", mask)
        else:
            Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"{path.stem}.png")
    batches = take(open_small(from_folder(folder, mask={"kind": "files", "folder": str(tmp_path)})), 6)
    for batch in batches:
        inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # at the crop's border the file knows the neighbours
        assert torch.equal(batch.mask[inner], laplacian_edge_mask(batch.hr)[inner])


def test_masks_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for scene, value in (("a", 0), ("b", 255)):
        (tmp_path / "photos" / scene).mkdir(parents=True)
        (tmp_path / "masks" / "png" / scene).mkdir(parents=True)
        Image.fromarray(picture((64, 64), 1)).save(tmp_path / "photos" / scene / "0001.png")
        Image.fromarray(np.full((64, 64), value, np.uint8)).save(tmp_path / "masks" / "png" / scene / "0001.png")
    data = from_folder(tmp_path / "photos", mask={"kind": "files", "folder": str(tmp_path / "masks")})
    seen = {Path(name).parent.name: float(mask.float().mean()) for b in take(open_small(data), 4) for name, mask in zip(b.names, b.mask)}
    assert seen == {"a": 0.0, "b": 1.0}
    (tmp_path / "photos" / "0001.png").write_bytes((tmp_path / "photos" / "a" / "0001.png").read_bytes())
    loader = open_small(data)
    take(loader, 4)
    assert any("several masks have its name" in text for text in loader.problems())


def test_mask_files_that_do_not_fit_are_named(folder, tmp_path):
    for path in list(folder.rglob("*.png")):
        np.save(tmp_path / f"{path.stem}.npy", np.ones((5, 5)) if path.stem == "p1" else np.ones(Image.open(path).size[::-1]))
    (tmp_path / "p2.npy").unlink()
    (tmp_path / "p3.npy").write_bytes(b"damaged")
    loader = open_small(from_folder(folder, mask={"kind": "files", "folder": str(tmp_path)}))
    names = {Path(name).stem for batch in take(loader, 14) for name in batch.names}
    assert names == {"p0", "p4", "p5", "p6"}
    text = "\n".join(loader.problems())
    assert "no mask named p2" in text
    assert "its mask p1.npy has 5x5" in text
    assert "p3.npy: cannot be read as a mask" in text
