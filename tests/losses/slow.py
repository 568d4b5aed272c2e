"""Slow versions of all estimators in both geometries: loops over rows, and dictionaries for what is remembered.

An estimator says with which weight a row meets what it sees. All else is the same for all:

    ∇L = mean over directions and rows of ∇ β [ -mean_p s_p + Σ weight · s ],    weights constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_emc2.losses.draws import BatchDraws
from torch_emc2.ranks import Ranks
from torch_emc2.seeds import mix_seed

DIRECTIONS = ("x->y", "y->x")
Ids = list[list[int]] | None  # by view and sample
Key = tuple[int, ...]


@dataclass
class Batch:
    """What a loss is called with."""

    x: Tensor
    y: Tensor | None = None
    index: Tensor | None = None
    y_index: Tensor | None = None
    hard: Tensor | None = None
    hard_index: Tensor | None = None
    same: Tensor | None = None
    labels: Tensor | None = None
    slow: Tensor | tuple[Tensor, Tensor] | None = None

    def call(self, loss_fn: Callable[..., Tensor], **others: Any) -> Tensor:
        """Call the loss under test, with what there is."""
        left_out = ("x", "y", "index") if getattr(loss_fn, "needs_slow", False) else ("x", "y", "index", "slow")
        given = {name: value for name, value in vars(self).items() if name not in left_out}
        others |= {name: value for name, value in given.items() if value is not None}
        return loss_fn(self.x, self.y, self.index, **others)

    def with_gradient(self) -> Batch:
        """Copy it, with embeddings that have a gradient."""
        embeddings = {name: getattr(self, name) for name in ("x", "y", "hard")}
        return replace(self, **{n: z.clone().requires_grad_() for n, z in embeddings.items() if z is not None})

    def leaves(self) -> list[Tensor]:
        """Return the embeddings."""
        return [z for z in (self.x, self.y, self.hard) if z is not None]


class Row(NamedTuple):
    """An anchor and what it sees, in columns: the batch view by view, hard negatives."""

    vector: Tensor
    id: int | None
    view: int
    sample: int
    first: bool  # no sample before it is the same item
    columns: Tensor
    similarities: list[float]
    ids: list[int | None]  # of the columns
    own: list[int]  # columns of its own sample or pair: where it lies among the proposals
    positives: list[int]
    negatives: list[int]
    known: set[int]  # ids of items that are no negatives of it
    remembered: tuple[int, ...] = ()  # columns that are in no batch


def geometry(batch: Batch, towers: int, directions: str) -> list[tuple[int, list[Row]]]:
    """Number and rows of each direction."""
    pairs = [(i, i) for i in range(len(batch.x))]
    if batch.same is not None:
        pairs += [(i, j) for i, j in batch.same.nonzero().tolist()]
    turned = [(j, i) for i, j in pairs]
    if towers == 1:
        views = list(batch.x.unbind(1)) if batch.y is None else [batch.x, batch.y]
        ids = _ids(batch.index, len(views))
        return [(0, _rows(batch, (views, ids), (views, ids), pairs + turned, with_hard=True))]
    assert batch.y is not None
    x_ids = _ids(batch.index, 1)
    x, y = ([batch.x], x_ids), ([batch.y], x_ids if batch.y_index is None else _ids(batch.y_index, 1))
    numbers = range(2) if directions == "both" else [DIRECTIONS.index(directions)]
    both = [_rows(batch, x, y, pairs, with_hard=True), _rows(batch, y, x, turned, with_hard=False)]
    return [(number, both[number]) for number in numbers]


def _ids(index: Tensor | None, views: int) -> Ids:
    if index is None:
        return None
    return [index.tolist()] * views if index.ndim == 1 else index.T.tolist()


def _items(ids: Ids, size: int) -> list[Hashable]:
    """The item behind each sample: the ids of its views, or just itself."""
    return [("unknown", i) for i in range(size)] if ids is None else list(zip(*ids, strict=True))


def _rows(
    batch: Batch,
    anchors: tuple[list[Tensor], Ids],
    candidates: tuple[list[Tensor], Ids],
    pairs: list[tuple[int, int]],
    with_hard: bool,
) -> list[Row]:
    """Look through all columns for each row.

    A row's own are the items that any sample with the row's item is paired with. Of an item the first sample counts.
    """
    size, views, one_tower = len(batch.x), len(candidates[0]), anchors[0] is candidates[0]
    row_items, sample_items = _items(anchors[1], size), _items(candidates[1], size)
    item_of = {i: sample_items[j] for ids in candidates[1] or [] for j, i in enumerate(ids)}
    batch_columns = [F.normalize(z, dim=1) for z in candidates[0]]
    batch_ids = [i for ids in candidates[1] or [[None] * size] * views for i in ids]
    labels = list(range(size)) if batch.labels is None else batch.labels.tolist()
    rows = []
    for view, sample in ((view, sample) for view in range(len(anchors[0])) for sample in range(size)):
        hard, hard_ids = _hard(batch, sample) if with_hard else ([], [])
        vector = F.normalize(anchors[0][view][sample], dim=0)
        columns = torch.cat([*batch_columns, *(F.normalize(z[None], dim=1) for z in hard)])
        samples = [*range(size)] * views + [size + number for number in range(len(hard))]
        items = sample_items * views
        items += [("hard", number) if i is None else item_of.get(i, (i,)) for number, i in enumerate(hard_ids)]
        known = {sample_items[j] for i, j in pairs if row_items[i] == row_items[sample]}
        first = dict(reversed([*zip(items, samples, strict=True)]))
        own = [u * size + sample for u in range(views)]
        positives = [j for j in own if not (one_tower and j == view * size + sample)]
        others = [j for j in range(len(columns)) if items[j] not in known and first[items[j]] == samples[j]]
        alike = [j for j in others if samples[j] < size and labels[samples[j]] == labels[sample]]
        rows.append(
            Row(
                vector=vector,
                id=None if anchors[1] is None else anchors[1][view][sample],
                view=view,
                sample=sample,
                first=row_items.index(row_items[sample]) == sample,
                columns=columns,
                similarities=(columns @ vector).tolist(),
                ids=batch_ids + hard_ids,
                own=own,
                positives=positives + alike,
                negatives=[j for j in others if j not in alike],
                known={i for i, item in item_of.items() if item in known},
            )
        )
    return rows


def _hard(batch: Batch, sample: int) -> tuple[Sequence[Tensor], list[int | None]]:
    if batch.hard is None:
        return [], []
    hard, ids = batch.hard, batch.hard_index
    if hard.ndim == 3:
        hard, ids = hard[sample], None if ids is None else ids[sample]
    return list(hard), [None] * len(hard) if ids is None else ids.tolist()


class Met(NamedTuple):
    """A negative from outside the batch."""

    weight: float
    vector: Tensor


Weighed = tuple[float, dict[int, float], list[Met]]  # value of a row's loss, weights of columns, what is carried


class Slow:
    """What all share.

    Args:
        positive_weight: κ, or "global".
        num_samples: of x and of y; of one tower twice the same.
        towers: 1 or 2.
        directions: as the losses'.
    """

    def __init__(
        self,
        positive_weight: float | str = 0.0,
        *,
        num_samples: tuple[int, int] = (0, 0),
        towers: int = 1,
        directions: str = "both",
    ) -> None:
        self.positive_weight, self.num_samples = positive_weight, num_samples
        self.towers, self.directions = towers, directions
        self.calls = 0

    def __call__(self, batch: Batch, beta: Tensor, tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Value and gradient; ``tables`` have the embeddings of x and y by id, as ``encode`` gives them."""
        losses = []
        if batch.slow is not None:
            slow = batch.slow if isinstance(batch.slow, Tensor) else torch.stack(batch.slow, 1)
            self.slow_views = list(slow.unbind(1))
        self.own_hard = batch.hard is not None and batch.hard.ndim == 3
        self.own_ids = self.towers == 1 and batch.index is not None and batch.index.ndim == 2
        for number, rows in geometry(batch, self.towers, self.directions):
            self.size, self.row_views = len(batch.x), len(rows) // len(batch.x)
            self.table = None if tables is None else F.normalize(tables[1 - number], dim=1).unbind()
            self.start(number, rows)
            values, weights_of_all, carried_by_all = [], [], []
            for row in rows:
                value, weights, carried = self.weigh(number, row, float(beta.detach()))
                for p in row.positives:
                    weights[p] = weights.get(p, 0.0) - 1 / len(row.positives)
                values.append(value)
                weights_of_all.append([weights.get(j, 0.0) for j in range(len(row.columns))])
                carried_by_all += [(weight, vector, row.vector) for weight, vector in carried if weight]
            self.end(number, rows)
            w, columns = torch.tensor(weights_of_all, dtype=beta.dtype), torch.stack([row.columns for row in rows])
            total = torch.einsum("rj,rjd,rd->", w, columns, torch.stack([row.vector for row in rows]))
            total = total + sum(weight * (vector @ row) for weight, vector, row in carried_by_all)
            surrogate = beta * total / len(rows) + self.owed(number, rows)
            losses.append(sum(values) / len(rows) + surrogate - surrogate.detach())
        self.calls += 1
        return torch.as_tensor(sum(losses) / len(losses))

    def start(self, number: int, rows: list[Row]) -> None:
        """Do what comes before the first row."""

    def weigh(self, number: int, row: Row, beta: float) -> Weighed:
        raise NotImplementedError

    def end(self, number: int, rows: list[Row]) -> None:
        """Write to memory."""

    def owed(self, number: int, rows: list[Row]) -> Tensor | float:
        """What has the gradient that was left to this batch."""
        return 0.0

    def draws_of(self, number: int, rows: list[Row], views: int, num_further: int) -> BatchDraws:
        """What chance decides is the library's, and tested for itself."""
        batch = SimpleNamespace(
            ranks=Ranks((self.size,), 0, torch.device("cpu")),
            rows=torch.empty(len(rows), 1, dtype=torch.float64),
            anchors=number,
            row_views=self.row_views,
            column_views=views,
            num_further=num_further,
        )
        return BatchDraws(batch, self.seed, self.calls)  # type: ignore[arg-type, attr-defined]

    def num_entries(self, number: int) -> int:
        """How many ids candidates have."""
        return self.num_samples[1 - number]

    def num_negatives(self, number: int, row: Row) -> int:
        """How many a row has in the data: all but its own sample or pair, all views of them."""
        views = len(row.own)
        return self.num_entries(number) - views if self.own_ids else views * (self.num_entries(number) - 1)

    def num_in_batch(self, row: Row) -> int:
        """How many it has in the batch."""
        return sum(j not in row.remembered for j in row.negatives)

    def kappa(self, number: int, row: Row) -> float:
        if self.positive_weight == "global":
            return self.num_in_batch(row) / self.num_negatives(number, row)
        return float(self.positive_weight)

    def masses(self, number: int, row: Row, beta: float) -> dict[int, float]:
        """What each column counts in the denominator."""
        kappa = self.kappa(number, row)
        masses = {j: math.exp(beta * row.similarities[j]) for j in row.negatives}
        return masses | {p: kappa * math.exp(beta * row.similarities[p]) for p in row.positives}

    def textbook(self, number: int, row: Row, beta: float) -> float:
        """-β s_pos + log of the denominator, of the batch."""
        positive = sum(row.similarities[p] for p in row.positives) / len(row.positives)
        masses = self.masses(number, row, beta)
        return math.log(sum(mass for j, mass in masses.items() if j not in row.remembered)) - beta * positive

    def estimate(self, number: int, row: Row, beta: float) -> float:
        """The same a negative: of the global loss."""
        return self.textbook(number, row, beta) - math.log(self.num_in_batch(row))


