"""Pre-training an encoder, with Lightning: the step, the batches, and the run."""

from torch_emc2.training.batches import ContrastiveData
from torch_emc2.training.run import train
from torch_emc2.training.step import ContrastiveModule, build_loss

__all__ = ["ContrastiveData", "ContrastiveModule", "build_loss", "train"]
