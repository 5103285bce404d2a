"""Scores: PSNR, SSIM, NIQE and the SSG distance in the core, the learned metrics through pyiqa, and the report over them."""

from sslsr_diffusion.evaluation.metrics import METRICS, Metric, psnr, ssim

__all__ = ["METRICS", "Metric", "psnr", "ssim"]
