"""Seeds as a function of what they are for, so that a random draw needs no generator state to be saved."""

from __future__ import annotations

__all__ = ["mix"]

_MASK = (1 << 64) - 1


def mix(*keys: int) -> int:
    """Hash integers to 64 bits whose low 32 (all that torch's CPU generator uses) are well mixed (splitmix64's finaliser)."""
    state = 0
    for key in keys:
        state = (state + (key & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state
