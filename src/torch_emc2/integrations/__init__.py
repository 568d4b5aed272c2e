"""Losses that go where other libraries' own losses go, in those libraries' trainers."""
