"""Losses to use instead of other libraries' own losses, in those libraries' trainers."""
