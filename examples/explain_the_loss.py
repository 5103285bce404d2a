"""The README's picture of the loss: a photograph, one pixel of it, and that pixel's graph in the truth, in bicubic, in a result.

    python examples/explain_the_loss.py        # writes docs/images/self_similarity.png and the example of `sslsr explore`

The photograph is one that the shipped model did not see in training (examples/SOURCES.md); it is shrunk to a quarter and
enlarged again by bicubic and by that model. Run from the root of a checkout with the package installed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslsr_diffusion import laplacian_edge_mask, open_upscaler, self_similarity_graph
from sslsr_diffusion.evaluation.fidelity import ssg_l1
from sslsr_diffusion.evaluation.scoring import load_rgb
from sslsr_diffusion.images import Image, resize_bicubic, to_array, to_tensor, write_image
from sslsr_diffusion.page.explorer import EXAMPLE

PHOTOGRAPH = Path("examples/photos/validation/fig.jpg")
PART = (160, 60, 544, 444)  # left, top, right, bottom
PICTURE = Path("docs/images/self_similarity.png")
PIXEL = (192, 116)  # x, y: an edge pixel of the rind, one of those where the result comes nearest to the truth
SCALE, REACH, AROUND = 4, 12, 40  # enlargement, half a search area, half the part that is shown


def main() -> None:
    left, top, right, bottom = PART
    truth = load_rgb(PHOTOGRAPH)[..., top:bottom, left:right]
    height, width = (side // SCALE for side in truth.shape[-2:])
    low = eight_bits(resize_bicubic(truth, (height, width)))
    result = open_upscaler("small-v4")(low, scale=SCALE, generator=torch.Generator().manual_seed(0), output_type="pt").images
    pictures = {"truth": truth, "bicubic": resize_bicubic(low, (truth.shape[-2], truth.shape[-1])), "result": result}
    pictures = {name: eight_bits(picture) for name, picture in pictures.items()}
    for name, picture in {"truth": truth, "lr": low, "result": pictures["result"]}.items():
        write_image(EXAMPLE / f"{name}.png", Image(to_array(picture[0])))
    draw(pictures)


def eight_bits(picture: Tensor) -> Tensor:
    return to_tensor(to_array(picture[0]))[None]


def draw(pictures: dict[str, Tensor]) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    x, y = PIXEL
    mask = torch.zeros_like(pictures["truth"][:, :1], dtype=torch.bool)
    mask[..., y, x] = True
    assert laplacian_edge_mask(pictures["truth"])[..., y, x].all(), "the loss does not look at this pixel; choose another"
    graphs = {name: self_similarity_graph(picture, mask)[0].reshape(25, 25).numpy() for name, picture in pictures.items()}
    beside = np.arange(25**2).reshape(25, 25) != 25**2 // 2
    top = max(graph[beside].max() for graph in graphs.values())
    figure, axes = plt.subplots(2, 4, figsize=(11, 6.3), layout="constrained", width_ratios=(1.5, 1, 1, 1))
    whole, note = axes[:, 0]
    whole.imshow(to_array(pictures["truth"][0]))
    whole.add_patch(Rectangle((x - AROUND, y - AROUND), 2 * AROUND, 2 * AROUND, fill=False, color="white", linewidth=1.5))
    whole.set_title("photograph")
    note.text(0, 0.98, TEXT, va="top", fontsize=9.5, linespacing=1.5)
    for (name, picture), (above, below) in zip(pictures.items(), axes[:, 1:].T, strict=True):
        above.imshow(to_array(picture[0])[y - AROUND : y + AROUND, x - AROUND : x + AROUND], interpolation="nearest")
        for half, colour in ((REACH + 0.5, "white"), (4.5, "#ff3b30")):
            above.add_patch(Rectangle((AROUND - half, AROUND - half), 2 * half, 2 * half, fill=False, color=colour, linewidth=1.5))
        here, everywhere = (
            1e3 * float(each) for each in (np.abs(graphs[name] - graphs["truth"]).mean(), ssg_l1(picture, pictures["truth"]))
        )
        far = "" if name == "truth" else f"L1 {here:.2f}e-3 at this pixel,\n{everywhere:.2f}e-3 over the picture"
        above.set_title(name)
        below.imshow(graphs[name], vmin=0, vmax=top, cmap="viridis")
        below.set_title("its graph")
        below.text(0.5, -0.03, far, transform=below.transAxes, ha="center", va="top", fontsize=9.5)
    for axis in axes.flat:
        axis.axis("off")
    figure.savefig(PICTURE, dpi=100)


TEXT = """Red: the patch of one edge pixel, 9 x 9.
White: where the loss looks, 25 x 25.

Each square of a graph is one place:
bright where the patch there is like
the red one. The loss pulls the graph of
a result towards that of the truth."""

if __name__ == "__main__":
    main()
