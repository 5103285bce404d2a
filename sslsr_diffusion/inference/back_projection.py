"""Back projection: what a restored picture, reduced again, lacks of its input is put back   (Irani & Peleg, CVGIP 1991)."""

from torch import Tensor

from sslsr_diffusion.images import resize_bicubic
from sslsr_diffusion.inference.resampling import bicubic_taps

REACH = 5  # low-resolution pixels, at most, that a pixel of an enlarged picture follows from to each side: two and a bit of each kernel


def back_projection(restored: Tensor, low: Tensor, share: float) -> Tensor:
    """restored + share enlarge(low - reduce(restored)), both by `resize_bicubic`: one step of the iteration.

    Args:
        restored: [B, 3, H, W] float32 in [0, 1]; changed in place and returned, not clamped.
        low: [B, 3, h, w], the same pictures before.
        share: 0 (nothing is put back) to 1 (all of it, the input's noise and blur among it).
    """
    if share == 0:
        return restored
    lacking = low.to(restored) - resize_bicubic(restored, (low.shape[-2], low.shape[-1]))
    return restored.add_(resize_bicubic(lacking, (restored.shape[-2], restored.shape[-1])), alpha=share)


class BandProjection:
    """`back_projection` of a picture that is made in bands of rows."""

    def __init__(self, low: Tensor, size: tuple[int, int], share: float) -> None:
        """`low` [1, 3, h, w]; `size` (H, W) of the restored picture."""
        self._low, self._share = low, share
        self._reduce = bicubic_taps(size, (low.shape[-2], low.shape[-1]))
        self._enlarge = bicubic_taps((low.shape[-2], low.shape[-1]), size)

    def seen(self, top: int, bottom: int) -> tuple[int, int]:
        """The rows of the restored picture that a band from `top` to before `bottom` follows from."""
        if self._share == 0:
            return top, bottom
        first, last = self._reduce[0].at(*self._enlarge[0].at(top, bottom).span).span
        return min(first, top), max(last, bottom)

    def __call__(self, rows: Tensor, first: int, top: int, bottom: int) -> Tensor:
        """[1, 3, bottom - top, W], of `rows` that begin with row `first` and hold what is `seen`."""
        band = rows[..., top - first : bottom - first, :].clone()
        if self._share == 0:
            return band
        (reduce_rows, reduce_columns), (enlarge_rows, enlarge_columns) = self._reduce, self._enlarge
        above, below = enlarge_rows.at(top, bottom).span
        reduced = reduce_columns.of(reduce_rows.at(above, below).of(rows, -2, first), -1)
        lacking = self._low[..., above:below, :].to(rows) - reduced
        return band.add_(enlarge_columns.of(enlarge_rows.at(top, bottom).of(lacking, -2, above), -1), alpha=self._share)
