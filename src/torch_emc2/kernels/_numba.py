"""The moves of both kernels, compiled for the CPU by numba: one pass over memory each, chance included.

A random number is a function of a key and a counter: whoever has both draws alike. The counter goes through the
finaliser "lowbias32" of Wellons, keyed before and between its rounds. A row of the batch has a key of its own, mixed
from that of the call by splitmix64's finaliser.

Metropolis: about every third proposal is accepted and none predictably, so a branch a step would cost more than all
else. So many rows walk in step, in the lanes of vector instructions: once forward, which finds what is accepted, and
once backward, which adds up the time from each acceptance to the next.

All that is compiled is in this one file: numba looks at a function's own file alone to tell whether its compiled form,
into which others have gone, is of today.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from torch_emc2.kernels.base import EMPTY, Move, Visit

__all__ = ["counters", "draw", "isir", "metropolis", "resamples", "shuffle"]

_WORTH_A_THREAD = 1 << 17  # steps
_LANES = 64


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function, once and for all where numba finds a folder that it may write."""

    def compile_(function: Callable[..., Any]) -> Any:
        settings = {"nogil": True, "error_model": "numpy", **options}
        try:
            return numba.njit(cache=True, **settings)(function)
        except RuntimeError:
            return numba.njit(**settings)(function)

    return compile_


@_compiled(inline="always")
def _bits(counter: Any, low: Any, high: Any) -> Any:
    """32 random bits of a key in two halves."""
    h = np.uint32(np.uint32(counter) * np.uint32(0x9E3779B1)) ^ low
    h = np.uint32((h ^ np.uint32(h >> np.uint32(16))) * np.uint32(0x21F0AAAD))
    h = np.uint32(h ^ np.uint32(h >> np.uint32(15)) ^ high)
    h = np.uint32(h * np.uint32(0x735A2D97))
    return np.uint32(h ^ np.uint32(h >> np.uint32(15)))


@_compiled(inline="always")
def _exponential(counter: Any, low: Any, high: Any) -> Any:
    """An Exp(1) number, float32: -log u by u's exponent and a polynomial of its mantissa, within 1e-6."""
    scaled = np.float32(np.int32(np.uint32(_bits(counter, low, high) >> np.uint32(1)))) + np.float32(0.5)  # u · 2^31
    raw = np.float32(scaled).view(np.int32)
    exponent = np.int32((raw >> np.int32(23)) - np.int32(127 + 31))
    t = np.float32(np.int32(raw & np.int32(0x7FFFFF))) * np.float32(2.0**-23)  # mantissa less 1
    p = np.float32(-0.0064535442)
    p = p * t + np.float32(0.0360884937)
    p = p * t + np.float32(-0.0953293897)
    p = p * t + np.float32(0.1676540711)
    p = p * t + np.float32(-0.2407338084)
    p = p * t + np.float32(0.3317990258)
    p = p * t + np.float32(-0.4998741238)
    p = p * t + np.float32(0.9999964239)
    return max(-(np.float32(exponent) * np.float32(0.6931471806) + p * t), np.float32(0.0))


@_compiled()
def _mixed(key: Any, row: Any) -> Any:
    """Key of a row of the whole batch, or of another purpose."""
    state = np.uint64(key) + np.uint64(row + 1) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@_compiled()
def _halves(key: Any) -> Any:
    return np.uint32(key & np.uint64(0xFFFFFFFF)), np.uint32(key >> np.uint64(32))


@_compiled()
def _below(limit: Any, counter: Any, key: Any) -> Any:
    """A whole number from 0 to ``limit`` - 1."""
    low, high = _halves(key)
    return np.int64((np.uint64(_bits(counter, low, high)) * np.uint64(limit)) >> np.uint64(32))


@_compiled(fastmath={"contract", "nsz"})
def _fill(out: Any, key: Any) -> None:
    low, high = _halves(key)
    for k in range(out.size):
        out[k] = _exponential(np.uint32(k), low, high)


