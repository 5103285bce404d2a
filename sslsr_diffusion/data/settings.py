"""The `data` section of a recipe."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sslsr_diffusion.config import Settings
from sslsr_diffusion.data.degradation import DegradationSettings
from sslsr_diffusion.data.draws import Probability


class _Source(Settings):
    weight: float = Field(1.0, gt=0, description="Share of the samples, relative to the weights of the other sources.")


class FolderSource(_Source):
    """Every picture of a folder, whatever its format."""

    kind: Literal["folder"] = "folder"
    path: str = Field(description="A folder, a single picture, or a pattern such as photos/*.jpg; relative to the current directory.")
    recursive: bool = Field(True, description="Also look into the folders below.")


class FilesSource(_Source):
    """A text file that lists pictures."""

    kind: Literal["files"] = "files"
    path: str = Field(description="UTF-8 text with one picture per line, relative to that file; empty lines and # lines do not count.")


class PairsSource(_Source):
    """Real pairs: two folders whose files belong together by their names without suffix. They are not degraded further."""

    kind: Literal["pairs"] = "pairs"
    path: str = Field(description="A folder with the two folders below in it.")
    hr: str = Field("hr", description="The folder of high-resolution pictures, below path (or absolute).")
    lr: str = Field("lr", description="The folder of low-resolution pictures, below path (or absolute).")


class CFWSource(_Source):
    """Samples of `sslsr prepare cfw`, for the task decoder: hr/, lr/ and latents/ below path. Neither cropped nor mirrored."""

    kind: Literal["cfw"] = "cfw"
    path: str = Field(description="The folder that `sslsr prepare cfw` wrote.")


class _TableSource(_Source):
    column: str = Field("image", description="The column that holds the (high-resolution) pictures.")
    lr_column: str | None = Field(None, description="The column of the low-resolution partners, where the rows are real pairs.")
    name_column: str | None = Field(None, description="The column of file names, to find mask files by; default: as stored with them.")
    streaming: bool = Field(False, description="Read on the fly in the stream's order instead of copying everything first.")
    shuffle_window: int = Field(256, ge=1, description="Streams only: so many neighbouring rows are handed out in random order.")


class HubSource(_TableSource):
    """A data set of the Hugging Face hub, or a local folder that `datasets` can load."""

    kind: Literal["hub"] = "hub"
    path: str = Field(description="Id of the data set, for example user/photos.")
    name: str | None = Field(None, description="Which configuration of the data set.")
    split: str = Field("train", description="Which split.")
    revision: str | None = Field(None, description="Branch, tag or commit.")


class ParquetSource(_TableSource):
    """Parquet files with a column of encoded pictures."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(description="A file, a folder or a pattern such as shards/*.parquet; a URL works with streaming.")


class WebdatasetSource(_Source):
    """Pictures in tar files (webdataset shards); local shards are indexed once and read at random."""

    kind: Literal["webdataset"] = "webdataset"
    path: str = Field(description="A .tar file, a folder or a pattern such as shards/*.tar; URLs need streaming.")
    streaming: bool = Field(False, description="Read on the fly in the stream's order, for shards behind URLs.")
    column: str | None = Field(None, description="Only the files with this suffix, jpg for example; null: every picture.")
    shuffle_window: int = Field(256, ge=1, description="Streams only: so many neighbouring pictures are handed out in random order.")


RowSource = HubSource | ParquetSource | WebdatasetSource  # what the library `datasets` may read
Source = Annotated[FolderSource | FilesSource | PairsSource | CFWSource | RowSource, Field(discriminator="kind")]


class MaskSettings(Settings):
    """Which pixels enter the self-similarity loss."""

    kind: Literal["laplacian", "laplacian_abs", "sobel", "canny", "all", "random", "files"] = Field(
        "laplacian", description="How the mask is made from the high-resolution crop; files: read from `folder`."
    )
    threshold: float = Field(20.0, ge=0, le=2040, description="Grey levels (0 to 255); for canny the upper one, the lower one is half.")
    density: Probability = Field(0.1, description="For random: share of the pixels.")
    folder: str | None = Field(None, description="For files: .mat (key mat), .png or .npy files named as the pictures, of the same size.")
    max_pixels: int | None = Field(None, ge=1, description="At most so many per crop, chosen at random, so that memory is bounded.")

    @model_validator(mode="after")
    def _folder_goes_with_files(self) -> Self:
        if (self.kind == "files") != (self.folder is not None):
            raise ValueError("mask: expected a folder exactly when kind is files")
        return self


class CropSettings(Settings):
    """Where a crop is taken and how it is turned."""

    kind: Literal["random", "edge_aware"] = Field("random", description="edge_aware: of several places take the first with enough edges.")
    tries: int = Field(8, ge=1, le=64, description="For edge_aware: how many places are looked at; the last one is taken in any case.")
    least_density: Probability = Field(0.01, description="For edge_aware: share of masked pixels that is enough.")
    hflip: bool = Field(True, description="Mirror left to right with probability 1/2.")
    rotate: bool = Field(False, description="Also mirror top to bottom and transpose, each with probability 1/2.")


class DataSettings(Settings):
    """Training and validation data."""

    sources: list[Source] = Field([], description="Where training pictures come from.")
    validation: list[Source] = Field([], description="Where validation pictures come from; keep them apart from the training pictures.")
    degradation: DegradationSettings = Field(DegradationSettings(), description="How low-resolution partners are made; pairs have theirs.")
    teacher: str | None = Field(
        None,
        description="An upscaler by any name that --model takes: what it makes of the low-resolution crops is trained towards in the place "
        "of the high-resolution ones (distillation). null: those. Validation keeps the true pictures.",
    )
    teacher_anchor: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of what the teacher's picture, reduced, gets wrong that is taken back: t + anchor * enlarge(reduce(hr) - "
        "reduce(t)). 0: its picture as it is; 1: its detail on nearly the true low resolution.",
    )
    mask: MaskSettings = Field(MaskSettings(), description="Which pixels enter the self-similarity loss.")
    crop: CropSettings = Field(CropSettings(), description="Where crops are taken.")
    small_images: Literal["reflect", "skip"] = Field("reflect", description="What happens to pictures smaller than the crop.")
    workers: int = Field(2, ge=0, description="Processes that read and degrade; 0: the training process does it itself.")
    prefetch: int = Field(2, ge=1, description="Batches that each worker prepares ahead.")
    start_method: Literal["fork", "spawn", "forkserver"] | None = Field(
        None, description="How workers start; default: the platform's way, on Linux fork, from Python 3.14 on forkserver."
    )

    @model_validator(mode="after")
    def _a_pool_needs_an_index(self) -> Self:
        streams = [s.path for s in self.sources if getattr(s, "streaming", False)]
        if self.degradation.pool_size and streams:
            where = f"a pool cannot be resumed with a stream ({streams[0]})"
            raise ValueError(f"degradation.pool_size: {where}; use pool_size 0 or streaming false")
        return self
