"""A graph as an ONNX file that takes pictures of any size, kept only if onnxruntime makes of it what torch makes."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.tasks.graph import Graph

OPSET = 18
TRACED, OTHERS = (2, 3), ((3, 2), (4, 5))  # sides in steps of Graph.example: what is traced, and what is compared
TOLERANCE = 1e-3  # of pixels in [0, 1]: a quarter of an 8-bit step
LARGEST = 2**30  # bytes of weights that still lie in the file itself: it may have 2 GiB


@torch.no_grad()
def write_onnx(graph: Graph, folder: Path) -> list[str]:
    """Write NAME.onnx, and for large weights NAME.onnx.data, into a folder; sentences on what it takes.

    Raises:
        UserError: the networks cannot be one graph of any size, or the graph makes another picture.
        MissingDependency: an extra package is missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise MissingDependency(f"onnx: needs onnxruntime and onnxscript ({error}): pip install 'sslsr-diffusion[onnx]'") from None
    path, module = folder / f"{graph.name}.onnx", graph.module.eval()
    _trace(graph, module, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for sides in OTHERS:
        example = graph.example(*sides)
        try:
            (got,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(graph.inputs, example)})
        except Exception as error:  # onnxruntime's, where a shape was written down as it was traced
            raise _refused(error) from error
        want = module(*example)
        apart = float((torch.from_numpy(got) - want).abs().max()) if got.shape == tuple(want.shape) else float("inf")
        if not apart <= TOLERANCE:
            size = " x ".join(str(side) for side in example[0].shape[2:])
            raise UserError(f"onnx: expected torch's picture to {TOLERANCE} at {size}, got {apart:.2g}; leave it out, and report it.")
    takes = f"multiples of {graph.unit}" if graph.unit > 1 else "any"
    ends = f"from {graph.least}" + (f" to {graph.most}" if graph.most else "")
    return [f"{path.name}: {', '.join(graph.inputs)}, sides {takes}, {ends}; opset {OPSET}, float32"]


def _trace(graph: Graph, module: nn.Module, path: Path) -> None:
    least, most = -(-graph.least // graph.unit), graph.most // graph.unit or None
    height, width = (torch.export.Dim(name, min=least, max=most) for name in ("height", "width"))
    each = [graph.unit // per for _, per in graph.inputs.values()]  # pixels of this input per unit
    try:
        with _quiet():
            torch.onnx.export(
                module,
                graph.example(*TRACED),
                path,
                input_names=list(graph.inputs),
                output_names=["restored"],
                dynamic_shapes=tuple({2: n * height, 3: n * width} if n > 1 else {2: height, 3: width} for n in each),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                external_data=sum(p.numel() * p.element_size() for p in module.parameters()) > LARGEST,
            )
    except Exception as error:  # each of its steps has errors of its own
        raise _refused(error) from error


def _refused(error: Exception) -> UserError:
    reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
    return UserError(f"onnx: these networks cannot be one graph of any size ({reason}); leave it out.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells what it lowers and optimises, which is no matter of the user's."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "torch.export", "onnxscript", "onnx_ir"))}
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