@_compiled()
def _key_of(counters: Any, row: Any) -> Any:
    """Key of this rank's row number ``row``: that of its number in the whole batch, view by view."""
    row += np.int64(counters[1])
    local, start, size = np.int64(counters[2]), np.int64(counters[3]), np.int64(counters[4])
    return _mixed(counters[0], row // local * size + start + row % local)


@_compiled()
def _draw(counters: Any, out: Any) -> None:
    for row in range(len(out)):
        _fill(out[row], _key_of(counters, row))


@_compiled(fastmath={"contract", "nsz"})
def _accept(x: Any, counter: Any, low: Any, high: Any, at: Any, hit: Any) -> None:
    """Walk in each lane, a row, over proposals ``x`` (n, lanes), n a multiple of 4: ``hit`` says which are accepted."""
    n, lanes = hit.shape
    for k in range(0, n, 4):
        number = np.uint32(counter + k)
        for lane in range(lanes):
            now, lo, hi = at[lane], low[lane], high[lane]
            first = x[k, lane] + _exponential(number, lo, hi) > now
            now = x[k, lane] if first else now
            second = x[k + 1, lane] + _exponential(np.uint32(number + np.uint32(1)), lo, hi) > now
            now = x[k + 1, lane] if second else now
            third = x[k + 2, lane] + _exponential(np.uint32(number + np.uint32(2)), lo, hi) > now
            now = x[k + 2, lane] if third else now
            fourth = x[k + 3, lane] + _exponential(np.uint32(number + np.uint32(3)), lo, hi) > now
            at[lane] = x[k + 3, lane] if fourth else now
            hit[k, lane], hit[k + 1, lane], hit[k + 2, lane], hit[k + 3, lane] = first, second, third, fourth


@_compiled()
def _spend(hit: Any, clock: Any, after: Any, spent: Any) -> None:
    """Add to ``spent`` (n, lanes) the time from each acceptance to the next; ``after`` is left at the first one's."""
    n, lanes = hit.shape
    number = after.dtype.type  # a whole number times a float32 would be a float64
    for k in range(n - 4, -1, -4):
        for lane in range(lanes):
            then = after[lane]
            fourth = number(hit[k + 3, lane]) * (then - clock[k + 3, lane])
            then -= fourth
            third = number(hit[k + 2, lane]) * (then - clock[k + 2, lane])
            then -= third
            second = number(hit[k + 1, lane]) * (then - clock[k + 1, lane])
            then -= second
            first = number(hit[k, lane]) * (then - clock[k, lane])
            after[lane] = then - first
            spent[k + 3, lane] += fourth
            spent[k + 2, lane] += third
            spent[k + 1, lane] += second
            spent[k, lane] += first


@_compiled()
def _read(logits: Any, columns: Any, first: Any, x: Any) -> None:
    """Put the proposals of a set into the lanes, rows from the ``first`` on, in the order of the steps."""
    lanes = x.shape[1]
    for k in range(columns.size):
        of_rows = logits[columns[k], first : first + lanes]  # by number, each would be looked at for a sign
        for lane in range(lanes):
            x[k, lane] = of_rows[lane]


@_compiled()
def _write(spent: Any, share: Any, weights: Any, sets: Any, s: Any, first: Any) -> None:
    """Give a set's weights to its columns; those that are in all sets add up."""
    lanes, last = spent.shape[1], len(sets) - 1
    for k in range(sets.shape[1]):
        of_rows = weights[sets[s, k], first : first + lanes]
        if s > 0 and sets[0, k] == sets[last, k]:
            for lane in range(lanes):
                of_rows[lane] += spent[k, lane] * share[lane]
        else:
            for lane in range(lanes):
                of_rows[lane] = spent[k, lane] * share[lane]


@_compiled()
def _count_steps(logits: Any, columns: Any, first: Any, count: Any) -> None:
    zero, one = count.dtype.type(0), count.dtype.type(1)
    count[:] = zero
    for k in range(columns.size):
        of_rows = logits[columns[k], first : first + count.size]
        for lane in range(count.size):
            count[lane] += one if of_rows[lane] > -np.inf else zero


@_compiled()
def _wind(x: Any, burnt: Any, clock: Any, now: Any) -> None:
    """Count the counted steps before each, and in ``now`` all: the first ``burnt`` are not."""
    n, lanes = clock.shape
    zero, one = now.dtype.type(0), now.dtype.type(1)
    for lane in range(lanes):
        now[lane] = -burnt[lane]
    for k in range(n):
        for lane in range(lanes):
            clock[k, lane] = max(now[lane], zero)
            now[lane] += one if x[k, lane] > -np.inf else zero


@_compiled()
def _count(hit: Any, accepted: Any) -> None:
    for k in range(len(hit)):
        for lane in range(accepted.size):
            accepted[lane] += hit[k, lane]


@_compiled()
def _walk(
    logits: Any, sets: Any, carried_score: Any, keep_in: Any, counters: Any, burn_in: Any,
    weights: Any, carried_weights: Any, state: Any, acceptance: Any, begin: Any, end: Any,
) -> None:  # fmt: skip
    num_sets, n = sets.shape
    num_chains, kind, padded = carried_score.shape[1], logits.dtype, (n + 3) // 4 * 4
    lanes = 0
    for first in range(begin, end, _LANES):
        if lanes != min(_LANES, end - first):  # else the memory is there, and mapped
            lanes = min(_LANES, end - first)
            x, clock = np.full((padded, lanes), -np.inf, kind), np.empty((padded, lanes), kind)
            spent, hit = np.empty((padded, lanes), kind), np.empty((padded, lanes), np.uint8)
            # As one array's rows they would not become vectors.
            at, after = np.empty(lanes, kind), np.empty(lanes, kind)
            stop, share = np.empty(lanes, kind), np.empty(lanes, kind)
        low, high = np.empty(lanes, np.uint32), np.empty(lanes, np.uint32)
        for lane in range(lanes):
            low[lane], high[lane] = _halves(_key_of(counters, first + lane))
        burnt, accepted = np.empty((num_sets, lanes), kind), np.zeros(lanes, np.int32)
        share[:] = 0
        for s in range(num_sets):
            _count_steps(logits, sets[s], first, stop)
            for lane in range(lanes):
                burnt[s, lane] = np.floor(burn_in * stop[lane])
                share[lane] += stop[lane] - burnt[s, lane]
                acceptance[first + lane] += stop[lane] * num_chains
        for lane in range(lanes):
            share[lane] = 1 / (share[lane] * num_chains)
        for s in range(num_sets):
            _read(logits, sets[s], first, x)
            _wind(x, burnt[s], clock, stop)
            spent[:] = 0
            for chain in range(num_chains):
                at[:], after[:] = carried_score[first : first + lanes, chain], stop
                _accept(x, (s * num_chains + chain) * n, low, high, at, hit)
                _spend(hit, clock, after, spent)
                _count(hit, accepted)
                for lane in range(lanes):
                    carried_weights[first + lane, chain] += after[lane] * share[lane] * num_chains
                    if keep_in[first + lane, chain] == s:
                        last = n - 1
                        while last >= 0 and not hit[last, lane]:
                            last -= 1
                        state[first + lane, chain] = sets[s, last] if last >= 0 else -1
            _write(spent, share, weights, sets, s, first)
        for lane in range(lanes):
            acceptance[first + lane] = accepted[lane] / acceptance[first + lane]


@_compiled()
def _holds(ids: Any, one: Any) -> Any:
    found = 0
    for k in range(ids.size):
        found += ids[k] == one
    return found > 0


@_compiled(fastmath={"contract", "nsz"})
def _exponentiate(x: Any, peak: Any) -> None:
    """exp(x - peak) in each lane, in place; in float32 by a power of 2 and a polynomial, within 2e-7."""
    n, lanes = x.shape
    if x.itemsize == 8:
        for k in range(n):
            for lane in range(lanes):
                x[k, lane] = np.exp(x[k, lane] - peak[lane])
        return
    for k in range(n):
        for lane in range(lanes):
            t = max(np.float32(x[k, lane] - peak[lane]) * np.float32(1.4426950408889634), np.float32(-126))
            whole = np.int32(t)  # towards zero: t - whole is from -1 to 0
            f = t - np.float32(whole)
            p = np.float32(9.387879593e-04)
            p = p * f + np.float32(9.188611531e-03)
            p = p * f + np.float32(5.527972328e-02)
            p = p * f + np.float32(2.401721900e-01)
            p = p * f + np.float32(6.931422528e-01)
            p = p * f + np.float32(9.999999251e-01)
            power = np.float32(np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32))
            x[k, lane] = p * power if x[k, lane] > -np.inf else np.float32(0)


