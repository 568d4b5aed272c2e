"""A loss beside its slow version, for some steps: values, gradients, and what both remember."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from slow import EMC2, Batch, Key, Momentum, NegativeCache, Slow, SogCLR, Uniformity
from torch import Tensor

from torch_emc2 import EMC2Loss, MomentumLoss, NegativeCacheLoss, SogCLRLoss, UniformityLoss
from torch_emc2.losses import ContrastiveLoss
from torch_emc2.memory.chains import ChainTable


def follow(
    fast: ContrastiveLoss,
    slow: Slow,
    batches: Iterable[Batch],
    tables: tuple[Tensor, ...] | None = None,
    tolerance: float = 1e-6,  # what is remembered is float32
    betas: Callable[[int], float] = lambda step: 2.0 + step,
) -> list[float]:
    """Compare value and gradients of β, embeddings and ``tables``, from which `encode` reads, one a tower.

    Returns how much gradient each of the tables got.
    """
    carried = [0.0] * len(tables or ())
    for step, batch in enumerate(batches):
        outcomes = []
        for loss_fn in (fast, slow):
            inputs, encoded = batch.with_gradient(), [table.clone().requires_grad_() for table in tables or ()]
            beta = torch.tensor(betas(step), dtype=torch.float64, requires_grad=True)
            if isinstance(loss_fn, Slow):
                loss = loss_fn(inputs, beta, (encoded[0], encoded[-1]) if encoded else None)
            else:
                functions = tuple(table.__getitem__ for table in encoded)
                encode = functions if len(functions) == 2 else functions[0] if functions else None
                loss = inputs.call(loss_fn, encode=encode, logit_scale=beta)
            gradients = torch.autograd.grad(loss, [beta, *inputs.leaves(), *encoded], materialize_grads=True)
            outcomes.append([loss.detach(), *gradients])
        torch.testing.assert_close(*outcomes, rtol=tolerance, atol=tolerance)
        for number in range(len(carried)):
            carried[number] += float(outcomes[1][len(outcomes[1]) - len(carried) + number].abs().sum())
    return carried


def check_memory(fast: ContrastiveLoss, slow: Slow) -> None:
    """Compare all that both remember: of rows at their side, of candidates at the other."""
    for number in range(2):
        rows, candidates = number, number if slow.towers == 1 else 1 - number
        if isinstance(fast, EMC2Loss) and isinstance(slow, EMC2):
            _check_chains(fast.sides[rows].chains, {key[1:]: at for key, at in slow.chains.items() if key[0] == number})
            cached = fast.sides[candidates].embeddings
            if cached is not None:
                _check_vectors(cached.data, {i: z for (k, i), z in slow.cached.items() if k == number})
            owed = fast.sides[candidates].owed
            if owed is not None:
                _check_vectors(owed.data, {i: z for (k, i), z in slow.due.items() if k == number and bool(z.any())})
        if isinstance(fast, UniformityLoss) and isinstance(slow, Uniformity):
            log_u, similarity, log_beta = map(float, fast.sides[number].numbers)
            found = math.exp(log_u), similarity * math.exp(log_u), math.exp(log_beta)
            assert found == pytest.approx(slow.averages.get(number, (0.0, 0.0, 0.0)), rel=1e-5, abs=1e-6)
        if isinstance(fast, MomentumLoss) and isinstance(slow, Momentum):
            kept = fast.sides[candidates].state()
            assert kept["ids"][:, 0].tolist() == [-1 if i is None else i for i, *_ in slow.queues[number]]
            expected = torch.stack([vector for *_, vector in slow.queues[number]] or [torch.empty(0)])
            torch.testing.assert_close(kept["vectors"].double(), expected.double().view_as(kept["vectors"]))
        if isinstance(fast, SogCLRLoss) and isinstance(slow, SogCLR):
            averages = {(i, *view, 0)[:2]: u for (k, i, *view), u in slow.averages.items() if k == number}
            log_u = fast.sides[rows].log_u.data
            assert {*map(tuple, (log_u > -torch.inf).nonzero().tolist())} == set(averages)
            for key, average in averages.items():
                assert float(log_u[key]) == pytest.approx(math.log(average), rel=1e-6, abs=1e-6)
        if isinstance(fast, NegativeCacheLoss) and isinstance(slow, NegativeCache):
            cache = fast.sides[candidates]
            _check_vectors(cache.embeddings.data, {i: z for (k, i), z in slow.cached.items() if k == number})
            written = cache.written.data.tolist()
            assert {i: call for i, call in enumerate(written) if call >= 0} == {
                i: call for (k, i), call in slow.written.items() if k == number
            }
        if slow.towers == 1:
            return


def _check_chains(table: ChainTable, chains: dict[Key, tuple[int, float]]) -> None:
    ids = table.ids.data
    ends = {key: end for key, (end, _) in chains.items()}
    assert {(i, c): int(ids[i, c]) for i, c in (ids >= 0).nonzero().tolist()} == ends
    if table.similarities is not None:  # of policies that read it
        for key, (_, similarity) in chains.items():
            assert float(table.similarities.data[key]) == pytest.approx(similarity, rel=1e-6, abs=1e-6)


def _check_vectors(table: Tensor, vectors: dict[int, Tensor]) -> None:
    expected = torch.zeros_like(table)
    for i, vector in vectors.items():
        expected[i] = vector
    torch.testing.assert_close(table, expected)
