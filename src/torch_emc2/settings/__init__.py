"""What can be set, a dataclass a group that refuses what is no setting.

Here is what both `torch_emc2.config` and the rooms that it is of read. Nothing of the package is imported, nor torch,
which takes seconds: who gives a wrong word need not wait for it.
"""