@_compiled()
def _sum_up(x: Any, peak: Any, mass: Any) -> None:
    """Exponentiate in place, relative to the ``peak`` of each lane, and sum up."""
    n, lanes = x.shape
    for lane in range(lanes):
        peak[lane], mass[lane] = -np.inf, 0
    for k in range(n):
        for lane in range(lanes):
            peak[lane] = x[k, lane] if x[k, lane] > peak[lane] else peak[lane]
    _exponentiate(x, peak)
    for k in range(n):
        for lane in range(lanes):
            mass[lane] += x[k, lane]


@_compiled()
def _place(masses: Any, beyond: Any, reached: Any, place: Any) -> None:
    """In each lane, the first mass with which the sum of all up to it reaches ``beyond``."""
    for lane in range(place.size):
        reached[lane] = 0
        place[lane] = 0
    for k in range(len(masses)):
        for lane in range(place.size):
            reached[lane] += masses[k, lane]
        for lane in range(place.size):
            place[lane] += np.int32(1) if reached[lane] < beyond[lane] else np.int32(0)


@_compiled()
def _resample(
    logits: Any, sets: Any, carried_score: Any, keep_in: Any, carried_ids: Any, column_ids: Any, private_ids: Any,
    counters: Any, weights: Any, carried_weights: Any, state: Any, acceptance: Any, begin: Any, end: Any,
) -> None:  # fmt: skip
    num_sets, n = sets.shape
    num_chains, kind = carried_score.shape[1], logits.dtype
    noise = np.empty(2 * num_chains, np.float32)
    ids = np.empty((num_sets, n), np.int64)
    for s in range(num_sets):
        for k in range(n):
            ids[s, k] = column_ids[sets[s, k]] if sets[s, k] < column_ids.size else EMPTY
    lanes = 0
    for first in range(begin, end, _LANES):
        if lanes != min(_LANES, end - first):
            lanes = min(_LANES, end - first)
            x, peak, mass = np.empty((n, lanes), kind), np.empty(lanes, kind), np.empty(lanes, kind)
            factor, reached, place = np.empty(lanes, kind), np.empty(lanes, kind), np.empty(lanes, np.int32)
        inside = np.empty((num_chains, lanes, num_sets), np.bool_)
        options, kept_in = np.empty((num_chains, lanes), np.int64), np.empty((num_chains, lanes), np.int64)
        uniform = np.empty((num_chains, lanes))
        for lane in range(lanes):
            row = first + lane
            _fill(noise, _key_of(counters, row))
            for chain in range(num_chains):
                one, count = carried_ids[row, chain], 0
                of_row = one == EMPTY or (private_ids.shape[1] > 0 and _holds(private_ids[row], one))
                for s in range(num_sets):
                    inside[chain, lane, s] = of_row or _holds(ids[s], one)
                    count += inside[chain, lane, s]
                # Those that hold it, or all: of the drawn set's number what is left is as fair a draw of them.
                number = keep_in[row, chain] % (count if count else num_sets)
                options[chain, lane], kept_in[chain, lane] = count, number
                if count:
                    for s in range(num_sets):
                        if inside[chain, lane, s]:
                            if number == 0:
                                kept_in[chain, lane] = s
                            number -= 1
                rank = 0  # a sample's chains draw from different parts of (0, 1], in random order
                for other in range(num_chains):
                    theirs, own = noise[num_chains + other], noise[num_chains + chain]
                    rank += theirs < own or (theirs == own and other < chain)
                uniform[chain, lane] = (np.exp(-np.float64(noise[chain])) + rank) / num_chains
        beyond = np.empty((num_chains, lanes), kind)
        for s in range(num_sets):
            _read(logits, sets[s], first, x)
            _sum_up(x, peak, mass)
            factor[:], beyond[:] = 0, -np.inf
            for lane in range(lanes):
                log_mass = np.log(np.float64(mass[lane])) + peak[lane]
                for chain in range(num_chains):
                    count = options[chain, lane]
                    if count and not inside[chain, lane, s]:
                        continue
                    score = -np.inf if inside[chain, lane, s] else carried_score[first + lane, chain]
                    stays, count = 1 / (1 + np.exp(log_mass - score)), count if count else num_sets
                    factor[lane] += (1 - stays) / mass[lane] / (count * num_chains)
                    carried_weights[first + lane, chain] += stays / count
                    if kept_in[chain, lane] == s:
                        state[first + lane, chain] = -1
                        if uniform[chain, lane] > stays:
                            beyond[chain, lane] = (uniform[chain, lane] - stays) / (1 - stays) * mass[lane]
            for chain in range(num_chains):
                _place(x, beyond[chain], reached, place)
                for lane in range(lanes):
                    if beyond[chain, lane] >= 0:
                        chosen = np.int64(place[lane])
                        while chosen > 0 and (chosen == n or x[chosen, lane] == 0):  # by rounding, beyond them all
                            chosen -= 1
                        state[first + lane, chain] = sets[s, chosen]
            _write(x, factor, weights, sets, s, first)
        for row in range(first, first + lanes):
            acceptance[row] = 1 - carried_weights[row].mean()


