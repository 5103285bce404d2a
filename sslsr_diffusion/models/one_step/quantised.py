"""What bitsandbytes holds the frozen linear layers of a network in, in bytes."""

from collections.abc import Callable

from torch import nn

# n weights in r rows; scales in float32
BYTES: dict[str, Callable[[int, int], int]] = {
    "int8": lambda n, r: n + 4 * r,  # one scale per row   (Dettmers et al., NeurIPS 2022, LLM.int8)
    "nf4": lambda n, r: -(-n // 2) + 4 * -(-n // 64),  # one per 64 weights   (Dettmers et al., NeurIPS 2023, QLoRA, quantised once)
}


def saved_bytes(network: nn.Module, weights: str) -> int:
    """How much less than its shapes the network takes, whose frozen linear layers are held in `weights`, one of BYTES.

    While a layer computes, its weights are there in bfloat16, too: the largest such copy is taken off.
    """
    layers = [layer.weight for layer in network.modules() if isinstance(layer, nn.Linear) and not layer.weight.requires_grad]
    held = sum(BYTES[weights](weight.numel(), weight.shape[0]) for weight in layers)
    shapes = sum(weight.numel() * weight.element_size() for weight in layers)
    return shapes - held - max((2 * weight.numel() for weight in layers), default=0)
