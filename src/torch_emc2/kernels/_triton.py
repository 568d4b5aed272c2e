"""The moves of both kernels, compiled for a GPU by Triton: chance included, noise and coins those of `_numba`.

A row is a lane: rows are neighbours in memory, as they are among similarities. A Metropolis walk is a loop over its
proposals, since all that follows from a step is in registers, and as many walk at once as there are rows, sets and
chains.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_emc2.kernels.base import Move, Visit

__all__ = ["counters", "draw", "isir", "metropolis", "resamples", "shuffle"]

_LANES, _TILE = 32, 32
_FEW_LANES, _LONG_TILE = 16, 64  # where programs are as many as blocks of rows, and no more
_BLOCK = 128
_CHANCE = ["low", "high", "first", "local", "start", "size"]  # which change with each call: no reason to compile anew


@triton.jit
def _bits(counter, low, high):
    h = (counter.to(tl.uint32) * 0x9E3779B1) ^ low
    h = (h ^ (h >> 16)) * 0x21F0AAAD
    h = (h ^ (h >> 15)) ^ high
    h = h * 0x735A2D97
    return h ^ (h >> 15)


@triton.jit
def _exponential(counter, low, high):
    scaled = (_bits(counter, low, high) >> 1).to(tl.int32).to(tl.float32) + 0.5
    raw = scaled.to(tl.int32, bitcast=True)
    exponent = ((raw >> 23) - 158).to(tl.float32)
    t = (raw & 0x7FFFFF).to(tl.float32) * 1.1920928955078125e-07
    p = t * -0.0064535442 + 0.0360884937
    p = p * t - 0.0953293897
    p = p * t + 0.1676540711
    p = p * t - 0.2407338084
    p = p * t + 0.3317990258
    p = p * t - 0.4998741238
    p = p * t + 0.9999964239
    return tl.maximum(-(exponent * 0.6931471806 + p * t), 0.0)


@triton.jit
def _mixed(low, high, row):
    """Key of a row of the whole batch, or of another purpose, in halves."""
    key = (high.to(tl.uint32).to(tl.uint64) << 32) | low.to(tl.uint32).to(tl.uint64)
    state = key + (row + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    state = state ^ (state >> 31)
    return (state & 0xFFFFFFFF).to(tl.uint32), (state >> 32).to(tl.uint32)


@triton.jit
def _key_of(row, low, high, first, local, start, size):
    row += first
    return _mixed(low, high, row // local * size + start + row % local)


@triton.jit
def _below(limit, counter, low, high):
    bits = _bits(counter, low, high).to(tl.uint64)
    return ((bits * limit.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit(do_not_specialize=_CHANCE)
def _draw(out, count, low, high, first, local, start, size, BLOCK: tl.constexpr):
    blocks = tl.cdiv(count, BLOCK)
    row, k = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    of_row, and_this = _key_of(row, low, high, first, local, start, size)
    tl.store(out + row.to(tl.int64) * count + k, _exponential(k, of_row, and_this), k < count)


@triton.jit
def _rank_of(k, low, high):
    bits = _bits(2 * k, low, high).to(tl.uint64)
    return (bits << 32) | _bits(2 * k + 1, low, high).to(tl.uint64)


@triton.jit(do_not_specialize=["low", "high", "size", "count", "views", "num_coins"])
def _shuffle(
    sets, place, coins, low, high, size, count, views, num_coins, BLOCK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, high = low.to(tl.uint32), high.to(tl.uint32)
    mine, before = _rank_of(k, low, high), tl.zeros([BLOCK], tl.int64)
    for start in range(0, count, TILE):
        other = start + tl.arange(0, TILE)
        theirs = _rank_of(other, low, high)
        earlier = (theirs[None, :] < mine[:, None]) | (
            (theirs[None, :] == mine[:, None]) & (other[None, :] < k[:, None])
        )
        before += tl.sum((earlier & (other < count)[None, :]).to(tl.int64), 1)
    tl.store(place + k, before, k < count)
    view = _below(views, 2 * count + k, low, high)
    for s in range(views):
        column = k + tl.where(k < size, (view + s) % views, views - 1) * size
        tl.store(sets + s * count + before, column, k < count)
    low, high = _mixed(low, high, k * 0)
    for start in range(0, num_coins, BLOCK * tl.num_programs(0)):
        coin = start + k
        tl.store(coins + coin, _below(views, coin, low, high), coin < num_coins)


@triton.jit
def _proposal(logits, by_column, columns, k, n, there):
    """Column and score of a set's proposal for each lane."""
    column = tl.load(columns + k, k < n, other=0)
    return column, tl.load(logits + column * by_column, there & (k < n), other=-float("inf"))