def counters(key: int, first: int, local: int, start: int, size: int) -> Any:
    """What rows draw from: the call's key, the first one's number among this rank's, where those lie in the batch."""
    return np.array((key, first, local, start, size), np.uint64)


@_compiled()
def _shuffle(key: Any, size: Any, sets: Any, place: Any, coins: Any) -> None:
    views, count = sets.shape
    order = sets[0]
    for k in range(count):
        swap = _below(k + 1, 2 * k, key)
        order[k] = order[swap]
        order[swap] = k
    for k in range(count):
        one = order[k]
        place[one] = k
        view = _below(views, 2 * k + 1, key)
        for s in range(views):
            sets[s, k] = one + (view + s) % views * size if one < size else one + (views - 1) * size
    key = _mixed(key, 0)
    for k in range(len(coins)):
        coins[k] = _below(views, k, key)


def shuffle(key: int, size: int, sets: Tensor, place: Tensor, coins: Tensor) -> None:
    """Draw the sets and places of `torch_emc2.losses.draws.Chances`, for ``size`` samples, and coins."""
    _shuffle(np.uint64(key), size, sets.numpy(), place.numpy(), coins.numpy())


def draw(counters: Any, out: Tensor) -> None:
    """Draw Exp(1) numbers (rows, count), float32, of `CountedDraws.counters`."""
    _draw(counters, out.numpy())


