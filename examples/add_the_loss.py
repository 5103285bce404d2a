"""Adds the self-similarity loss to a plain PyTorch loop. Needs torch, numpy and numba (or CuPy on a GPU); no diffusers."""

import torch

from sslsr_diffusion.ops import SelfSimilarityLoss, apply_mask_stride, laplacian_edge_mask

torch.manual_seed(0)
hr = torch.nn.functional.interpolate(torch.rand(2, 3, 12, 12), size=(48, 48))  # your pictures: [B, 3, H, W] in [0, 1], not [-1, 1]
lr = torch.nn.functional.interpolate(hr, scale_factor=0.5, mode="bicubic", antialias=True)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 5, padding=2), torch.nn.PixelShuffle(2))  # your network
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
ssl = SelfSimilarityLoss(l1_weight=1000, kl_weight=1000)  # published recipes: 500 to 1000, as the means run over rows * 625 entries

for step in range(5):
    sr = net(lr)  # not clamped
    mask = laplacian_edge_mask(hr)  # the pixels whose self-similarity counts; masks may come from anywhere
    rows = apply_mask_stride(mask, ssl.mask_stride).sum().float()  # as many as the loss will look at
    if torch.distributed.is_initialized():  # DDP averages gradients: with the mean number of rows, N processes equal one big batch
        torch.distributed.all_reduce(rows)
        rows /= torch.distributed.get_world_size()
    loss = (sr - hr).abs().mean() + ssl(sr, hr, mask, num_rows=rows)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}")
