"""What can be set, a dataclass a group that refuses what is no setting: without torch, whose import takes seconds."""