@triton.jit
def _eight(logits, by_column, columns, k, n, there):
    """Proposals read ahead: a walk waits for memory more than for anything."""
    a, p = _proposal(logits, by_column, columns, k, n, there)
    b, q = _proposal(logits, by_column, columns, k + 1, n, there)
    c, r = _proposal(logits, by_column, columns, k + 2, n, there)
    d, s = _proposal(logits, by_column, columns, k + 3, n, there)
    e, t = _proposal(logits, by_column, columns, k + 4, n, there)
    f, u = _proposal(logits, by_column, columns, k + 5, n, there)
    g, v = _proposal(logits, by_column, columns, k + 6, n, there)
    h, w = _proposal(logits, by_column, columns, k + 7, n, there)
    return a, p, b, q, c, r, d, s, e, t, f, u, g, v, h, w


@triton.jit
def _step(column, x, counter, low, high, burnt, weights, by_column, now, at, since, carried, steps, accepted):
    """Go a step; where a chain moves on, count the time that it was where it comes from."""
    hit = x + _exponential(counter, low, high) > now
    clock = tl.maximum(steps - burnt, 0)
    spent = clock - since
    leaves = hit & (at >= 0) & (spent > 0)
    tl.atomic_add(weights + at * by_column, spent.to(weights.dtype.element_ty), leaves, sem="relaxed")
    carried = tl.where(hit & (at < 0), spent, carried)
    since, at, now = tl.where(hit, clock, since), tl.where(hit, column, at), tl.where(hit, x, now)
    return now, at, since, carried, steps + (x > -float("inf")).to(tl.int32), accepted + hit.to(tl.int32)