class InBatch(Slow):
    """InfoNCE with κ = 1, DCL with κ = 0: the softmax over the batch."""

    def weigh(self, number: int, row: Row, beta: float) -> Weighed:
        masses = self.masses(number, row, beta)
        total = sum(masses.values())
        return self.textbook(number, row, beta), {j: mass / total for j, mass in masses.items()}, []


class Momentum(InBatch):
    """The softmax over the batch and a list of the last slow embeddings; a row's positives are slow ones."""

    def __init__(self, queue_size: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.queue_size = queue_size
        # By direction, newest first: a candidate's id, those of what it came with, and its vector.
        self.queues: dict[int, list[tuple[int | None, set[int | None], Tensor]]] = {0: [], 1: []}

    def start(self, number: int, rows: list[Row]) -> None:
        batch, views = self.size * len(rows[0].own), len(rows[0].own)
        slow = self.slow_views if self.towers == 1 else [self.slow_views[1 - number]]
        self.slow = [F.normalize(z, dim=0) for view in slow for z in view]
        in_batch = {*rows[0].ids[:batch], *(i for row in rows for i in row.ids[batch:])} - {None}
        anchors = {row.id for row in rows} - {None}
        own = {i for i, partners, _ in self.queues[number] if partners & anchors} - {None}
        ids = rows[0].ids[:batch]
        once = views if ids[: self.size] * views == ids else 1  # views of one id each count
        before = [[i for i, *_ in self.queues[number][:place]] for place in range(len(self.queues[number]))]
        queued = [
            (i, partners, z)
            for (i, partners, z), newer in zip(self.queues[number], before, strict=True)
            if i not in in_batch and i not in own and not partners & anchors
            if i is None or newer.count(i) < once
        ]
        assert len(self.slow) == batch == views * self.size
        further = torch.stack([*self.slow, *(vector for *_, vector in queued)])
        for place, row in enumerate(rows):
            end, count = len(row.columns), len(self.slow)
            rows[place] = row._replace(
                columns=torch.cat([row.columns, further]),
                similarities=row.similarities + (further @ row.vector.detach()).tolist(),
                ids=row.ids + [None] * count + [i for i, *_ in queued],
                positives=[end + p for p in row.positives],
                negatives=[*row.negatives, *range(end + count, end + len(further))],
            )

    def end(self, number: int, rows: list[Row]) -> None:
        new = []
        views = len(self.slow) // self.size
        for sample, view in ((sample, view) for sample in range(self.size) for view in range(views)):
            j = view * self.size + sample
            others = [row for row in rows if row.sample == sample and not (self.towers == 1 and row.view == view)]
            new.append((rows[0].ids[j], {row.id for row in others}, self.slow[j].float().double()))
        self.queues[number] = (new + self.queues[number])[: self.queue_size]


class Uniformity(Slow):
    """The batch's masses, normalised by one moving average of all rows' denominators."""

    def __init__(self, gamma: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.gamma = gamma
        self.averages: dict[int, tuple[float, float, float]] = {}  # u, its derivative by β, and β; by direction

    def start(self, number: int, rows: list[Row]) -> None:
        self.now: list[float] = []
        self.slopes: list[float] = []

    def weigh(self, number: int, row: Row, beta: float) -> Weighed:
        masses = self.masses(number, row, beta)
        now = sum(masses.values()) / len(row.negatives)
        self.now.append(now)
        self.slopes.append(sum(mass * row.similarities[j] for j, mass in masses.items()) / len(row.negatives))
        self.beta = beta
        u, _, gamma = self.before(number)
        weights = {j: mass / (len(row.negatives) * ((1 - gamma) * u + gamma * now)) for j, mass in masses.items()}
        return self.estimate(number, row, beta), weights, []

    def before(self, number: int) -> tuple[float, float, float]:
        """The average and its derivative by β, taken to this β, and what the batch counts for beside it."""
        if number not in self.averages:
            return 0.0, 0.0, 1.0
        u, slope, at = self.averages[number]
        factor = math.exp((self.beta - at) * slope / u)
        return factor * u, factor * slope, min(1.0, max(self.gamma, 10 * abs(math.log(self.beta / at))))

    def end(self, number: int, rows: list[Row]) -> None:
        u, slope, gamma = self.before(number)
        now, slope_now = (sum(each) / len(rows) for each in (self.now, self.slopes))
        after = (1 - gamma) * u + gamma * now, (1 - gamma) * slope + gamma * slope_now
        self.averages[number] = *after, self.beta


class SogCLR(Slow):
    """The batch's masses, normalised by a moving average of each row's own denominator."""

    def __init__(self, gamma: float | Callable[[int], float], **settings: Any) -> None:
        super().__init__(**settings)
        self.gamma = gamma
        self.averages: dict[Key, float] = {}  # by direction, id, and view where views share an id

    def start(self, number: int, rows: list[Row]) -> None:
        self.after: dict[Key, float] = {}

    def weigh(self, number: int, row: Row, beta: float) -> Weighed:
        gamma = self.gamma(self.calls) if callable(self.gamma) else self.gamma
        assert row.id is not None
        key = (number, row.id) if self.own_ids else (number, row.id, row.view)
        masses = self.masses(number, row, beta)
        now = sum(masses.values()) / len(row.negatives)
        average = (1 - gamma) * self.averages.get(key, now) + gamma * now
        self.after.setdefault(key, average)
        weights = {j: mass / (len(row.negatives) * average) for j, mass in masses.items()}
        return self.estimate(number, row, beta), weights, []

    def end(self, number: int, rows: list[Row]) -> None:
        self.averages |= self.after

    def forget(self, gone: Sequence[int]) -> None:
        """Of one tower."""
        self.averages = {key: average for key, average in self.averages.items() if key[1] not in gone}


class NegativeCache(Slow):
    """One negative a row: of all cached entries that are not its own, the one with the largest Gumbel score."""

    def __init__(
        self,
        refresh_fraction: float,
        *,
        positive_weight: float | str = "global",
        views_per_sample: int = 2,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(positive_weight, **settings)
        self.refresh_fraction, self.views_per_sample, self.seed = refresh_fraction, views_per_sample, seed
        self.cached: dict[Key, Tensor] = {}  # by direction and id of a candidate
        self.written: dict[Key, int] = {}
        self.forgotten: set[int] = set()

    def start(self, number: int, rows: list[Row]) -> None:
        entries, row, entered = self.num_entries(number), rows[0], set()
        for j in range(self.size * (len(row.own) if self.own_ids else 1)):
            i = row.ids[j]
            assert i is not None
            if i not in entered:
                self.cached[number, i], self.written[number, i] = row.columns[j].detach(), self.calls
                self.forgotten.discard(i)
                entered.add(i)
        if self.table is not None:
            by_age = sorted((self.written.get((number, i), -1), i) for i in range(entries) if i not in self.forgotten)
            for _, i in by_age[: math.ceil(self.refresh_fraction * entries)]:
                self.cached[number, i] = self.table[i].detach()
                self.written[number, i] = self.calls
        self.num_hard = len(row.columns) - len(row.own) * self.size
        noise = self.draws_of(number, rows, 1, 0).of(slice(0, len(rows))).exponential(entries + self.num_hard)
        self.gumbel = -torch.log(noise).view(self.row_views, self.size, -1)

    def weigh(self, number: int, row: Row, beta: float) -> Weighed:
        """What is cached stands for all; a hard negative and the positive are to it what they are to the batch."""
        entries, first_hard = self.num_entries(number), len(row.columns) - self.num_hard
        views = self.views_per_sample if self.own_ids else 1
        own = {i // views for i in row.known} | {row.ids[p] // views for p in row.positives}  # type: ignore[operator]
        others = [i for k, i in sorted(self.cached) if k == number and i // views not in own]
        scores = {i: beta * float(row.vector.detach() @ self.cached[number, i]) for i in others}
        scale = len(others) / len(row.negatives)
        hard = [j for j in row.negatives if j >= first_hard]
        scores |= {entries + j - first_hard: beta * row.similarities[j] + math.log(scale) for j in hard}
        drawn = max(scores, key=lambda i: scores[i] + float(self.gumbel[row.view, row.sample, i]))
        kappa = 1.0 if self.positive_weight == "global" else self.kappa(number, row) * scale
        masses = {p: kappa * math.exp(beta * row.similarities[p]) for p in row.positives}
        total = sum(masses.values()) + sum(math.exp(score) for score in scores.values())
        weights = {p: mass / total for p, mass in masses.items()}
        rest = 1 - sum(weights.values())
        if drawn >= entries:
            return self.estimate(number, row, beta), weights | {first_hard + drawn - entries: rest}, []
        met = self.cached[number, drawn] if self.table is None else self.table[drawn]
        return self.estimate(number, row, beta), weights, [Met(rest, met)]

    def forget(self, gone: Sequence[int]) -> None:
        """Of one tower."""
        self.cached = {key: z for key, z in self.cached.items() if key[1] not in gone}
        self.written = {key: call for key, call in self.written.items() if key[1] not in gone}
        self.forgotten |= set(gone)


CARRIED, POSITIVE = -1, -2  # states of a chain beside the columns


class Step(NamedTuple):
    """A proposal: the state and its log score; its place among the proposals of all rows."""

    state: int
    score: float
    place: int = -1


class Visit(NamedTuple):
    """What a chain did with one set: the share of each state, where it is now, how many proposals it accepted."""

    shares: dict[int, float]
    state: int
    accepted: int = 0


def metropolis(entry: Step, steps: list[Step], noise: list[float], burn_in: float) -> Visit:
    """One step after the other."""
    at, accepted, burnt = entry, 0, int(burn_in * len(steps))
    shares: dict[int, float] = {}
    for number, step in enumerate(steps):
        if step.score + noise[step.place] > at.score:
            at, accepted = step, accepted + 1
        if number >= burnt:
            shares[at.state] = shares.get(at.state, 0.0) + 1 / (len(steps) - burnt)
    return Visit(shares, at.state, accepted)


def isir(entry: Step, steps: list[Step], place: float) -> Visit:
    """A choice at ``place`` on a line from 0 to 1, of which each state has its softmax: the carried one, the others."""
    line = [step for step in (entry, *steps) if step.score > -math.inf]
    peak = max(step.score for step in line)
    total = sum(math.exp(step.score - peak) for step in line)
    shares = {step.state: math.exp(step.score - peak) / total for step in line}
    reached = 0.0
    for state, share in shares.items():
        reached += share
        if reached >= place:
            return Visit(shares, state)
    return Visit(shares, line[-1].state)


class EMC2(Slow):
    """A dictionary of chains, each at an id with its similarity."""

    def __init__(
        self,
        *,
        kernel: str = "metropolis",
        burn_in: float = 0.5,
        num_chains: int = 1,
        carry: str = "cache",
        num_remembered: int = 0,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.kernel, self.burn_in, self.num_chains, self.carry, self.seed = kernel, burn_in, num_chains, carry, seed
        self.num_remembered = num_remembered
        self.chains: dict[Key, tuple[int, float]] = {}  # by direction, id, and number of the chain
        self.cached: dict[Key, Tensor] = {}  # by direction and id of a candidate
        self.due: dict[Key, Tensor] = {}  # gradient, by the same

    def with_remembered(self, number: int, rows: list[Row]) -> list[Row]:
        """Draw ids, and let all rows meet those that are known and not met already: after what all rows see."""
        if not self.num_remembered:
            return rows
        generator = torch.Generator().manual_seed(mix_seed(self.seed, number, self.calls))
        drawn = torch.randint(self.num_entries(number), (self.num_remembered,), generator=generator).tolist()
        met = {i for row in rows for i in row.ids}
        place = len(rows[0].own) * self.size if self.own_hard else len(rows[0].ids)
        batch = rows[0].ids[: self.size * (len(rows[0].own) if self.own_ids else 1)]
        met_before = sum((number, i) in self.cached for i in batch)
        new = []
        for k, i in enumerate(drawn):
            new.append(k * len(batch) < met_before * len(drawn) and (number, i) in self.cached and i not in met)
            met |= {i} if new[-1] else set()
        vectors = [
            self.cached[number, i] if is_new else torch.zeros(len(rows[0].vector))
            for i, is_new in zip(drawn, new, strict=True)
        ]
        columns = range(place, place + len(drawn))
        ids = [i if is_new else None for i, is_new in zip(drawn, new, strict=True)]

        def widened(row: Row) -> Row:
            similarities = [float(row.vector.detach() @ z.to(row.vector)) for z in vectors]
            moved = [j if j < place else j + len(drawn) for j in row.negatives]
            return row._replace(
                columns=torch.cat([row.columns[:place], torch.stack(vectors).to(row.columns), row.columns[place:]]),
                similarities=row.similarities[:place] + similarities + row.similarities[place:],
                ids=row.ids[:place] + ids + row.ids[place:],
                negatives=moved + [j for j, is_new in zip(columns, new, strict=True) if is_new],
                remembered=tuple(columns),
            )

        return [widened(row) for row in rows]

    def start(self, number: int, rows: list[Row]) -> None:
        rows[:] = self.with_remembered(number, rows)
        self.sent: list[tuple[int, Tensor]] = []
        views = len(rows[0].own) if self.own_ids else 1
        first = {rows[0].ids[j]: rows[0].columns[j] for j in reversed(range(self.size * views))}
        self.paid = [(number, i) for i in first if i is not None]
        self.has_due = sum(self.due[number, i] @ z for i, z in first.items() if (number, i) in self.due)
        sets = len(rows[0].own)
        width = len(rows[0].columns) - (sets - 1) * self.size
        draws = self.draws_of(number, rows, sets, width - self.size)
        chances = draws.chances(self.num_chains)
        self.sets, self.keep_view = chances.sets.tolist(), chances.keep_view.tolist()
        self.keep_in = chances.keep_in.view(self.row_views, self.size, -1).tolist()
        of_rows = draws.of(slice(0, len(rows)))

        def drawn(*shape: int) -> Tensor:
            return of_rows.exponential(*shape).view(self.row_views, self.size, *shape)

        if self.kernel == "metropolis":
            self.draws = drawn(sets, self.num_chains, width).tolist()
        else:  # each chain draws from a part of (0, 1] of its own
            noise = drawn(2, self.num_chains)
            rank = (noise[:, :, 1, :, None] > noise[:, :, 1, None]).sum(3)
            self.draws = (((-noise[:, :, 0]).exp() + rank) / self.num_chains).tolist()
        self.positive_coins = (1 - (-drawn(sets, width)).exp()).tolist()
        self.after: dict[Key, tuple[int, float] | None] = {}
        self.accepted: list[float] = []  # shares, of each chain's proposals
        self.stayed: list[float] = []

    def weigh(self, number: int, row: Row, beta: float) -> Weighed:
        sets = [self.steps(number, row, beta, s) for s in range(len(self.sets))]
        weights: dict[int, float] = {}
        carried = []
        for chain in range(self.num_chains):
            shares, embedding = self.visit(number, row, beta, chain, sets)
            for state, share in shares.items():
                weights[state] = weights.get(state, 0.0) + share / self.num_chains
            self.stayed.append(shares.get(CARRIED, 0.0))
            if embedding is not None:
                carried.append(Met(self.stayed[-1] / self.num_chains, embedding))
                if self.carry == "defer":
                    share = beta * carried[-1].weight / (self.size * self.row_views)
                    self.sent.append((self.chains[number, row.id, chain][0], share * row.vector.detach()))
        at_positive = weights.pop(POSITIVE, 0.0)
        weights.pop(CARRIED, None)
        masses = {p: math.exp(beta * row.similarities[p]) for p in row.positives}
        weights |= {p: at_positive * mass / sum(masses.values()) for p, mass in masses.items()}
        return self.estimate(number, row, beta), weights, carried

    def steps(self, number: int, row: Row, beta: float, s: int) -> list[Step]:
        """The proposals of a set to a row: its negatives, and its positive.

        isir has the positive once, where the row itself lies. A step of Metropolis, one of n, proposes it in place of a
        negative with probability 1 / (n + 1).
        """
        steps = []
        count = sum(j in row.negatives for j in self.sets[s])
        for place, j in enumerate(self.sets[s]):
            positive = Step(POSITIVE, self.positive_score(number, row, beta), place)
            once = self.kernel == "isir" or count == 0
            if j in row.own and once and self.kappa(number, row) > 0:
                steps.append(positive)
            elif j in row.negatives:
                repeats = 1 if j < len(row.own) * self.size or j in row.remembered else len(row.own)  # of a hard one
                coin = self.positive_coins[row.view][row.sample][s][place]
                if not once and self.kappa(number, row) > 0 and coin < 1 / (count + 1):
                    steps.append(positive)
                else:
                    steps.append(Step(j, beta * row.similarities[j] - math.log(repeats), place))
        return steps

    def positive_score(self, number: int, row: Row, beta: float) -> float:
        mass = sum(math.exp(beta * row.similarities[p]) for p in row.positives)
        in_batch, remembered = self.num_in_batch(row), len(row.negatives) - self.num_in_batch(row)
        kappa = self.kappa(number, row) * (in_batch + remembered * len(row.own)) / in_batch  # those are in every set
        return math.log(mass * kappa / len(row.own)) if kappa else -math.inf

    def visit(
        self, number: int, row: Row, beta: float, chain: int, sets: list[list[Step]]
    ) -> tuple[dict[int, float], Tensor | None]:
        """Move one chain over each set from where it came in; mean shares, and the carried negative's embedding."""
        assert row.id is not None
        key = (number, row.id, chain)
        carried, stored = self.chains.get(key, (None, -math.inf))
        if carried in row.known or carried in [row.ids[p] for p in row.positives]:
            carried = None  # it was not known to be the row's own
        embedding = None
        if carried is not None and self.carry.startswith("encode"):
            assert self.table is not None
            embedding = self.table[carried]
        elif carried is not None and self.carry in ("cache", "defer"):
            embedding = self.cached[number, carried]
        fresh = stored if embedding is None else float(row.vector.detach() @ embedding.detach())
        entry = Step(CARRIED, beta * (fresh if self.carry in ("encode", "cache", "defer") else stored))
        if carried is None:
            entry = Step(POSITIVE, self.positive_score(number, row, beta))

        visited, coin = range(len(sets)), self.keep_in[row.view][row.sample][chain]
        if self.kernel == "isir":
            holding = [s for s in visited if carried in [row.ids[step.state] for step in sets[s] if step.state >= 0]]
            if carried is None or holding:
                entry = Step(CARRIED, -math.inf)
            if carried is not None and holding:
                visited = holding  # a set with another view of what is carried than the one with itself is left out
                coin = coin if coin in visited else visited[0]
        shares: dict[int, float] = {}
        accepted = 0
        for s in visited:
            visit = self.move(entry, sets[s], row, s, chain)
            for state, share in visit.shares.items():
                shares[state] = shares.get(state, 0.0) + share / len(visited)
            accepted += visit.accepted
            shared_by_views = self.row_views > 1 and not self.own_ids
            kept_view = self.keep_view[row.sample][chain] if shared_by_views else row.view
            if row.first and (row.view, s) == (kept_view, coin):
                self.after[key] = None
                if visit.state == CARRIED and carried is not None:
                    self.after[key] = (carried, fresh)
                elif visit.state >= 0 and (end := row.ids[visit.state]) is not None:
                    self.after[key] = (end, row.similarities[visit.state])
        self.accepted.append(accepted / sum(len(sets[s]) for s in visited))
        return shares, embedding

    def move(self, entry: Step, steps: list[Step], row: Row, s: int, chain: int) -> Visit:
        draws = self.draws[row.view][row.sample]
        if self.kernel == "metropolis":
            return metropolis(entry, steps, draws[s][chain], self.burn_in)
        return isir(entry, steps, draws[chain])

    def owed(self, number: int, rows: list[Row]) -> Tensor | float:
        return self.has_due

    def end(self, number: int, rows: list[Row]) -> None:
        for paid in self.paid:
            self.due.pop(paid, None)
        for i, gradient in self.sent:
            self.due[number, i] = self.due.get((number, i), 0.0) + gradient
        for key, at in self.after.items():
            self.chains.pop(key, None)
            if at is not None:
                self.chains[key] = at
        views, entered = len(rows[0].own), set()
        for row in rows:
            for j in (*range(self.size * (views if self.own_ids else 1)), *range(self.size * views, len(row.ids))):
                i = row.ids[j]
                if i is not None and i not in entered:
                    self.cached[number, i] = row.columns[j].detach()
                    entered.add(i)

    def forget(self, gone: Sequence[int]) -> None:
        """Of one tower."""
        self.chains = {key: at for key, at in self.chains.items() if key[1] not in gone and at[0] not in gone}
        self.cached = {key: z for key, z in self.cached.items() if key[1] not in gone}
        self.due = {key: z for key, z in self.due.items() if key[1] not in gone}

    @property
    def carried_share(self) -> float:
        return sum(self.stayed) / len(self.stayed)

    @property
    def acceptance(self) -> float:
        return sum(self.accepted) / len(self.accepted) if self.kernel == "metropolis" else 1 - self.carried_share
