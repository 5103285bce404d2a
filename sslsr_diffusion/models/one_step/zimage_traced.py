"""Z-Image's network for one picture and one text in real numbers and tensor arithmetic alone, so that one graph holds for every size.

diffusers pads the tokens of picture and text to multiples of 32 by Python integers, and turns queries and keys by complex numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MULTIPLE = 32  # of tokens


def traced(network: Any, zt: Tensor, t: Tensor, text: Tensor, patch: int) -> Tensor:
    """What `network` says, float32.

    A picture always gets 31 tokens of padding, and attention sees as many of them as diffusers would have put there.

    Args:
        zt: [1, C, h, w]; both sides are multiples of `patch`.
        t: [1], 1 - sigma.
        text: [1, L, D].
    """
    _, channels, height, width = zt.shape
    rows, columns, padding = height // patch, width // patch, -text.shape[1] % MULTIPLE
    count, words = rows * columns, text.shape[1] + padding
    time, first, second, third = network.t_embedder(t * network.t_scale), *_turns(network.rope_embedder)

    patches = zt.reshape(channels, rows, patch, columns, patch).permute(1, 3, 2, 4, 0).reshape(1, count, -1)
    tokens = torch.cat([network.all_x_embedder[f"{patch}-1"](patches), network.x_pad_token.expand(1, MULTIPLE - 1, -1)], dim=1)
    seen = (torch.arange(count + MULTIPLE - 1) < count + -count % MULTIPLE)[None, None, None]
    grid = torch.cat([each.expand(rows, columns, -1, -1) for each in (first[words + 1], second[:rows, None], third[:columns])], dim=2)
    origin = torch.cat([first[0], second[0], third[0]]).expand(MULTIPLE - 1, -1, -1)
    turns = torch.cat([grid.flatten(0, 1), origin])

    context = torch.cat([network.cap_embedder(text), network.cap_pad_token.expand(1, padding, -1)], dim=1)
    context_turns = torch.cat([first[1 : words + 1], second[:1].expand(words, -1, -1), third[:1].expand(words, -1, -1)], dim=1)

    with _real(network):
        for block in network.noise_refiner:
            tokens = block(tokens, seen, turns, time)
        for block in network.context_refiner:
            context = block(context, None, context_turns)
        tokens, turns = torch.cat([tokens, context], dim=1), torch.cat([turns, context_turns])
        seen = torch.cat([seen, seen.new_ones(1, 1, 1, words)], dim=3)
        for block in network.layers:
            tokens = block(tokens, seen, turns, time)
    pred = network.all_final_layer[f"{patch}-1"](tokens, c=time)[:, :count]
    return pred.reshape(rows, columns, patch, patch, channels).permute(4, 0, 2, 1, 3).reshape(zt.shape)


def _turns(embedder: Any) -> list[Tensor]:
    """For each axis (cos, sin) of position / theta^(2 k / D), [positions, D/2, 2], rounded where diffusers' table is."""
    tables = []
    for width, length in zip(embedder.axes_dims, embedder.axes_lens, strict=True):
        rates = embedder.theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.outer(torch.arange(length, dtype=torch.float64), rates).float()
        tables.append(torch.stack([angles.cos(), angles.sin()], dim=-1))
    return tables


@contextmanager
def _real(network: Any) -> Iterator[None]:
    """Within, the network's attention is `_Attention`."""
    layers = [block.attention for blocks in (network.noise_refiner, network.context_refiner, network.layers) for block in blocks]
    own = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.processor = _Attention()
        yield
    finally:
        for layer, processor in zip(layers, own, strict=True):
            layer.processor = processor


class _Attention:
    """A processor of diffusers; blocks give it `freqs_cis` by that name: [L, D/2, 2] of a head, (cos, sin)."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: None, attention_mask: Tensor | None, freqs_cis: Tensor
    ) -> Any:
        query, key, value = (layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key = (_turned(norm(each) if norm else each, freqs_cis) for norm, each in ((attn.norm_q, query), (attn.norm_k, key)))
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        heads = F.scaled_dot_product_attention(query, key, value, attention_mask)
        return attn.to_out[0](heads.transpose(1, 2).flatten(2))


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, a sin + b cos) for neighbours of the last dimension; x: [1, L, heads, D]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns[:, None].unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
