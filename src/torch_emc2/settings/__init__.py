"""What can be set: a dataclass for each group, which refuses what is no setting.

`torch_emc2.config` is made of them, and the modules that they are for read them. Nothing else of the package is
imported here, nor torch, which takes seconds: who gives a wrong word need not wait for it.
"""
