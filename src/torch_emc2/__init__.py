"""The gradient of the global contrastive loss at the price of an in-batch one."""

__version__ = "0.1.0"