@triton.jit(do_not_specialize=_CHANCE)
def _walk(
    logits, by_row, by_column, sets, carried_score, keep_in, low, high, first, local, start, size,
    weights, weight_by_row, weight_by_column, carried_steps, counted, accepted_steps, all_steps, state, rows, n,
    CHAINS: tl.constexpr, BURN_IN: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Walk over a set, and count steps: whole numbers, whose sums are the same in whatever order they come."""
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    s, chain, there = tl.program_id(1), tl.program_id(2), row < rows
    low, high = _key_of(row, low, high, first, local, start, size)
    row = row.to(tl.int64)
    sets += s * n
    logits += row * by_row
    weights += row * weight_by_row
    kind = weights.dtype.element_ty

    num_steps = tl.zeros([LANES], tl.int32)
    for begin in range(0, n, TILE):
        x = _read(logits, by_column, sets, begin, n, there, TILE)
        num_steps += tl.sum((x > -float("inf")).to(tl.int32), 0)
    burnt = (tl.full([LANES], BURN_IN, tl.float64) * num_steps.to(tl.float64)).to(tl.int32)

    now = tl.load(carried_score + row * CHAINS + chain, there, other=0)
    at, since = tl.full([LANES], -1, tl.int64), tl.zeros([LANES], tl.int32)
    carried, steps, accepted = since, since, since
    c = since + (s * CHAINS + chain) * n  # the draw's number
    for k in range(0, n, 8):
        ahead = _eight(logits, by_column, sets, k, n, there)
        for i in tl.static_range(8):
            now, at, since, carried, steps, accepted = _step(
                ahead[2 * i], ahead[2 * i + 1], c + k + i, low, high, burnt, weights, weight_by_column,
                now, at, since, carried, steps, accepted,
            )  # fmt: skip
    spent = tl.maximum(steps - burnt, 0) - since
    stays = there & (at >= 0) & (spent > 0)
    tl.atomic_add(weights + at * weight_by_column, spent.to(kind), stays, sem="relaxed")
    carried = tl.where(at < 0, spent, carried)
    tl.atomic_add(carried_steps + row * CHAINS + chain, carried.to(kind), there, sem="relaxed")
    tl.atomic_add(counted + row, (num_steps - burnt).to(kind), there & (chain == 0), sem="relaxed")
    tl.atomic_add(accepted_steps + row, accepted.to(kind), there, sem="relaxed")
    tl.atomic_add(all_steps + row, num_steps.to(kind), there, sem="relaxed")
    kept = tl.load(keep_in + row * CHAINS + chain, there, other=-1)
    tl.store(state + row * CHAINS + chain, at, there & (kept == s))


@triton.jit
def _divide(
    weights, weight_by_row, weight_by_column, carried_steps, counted, accepted_steps, all_steps, rows, columns,
    CHAINS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Make shares of the counts, in place."""
    row = tl.program_id(1).to(tl.int64) * LANES + tl.arange(0, LANES)
    column = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = row < rows
    share = 1 / tl.load(counted + row, there, other=1)
    target = weights + row[None, :] * weight_by_row + column[:, None] * weight_by_column
    is_one = there[None, :] & (column < columns)[:, None]
    tl.store(target, tl.load(target, is_one, other=0) * (share / CHAINS)[None, :], is_one)
    if tl.program_id(0) == 0:
        chain = tl.arange(0, WIDTH)
        of_chain = carried_steps + row[:, None] * CHAINS + chain[None, :]
        is_chain = there[:, None] & (chain < CHAINS)[None, :]
        tl.store(of_chain, tl.load(of_chain, is_chain, other=0) * share[:, None], is_chain)
        accepted = tl.load(accepted_steps + row, there, other=0) / tl.load(all_steps + row, there, other=1)
        tl.store(accepted_steps + row, accepted, there)


@triton.jit(do_not_specialize=_CHANCE)
def _resample(
    logits, by_row, by_column, sets, carried_score, keep_in, carried_ids, column_ids, private_ids,
    low, high, first, local, start, size, weights, weight_by_row, weight_by_column, carried_weights, state, acceptance,
    rows, n, num_ids, num_private,
    SETS: tl.constexpr, CHAINS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    low, high = _key_of(row, low, high, first, local, start, size)
    row, there = row.to(tl.int64), row < rows
    logits += row * by_row
    weights += row * weight_by_row
    chain = tl.arange(0, WIDTH)
    of_chain = row[:, None] * CHAINS + chain[None, :]
    is_chain = there[:, None] & (chain < CHAINS)[None, :]

    one = tl.load(carried_ids + of_chain, is_chain, other=0)
    inside = tl.zeros([LANES, WIDTH], tl.int32)  # a bit for each set that holds the carried state
    for s in tl.static_range(SETS):
        held = tl.zeros([LANES, WIDTH], tl.int32)
        for begin in range(0, n, TILE):
            k = begin + tl.arange(0, TILE)
            column = tl.load(sets + s * n + k, k < n, other=num_ids)
            ids = tl.load(column_ids + column, column < num_ids, other=-1)
            held = held | tl.max((ids[:, None, None] == one[None, :, :]).to(tl.int32), 0)
        inside = inside | (held << s)
    everywhere = one == -1
    for own in range(num_private):
        everywhere = everywhere | (one == tl.load(private_ids + row * num_private + own, there, other=0)[:, None])
    inside = tl.where(everywhere, (1 << SETS) - 1, inside)
    count = tl.zeros([LANES, WIDTH], tl.int32)
    for s in tl.static_range(SETS):
        count += (inside >> s) & 1
    options = tl.where(count == 0, (1 << SETS) - 1, inside)
    count = tl.where(count == 0, SETS, count)
    number = (tl.load(keep_in + of_chain, is_chain, other=0) % count).to(tl.int32)
    kept_in = tl.zeros([LANES, WIDTH], tl.int32)
    for s in tl.static_range(SETS):
        option = (options >> s) & 1
        kept_in = tl.where((option == 1) & (number == 0), s, kept_in)
        number -= option

    low, high = low[:, None], high[:, None]  # a sample's chains draw from different parts of (0, 1], in random order
    order = _exponential(CHAINS + chain[None, :] + tl.zeros([LANES, 1], tl.int32), low, high)
    theirs, mine = order[:, None, :], order[:, :, None]
    before = (theirs < mine) | ((theirs == mine) & (chain[None, None, :] < chain[None, :, None]))
    rank = tl.sum((before & (chain < CHAINS)[None, None, :]).to(tl.float64), 2)
    noise = _exponential(chain[None, :] + tl.zeros([LANES, 1], tl.int32), low, high)
    uniform = (tl.exp(-noise.to(tl.float64)) + rank) / CHAINS

    score = tl.load(carried_score + of_chain, is_chain, other=0).to(tl.float64)
    at_carried = tl.zeros([LANES, WIDTH], tl.float64)
    end = tl.full([LANES, WIDTH], -1, tl.int64)
    for s in tl.static_range(SETS):
        peak = tl.full([LANES], -float("inf"), logits.dtype.element_ty)
        for begin in range(0, n, TILE):
            x = _read(logits, by_column, sets + s * n, begin, n, there, TILE)
            peak = tl.maximum(peak, tl.max(x, 0))
        peak = tl.where(there, peak, 0.0)
        mass = tl.zeros([LANES], logits.dtype.element_ty)
        for begin in range(0, n, TILE):
            x = _read(logits, by_column, sets + s * n, begin, n, there, TILE)
            mass += tl.sum(tl.exp(x - peak[None, :]), 0)
        mass = tl.where(there, mass, 1.0)
        log_mass = tl.log(mass.to(tl.float64)) + peak
        held, option = ((inside >> s) & 1) == 1, is_chain & (((options >> s) & 1) == 1)
        stays = tl.where(held, 0.0, 1 / (1 + tl.exp(log_mass[:, None] - score)))
        at_carried += tl.where(option, stays / count, 0.0)
        share = tl.where(option, (1 - stays) / mass.to(tl.float64)[:, None] / (count * CHAINS), 0.0)
        factor = tl.sum(share, 1).to(mass.dtype)
        moves = option & (kept_in == s) & (uniform > stays)
        beyond = tl.where(moves, (uniform - stays) / (1 - stays) * mass.to(tl.float64)[:, None], 0.0).to(mass.dtype)
        place = tl.full([LANES, WIDTH], 2147483647, tl.int32)
        last, reached = tl.zeros([LANES], tl.int32), tl.zeros([LANES], mass.dtype)
        for begin in range(0, n, TILE):
            k = begin + tl.arange(0, TILE)
            scores = tl.exp(_read(logits, by_column, sets + s * n, begin, n, there, TILE) - peak[None, :])
            so_far = reached[None, :] + tl.cumsum(scores, 0)
            found = (so_far[:, :, None] >= beyond[None, :, :]) & (scores > 0)[:, :, None]
            place = tl.minimum(place, tl.min(tl.where(found, k[:, None, None], 2147483647), 0))
            last = tl.maximum(last, tl.max(tl.where(scores > 0, k[:, None], 0), 0))
            reached += tl.sum(scores, 0)
            column = tl.load(sets + s * n + k, k < n, other=0)
            target = weights[None, :] + (column * weight_by_column)[:, None]
            is_one = (k < n)[:, None] & there[None, :]
            again = (tl.load(sets + k, k < n, other=0) == tl.load(sets + (SETS - 1) * n + k, k < n, other=1)) & (s > 0)
            given = tl.load(target, is_one & again[:, None], other=0.0)
            tl.store(target, given + scores * factor[None, :], is_one)
        place = tl.minimum(place, last[:, None])  # by rounding, beyond them all
        end = tl.where(moves, tl.load(sets + s * n + place, moves, other=0), end)
        tl.debug_barrier()  # the next set may add to what this one has stored
    tl.store(carried_weights + of_chain, at_carried.to(carried_weights.dtype.element_ty), is_chain)
    tl.store(state + of_chain, end, is_chain)
    moved = 1 - tl.sum(tl.where(is_chain, at_carried, 0.0), 1) / CHAINS
    tl.store(acceptance + row, moved.to(acceptance.dtype.element_ty), there)


@triton.jit
def _read(logits, by_column, columns, begin, n, there, TILE: tl.constexpr):
    """A tile (TILE, lanes) of the proposals of a set, in the order of the steps."""
    k = begin + tl.arange(0, TILE)
    column = tl.load(columns + k, k < n, other=0)
    return tl.load(
        logits[None, :] + (column * by_column)[:, None], (k < n)[:, None] & there[None, :], other=-float("inf")
    )


def counters(key: int, first: int, local: int, start: int, size: int) -> tuple[int, ...]:
    """What rows draw from: the call's key, the first one's number among this rank's, where those lie in the batch."""
    return *_halves(key), first, local, start, size


def _halves(key: int) -> tuple[int, int]:
    """32 bits each, as numbers that all are of one type."""
    low, high = ((half ^ 1 << 31) - (1 << 31) for half in (key & 0xFFFFFFFF, key >> 32))
    return low, high


def shuffle(key: int, size: int, sets: Tensor, place: Tensor, coins: Tensor) -> None:
    """Draw the sets and places of `torch_emc2.losses.draws.Chances`, for ``size`` samples, and coins."""
    views, count = sets.shape
    with _on(sets.device):
        _shuffle[(triton.cdiv(count, _BLOCK),)](
            sets, place, coins, *_halves(key), size, count, views, len(coins), BLOCK=_BLOCK, TILE=_TILE
        )


def draw(counters: Any, out: Tensor) -> None:
    """Draw Exp(1) numbers (rows, count), float32, of `CountedDraws.counters`."""
    rows, count = out.shape
    with _on(out.device):
        _draw[(rows * triton.cdiv(count, _BLOCK),)](out, count, *counters, BLOCK=_BLOCK)


def metropolis(visit: Visit, counters: Any, burn_in: float) -> Move:
    """The move of `torch_emc2.kernels.Metropolis`, where the positive is no state."""
    logits, weights, (rows, chains) = visit.logits, _room(visit).zero_(), visit.keep_in.shape
    num_sets, n = visit.sets.shape
    counts = torch.split(logits.new_zeros(rows * (chains + 3)), [rows * chains, rows, rows, rows])
    carried_steps, _, accepted, _ = counts
    state, blocks = visit.keep_in.new_empty(rows, chains), triton.cdiv(rows, _LANES)
    with _on(logits.device):
        _walk[(blocks, num_sets, chains)](
            logits, *logits.stride(), visit.sets.contiguous(), visit.carried_score.contiguous(),
            visit.keep_in.contiguous(), *counters, weights, *weights.stride(), *counts, state, rows, n,
            CHAINS=chains, BURN_IN=burn_in, LANES=_LANES, TILE=_TILE, num_warps=1,
        )  # fmt: skip
        _divide[(triton.cdiv(logits.shape[1], _TILE), blocks)](
            weights, *weights.stride(), *counts, rows, logits.shape[1],
            CHAINS=chains, WIDTH=triton.next_power_of_2(chains), LANES=_LANES, TILE=_TILE,
        )  # fmt: skip
    return Move(weights, carried_steps.view(rows, chains), state, accepted)


def resamples(visit: Visit) -> bool:
    """Tell whether `isir` takes a visit: a chain's sets are bits of an int32, and compilation grows with the chains."""
    return len(visit.sets) < 32 and visit.carried_score.shape[1] <= 16


def isir(visit: Visit, counters: Any) -> Move:
    """The move of `torch_emc2.kernels.Isir`."""
    logits, weights, (rows, chains) = visit.logits, _room(visit), visit.keep_in.shape
    num_sets, n = visit.sets.shape
    numbers = torch.split(logits.new_empty(rows * (chains + 1)), [rows * chains, rows])
    carried_weights, acceptance = numbers
    state = visit.keep_in.new_empty(rows, chains)
    private_ids = visit.carried_ids[:, :0] if visit.private_ids is None else visit.private_ids.contiguous()
    with _on(logits.device):
        _resample[(triton.cdiv(rows, _FEW_LANES),)](
            logits, *logits.stride(), visit.sets.contiguous(), visit.carried_score.contiguous(),
            visit.keep_in.contiguous(), visit.carried_ids.contiguous(), visit.column_ids.contiguous(), private_ids,
            *counters, weights, *weights.stride(), carried_weights, state, acceptance,
            rows, n, len(visit.column_ids), private_ids.shape[1],
            SETS=num_sets, CHAINS=chains, WIDTH=triton.next_power_of_2(chains), LANES=_FEW_LANES, TILE=_LONG_TILE,
        )  # fmt: skip
    return Move(weights, carried_weights.view(rows, chains), state, acceptance)


def _room(visit: Visit) -> Tensor:
    return torch.empty_like(visit.logits) if visit.room is None else visit.room


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
