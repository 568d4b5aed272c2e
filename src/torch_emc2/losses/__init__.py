"""The estimators, all called ``loss(x, y, index)``."""

from torch_emc2.losses.base import ContrastiveLoss
from torch_emc2.losses.emc2 import EMC2Loss
from torch_emc2.losses.encode import Encode
from torch_emc2.losses.in_batch import DCLLoss, InfoNCELoss
from torch_emc2.losses.momentum import MomentumLoss, ema_decay
from torch_emc2.losses.negative_cache import NegativeCacheLoss
from torch_emc2.losses.sogclr import SogCLRLoss, cosine_gamma
from torch_emc2.losses.uniformity import UniformityLoss

__all__ = [
    "ContrastiveLoss",
    "DCLLoss",
    "EMC2Loss",
    "Encode",
    "InfoNCELoss",
    "MomentumLoss",
    "NegativeCacheLoss",
    "SogCLRLoss",
    "UniformityLoss",
    "cosine_gamma",
    "ema_decay",
]