def metropolis(visit: Visit, counters: Any, burn_in: float) -> Move:
    """The move of `torch_emc2.kernels.Metropolis`, where the positive is no state."""
    weights, *others = results = _results(visit)
    given = visit.logits.T, visit.sets, visit.carried_score, visit.keep_in
    arrays = *_arrays(*given), counters, burn_in, *_arrays(*results)
    _in_threads(_walk, arrays, len(visit.logits), visit.sets.numel() * visit.keep_in.numel())
    return Move(weights.T, *others)


def resamples(visit: Visit) -> bool:
    """Tell whether `isir` takes a visit: it takes all."""
    return True


def isir(visit: Visit, counters: Any) -> Move:
    """The move of `torch_emc2.kernels.Isir`."""
    weights, *others = results = _results(visit)
    private_ids = visit.carried_ids[:, :0] if visit.private_ids is None else visit.private_ids
    ids = visit.carried_ids, visit.column_ids, private_ids
    given = visit.logits.T, visit.sets, visit.carried_score, visit.keep_in, *ids
    _in_threads(_resample, (*_arrays(*given), counters, *_arrays(*results)), len(visit.logits), visit.logits.numel())
    return Move(weights.T, *others)


def _results(visit: Visit) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for what a move returns, the weights turned: rows are neighbours in it, as they are among similarities.

    What is there is faster than new memory, whose pages have yet to be mapped.
    """
    room = torch.empty_like(visit.logits) if visit.room is None else visit.room
    rows, chains = visit.keep_in.shape
    numbers = visit.logits.new_zeros(rows * (chains + 1))
    carried_weights, acceptance = numbers[: rows * chains].view(rows, chains), numbers[rows * chains :]
    return room.T.contiguous(), carried_weights, visit.keep_in.new_empty(rows, chains), acceptance


def _arrays(*tensors: Tensor) -> Any:
    return (tensor.contiguous().numpy() for tensor in tensors)


def _in_threads(function: Callable[..., None], arguments: tuple[Any, ...], rows: int, steps: int) -> None:
    """Call it on all rows; where that is worth it, on parts of them in as many threads as torch has."""
    count = min(torch.get_num_threads(), steps // _WORTH_A_THREAD, rows)
    if count < 2:
        function(*arguments, 0, rows)
        return
    edges = [rows * number // count for number in range(count + 1)]
    with ThreadPoolExecutor(count - 1) as threads:  # which waits for all, whatever one raises
        others = [threads.submit(function, *arguments, *span) for span in pairwise(edges[1:])]
        function(*arguments, *edges[:2])
    for other in others:
        other.result()
