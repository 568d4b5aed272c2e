"""The estimators, one a file; all are called ``loss(z1, z2, index)``."""

from torch_emc2.losses.base import ContrastiveLoss, Encode
from torch_emc2.losses.dcl import DCLLoss
from torch_emc2.losses.emc2 import EMC2Loss
from torch_emc2.losses.infonce import InfoNCELoss
from torch_emc2.losses.negative_cache import NegativeCacheLoss
from torch_emc2.losses.sogclr import SogCLRLoss

__all__ = ["ContrastiveLoss", "DCLLoss", "EMC2Loss", "Encode", "InfoNCELoss", "NegativeCacheLoss", "SogCLRLoss"]
