"""The self-similarity operator, its loss and the edge mask. Needs torch and numpy alone; numba and CuPy are imported at first use."""

from sslsr_diffusion.ops.edge_mask import apply_mask_stride, laplacian_edge_mask
from sslsr_diffusion.ops.settings import BackendUnavailable
from sslsr_diffusion.ops.ssg import self_similarity_graph
from sslsr_diffusion.ops.ssg_loss import SelfSimilarityLoss

__all__ = ["BackendUnavailable", "SelfSimilarityLoss", "apply_mask_stride", "laplacian_edge_mask", "self_similarity_graph"]
