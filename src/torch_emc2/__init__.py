"""The gradient of the global contrastive loss at the price of an in-batch one."""

from torch_emc2 import exact
from torch_emc2.chunked import cached_backward
from torch_emc2.kernels import metropolis
from torch_emc2.losses import ContrastiveLoss, DCLLoss, EMC2Loss, InfoNCELoss, NegativeCacheLoss, SogCLRLoss
from torch_emc2.temperature import Temperature

__version__ = "0.1.0"

__all__ = [
    "ContrastiveLoss",
    "DCLLoss",
    "EMC2Loss",
    "InfoNCELoss",
    "NegativeCacheLoss",
    "SogCLRLoss",
    "Temperature",
    "cached_backward",
    "exact",
    "metropolis",
]
