"""The visit that is executed leaves its target invariant: `EMC2Loss` itself, over all that chance decides in it.

It is one anchor's chain that is looked at. Batches, sets, coins and noise are enumerated, each with its probability; of
the noise it matters only between which thresholds it lies, so that one draw stands for all in between.
"""

from collections.abc import Iterator
from itertools import combinations, pairwise, permutations, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_emc2 import EMC2Loss
from torch_emc2.known import NO_ID
from torch_emc2.losses.draws import BatchDraws, Chances
from torch_emc2.losses.weighted_sum import WeightedSum
from torch_emc2.memory.slots import Slots
from torch_emc2.memory.tables import SampleTable

TEMPERATURE = 0.7
Batch = tuple[int, ...]  # of samples; the anchor, sample 0, comes first


@pytest.fixture(scope="module", autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Enumeration:
    """Visits of the anchor's chain with what chance decides given.

    Args:
        kernel: of the loss.
        own_chains: an id a view; else one a sample, whose views are equal.
        batches: all there are, each as probable.
        kinds: ids of each state (states, ids of it); more than one where a batch can hold a state twice.
    """

    def __init__(
        self, kernel: str, own_chains: bool, batches: list[Batch], kinds: Tensor, patch: pytest.MonkeyPatch
    ) -> None:
        self.kernel, self.own_chains, self.batches, self.patch = kernel, own_chains, batches, patch
        self.remembered = torch.empty(0, dtype=torch.int64)
        self.size, self.num_states = len(batches[0]), len(kinds)
        z = F.normalize(torch.randn(1 + len(kinds), 3, generator=torch.Generator().manual_seed(8)), dim=1)
        self.state_of = torch.full((int(kinds.max()) + 1,), -1)
        self.state_of[kinds.flatten()] = torch.arange(len(kinds)).repeat_interleave(kinds.shape[1])
        self.first_id = kinds[:, 0]
        self.table = torch.cat([z[1:], z[:1]])[self.state_of]  # (ids, d); -1, the anchor's, is the last
        self.score = z[1:] @ z[0] / TEMPERATURE  # of each state
        self.target = self.score.softmax(0)
        self.sets = [
            torch.tensor(samples) + torch.tensor([views, [1 - view for view in views]]) * self.size
            for samples in permutations(range(self.size))
            for views in product((0,), *[range(2)] * (self.size - 1))  # the anchor's are no proposals
        ]

    def ids(self, batch: Batch) -> Tensor:
        """(size, 2) or (size,)."""
        return 2 * torch.tensor(batch)[:, None] + torch.arange(2) if self.own_chains else torch.tensor(batch)

    def proposals(self, batch: Batch, columns: Tensor) -> list[int]:
        """States behind a set's columns, but for the anchor's own."""
        ids = self.ids(batch) if self.own_chains else self.ids(batch)[:, None].expand(-1, 2)
        met = ids.T.flatten().tolist()
        for i in self.remembered.tolist():  # what is met a second time is left out
            met.append(NO_ID if i in met else i)
        return [state for i in columns.tolist() if met[i] >= 0 and (state := int(self.state_of[met[i]])) >= 0]

    def visit(
        self, batch: Batch, sets: Tensor, in_set: int, second: bool, start: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States in which the anchor's chains (num_chains,) end that come in at ``start``, and its first row's weights.

        ``noise`` (num_chains, …) is what each chain draws in the walk whose end is kept: that over the set ``in_set``
        by the second view or the first.
        """
        num_chains, further = len(start), len(self.remembered)
        settings: dict[str, Any] = {"kernel": self.kernel, "num_chains": num_chains, "num_remembered": further}
        loss_fn = EMC2Loss(len(self.table), TEMPERATURE, carry="encode", **settings)
        self.patch.setattr(Slots, "drawn", lambda *args: self.remembered)
        side = loss_fn.sides[0]
        side.embeddings = SampleTable(len(self.table), self.table.shape[1:], self.table.dtype, 0.0)
        side.embeddings.write(torch.arange(len(self.table)), self.table)
        loss_fn.chains.write(torch.zeros(1, dtype=torch.int64), self.first_id[start][None], torch.zeros(1, num_chains))
        if self.kernel == "isir":
            drawn = torch.ones(2, self.size, 2, num_chains)
            drawn[int(second), 0, 0] = noise[:, 0]
        else:
            drawn = torch.ones(2, self.size, 2, num_chains, self.size)
            drawn[int(second), 0, in_set] = noise
        chances = Chances(
            sets,
            torch.arange(self.size).index_copy(0, sets[0, : self.size] % self.size, torch.arange(self.size)),
            torch.full((2 * self.size, num_chains), in_set),
            torch.full((self.size, num_chains), int(second)),
        )
        self.patch.setattr(
            BatchDraws, "of", lambda *args: SimpleNamespace(exponential=lambda *args: drawn.flatten(0, 1))
        )
        self.patch.setattr(BatchDraws, "chances", lambda *args: chances)
        summed, met = [], []
        self.patch.setattr(WeightedSum, "add", lambda total, rows, positive, weights: summed.append(weights.negatives))
        self.patch.setattr(WeightedSum, "add_carried", lambda total, carried: met.append(carried.weight))
        self.patch.setattr(WeightedSum, "gradients", lambda *args: [])
        self.patch.setattr("torch_emc2.losses.base.with_gradients", lambda value, gradients: value)
        ids = self.ids(batch)
        z1, z2 = self.table[ids].unbind(1) if self.own_chains else (self.table[ids], self.table[ids])
        loss_fn(z1, z2, ids, encode=self.table.__getitem__)
        return self.state_of[loss_fn.chains.ids.data[0]], summed[0][0], met[0][0]


def without_replacement(
    kernel: str, own_chains: bool, others: int, patch: pytest.MonkeyPatch, samples: int = 4
) -> Enumeration:
    """Every state is a sample, or a view, of its own."""
    batches = [(0, *chosen) for chosen in combinations(range(1, samples), others)]
    ids = torch.arange(2, 2 * samples) if own_chains else torch.arange(1, samples)
    return Enumeration(kernel, own_chains, batches, ids[:, None], patch)


def isir_visits(chain: Enumeration, remembered: int) -> tuple[Tensor, Tensor]:
    """The transition matrix of the visit that is executed, and the mean weights from each state."""
    matrix, weights = torch.zeros(2, chain.num_states, chain.num_states).unbind()
    views = 2 ** (chain.size - 1) if chain.own_chains else 1
    in_order = chain.sets[:views]  # the order of a set's columns makes no difference here
    coins = list(product(range(2), (False, True)[: 2 - chain.own_chains]))
    drawn = list(product(range(len(chain.table)), repeat=remembered))
    share = 1 / (len(in_order) * len(chain.batches) * len(drawn))
    further = 2 * chain.size + torch.arange(remembered).expand(2, -1)  # which are in both sets
    for batch, sets, start, ids in product(chain.batches, in_order, range(chain.num_states), drawn):
        chain.remembered = torch.tensor(ids, dtype=torch.int64)
        sets = torch.cat([sets, further], 1)
        thresholds = {0.0, 1.0}  # at all of them the choice may change: the carried state first, then a set's views
        for columns in sets:
            proposals = chain.proposals(batch, columns)
            for candidates in (proposals, [start, *proposals]):
                thresholds |= set(chain.score[candidates].softmax(0).cumsum(0).tolist())
        for low, high in pairwise(sorted(thresholds)):
            for in_set, second in coins if high - low > 1e-14 else ():
                ends = set()
                for u in (low + 1e-4 * (high - low), high - 1e-4 * (high - low)):
                    noise = -torch.tensor([[u]]).log()
                    end, in_batch, carried = chain.visit(batch, sets, in_set, second, torch.tensor([start]), noise)
                    ends.add(int(end))
                assert len(ends) == 1
                matrix[start, ends.pop()] += share * (high - low) / len(coins)
        for j, weight in enumerate(in_batch.tolist()):
            for state in chain.proposals(batch, torch.tensor([j])):
                weights[start, state] += share * weight
        weights[start, start] += share * float(carried[0])
    torch.testing.assert_close(matrix.sum(1), torch.ones(chain.num_states), rtol=0, atol=1e-12)
    assert torch.linalg.eigvals(matrix).abs().sort().values[-2] < 0.95  # it mixes
    return matrix, weights


@pytest.mark.parametrize(
    ("own_chains", "others", "remembered"),
    [(False, 1, 0), (False, 2, 0), (True, 1, 0), (True, 2, 0), (False, 1, 1), (False, 2, 1)],
)
def test_isir(own_chains: bool, others: int, remembered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stationary law is the softmax over all negatives, and there the weights are that on average: to 1e-12."""
    chain = without_replacement("isir", own_chains, others, monkeypatch)
    matrix, weights = isir_visits(chain, remembered)
    torch.testing.assert_close(chain.target @ matrix, chain.target, rtol=0, atol=1e-12)
    torch.testing.assert_close(chain.target @ weights, chain.target, rtol=0, atol=1e-12)


def test_isir_with_another_view_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both views of a sample may be candidates then. The visit is the textbook's; so far is its law from the target."""
    chain = without_replacement("isir", True, 1, monkeypatch, samples=3)
    matrix, _ = isir_visits(chain, remembered=1)
    torch.testing.assert_close(matrix, textbook_isir(chain), rtol=0, atol=1e-12)
    stationary = torch.linalg.matrix_power(matrix, 10_000)[0]
    assert float((stationary - chain.target).abs().sum() / 2) == pytest.approx(0.0042, abs=5e-5)


def textbook_isir(chain: Enumeration) -> Tensor:
    """One remembered id and each batch, whose views are a set each: from each state to the softmax over a set."""
    total = torch.zeros(chain.num_states, chain.num_states)
    every = list(product(chain.batches, range(len(chain.table))))
    for batch, drawn in every:
        further = set() if drawn in chain.ids(batch) else {int(chain.state_of[drawn])} - {-1}
        first, second = ({int(chain.state_of[i]) for i in view} - {-1} for view in chain.ids(batch).T)
        for start in range(chain.num_states):
            sets = [members | further for members in (first, second)]
            for members in [each for each in sets if start in each] or sets:
                candidates = sorted(members | {start})
                count = sum(start in each for each in sets) or 2
                total[start, candidates] += chain.score[candidates].softmax(0) / (count * len(every))
    return total


def metropolis_matrix(chain: Enumeration) -> Tensor:
    """The transition matrix of the visit that is executed."""
    matrix = torch.zeros(chain.num_states, chain.num_states)
    coins = list(product(range(2), (False, True)[: 2 - chain.own_chains]))
    for batch, sets, (in_set, second) in product(chain.batches, chain.sets, coins):
        proposals = chain.proposals(batch, sets[in_set])
        draws, shares = [], []  # of each step, one between two thresholds and their probabilities
        for state in proposals:
            thresholds = torch.cat([(chain.score - chain.score[state]).clamp(min=0), torch.tensor([0, torch.inf])])
            low, high = (bounds.flatten() for bounds in thresholds.unique().unfold(0, 2, 1).T)
            draws.append(torch.where(high.isinf(), low + 1, (low + high) / 2))
            shares.append((-low).exp() - (-high).exp())
        each = torch.cartesian_prod(*draws).view(-1, len(proposals))
        steps = (sets[in_set] % chain.size).nonzero()[:, 0]  # but the anchor's
        noise = torch.ones(len(each), chain.size).index_copy_(1, steps, each)
        start = torch.arange(chain.num_states).repeat_interleave(len(noise))
        ends, *_ = chain.visit(batch, sets, in_set, second, start, noise.repeat(chain.num_states, 1))
        share = torch.cartesian_prod(*shares).view(-1, len(proposals)).prod(1)
        matrix.view(-1).index_add_(0, start * chain.num_states + ends, share.repeat(chain.num_states))
    return matrix / (len(chain.batches) * len(chain.sets) * len(coins))


def textbook_matrix(chain: Enumeration) -> Tensor:
    """The same by one Metropolis–Hastings step after the other on the law of the chain."""
    total, every = torch.zeros(()), list(product(chain.batches, chain.sets, range(2)))
    accepted = (chain.score - chain.score[:, None]).exp().clamp(max=1)
    for batch, sets, in_set in every:
        law = torch.eye(chain.num_states)
        for proposal in chain.proposals(batch, sets[in_set]):
            moved = law * accepted[:, proposal]
            law = law - moved
            law[:, proposal] += moved.sum(1)
        total = total + law
    return total / len(every)


@pytest.mark.parametrize("own_chains", [False, True])
def test_metropolis_with_independent_proposals(own_chains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples beside the anchor, each view of which is any of three states: the target is invariant to 1e-12."""
    slots = 3**2 if own_chains else 3  # samples with different views, at each of two places
    batches = [(0, 1 + i, 1 + slots + j) for i, j in product(range(slots), repeat=2)]
    if own_chains:
        views = [torch.cartesian_prod(torch.arange(3), torch.arange(3))] * 2
        state_of = torch.cat(views).flatten()
        kinds = torch.stack([(state_of == state).nonzero()[:, 0] + 2 for state in range(3)])
    else:
        kinds = torch.stack([torch.tensor([1, 1 + slots]) + state for state in range(3)])
    chain = Enumeration("metropolis", own_chains, batches, kinds, monkeypatch)
    chain.sets = chain.sets[:1]  # the places are alike
    matrix = metropolis_matrix(chain)
    torch.testing.assert_close(matrix.sum(1), torch.ones(3), rtol=0, atol=1e-12)
    torch.testing.assert_close(chain.target @ matrix, chain.target, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("own_chains", "others", "distance"),
    [(False, 1, 0.0), (False, 2, 0.0454), (True, 1, 0.0), (True, 2, 0.0201)],
)
def test_metropolis_without_replacement(
    own_chains: bool, others: int, distance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The visit is the textbook's, over proposals that are not independent: so far is its law from the target."""
    chain = without_replacement("metropolis", own_chains, others, monkeypatch)
    matrix = metropolis_matrix(chain)
    torch.testing.assert_close(matrix, textbook_matrix(chain), rtol=0, atol=1e-12)
    stationary = torch.linalg.matrix_power(matrix, 10_000)[0]
    assert float((stationary - chain.target).abs().sum() / 2) == pytest.approx(distance, abs=5e-5)
