"""What is known to belong together, hard negatives, several views, and labels: objectives summed up in plain loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, MomentumLoss, NegativeCacheLoss, SogCLRLoss
from torch_emc2.exact import two_tower_loss
from torch_emc2.losses import ContrastiveLoss

BETA, D = 5.0, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    z = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return z.requires_grad_()


def similarity(row: Tensor, others: list[Tensor]) -> Tensor:
    return F.normalize(torch.stack(others), dim=1) @ F.normalize(row, dim=0)


def term(row: Tensor, positives: list[Tensor], negatives: list[Tensor], kappa: float = 0.0) -> Tensor:
    """Loss of a row: mean over its positives of -β s_p, and the log of all that there is."""
    to_positives, to_negatives = BETA * similarity(row, positives), BETA * similarity(row, negatives)
    return torch.log(to_negatives.exp().sum() + kappa * to_positives.exp().sum()) - to_positives.mean()


def check(loss: Tensor, expected: Tensor, inputs: list[Tensor], value: bool = True, tolerance: float = 1e-9) -> None:
    if value:
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=tolerance, atol=tolerance)
    got, want = (
        torch.autograd.grad(each, inputs, materialize_grads=True, retain_graph=True) for each in (loss, expected)
    )
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# Estimators that are exact where the batch is all there is; whether their value is the loss's, and not an average's.
WHOLE: dict[str, tuple[Callable[..., ContrastiveLoss], float, bool]] = {
    "infonce": (lambda n, **towers: InfoNCELoss(1 / BETA, **towers), 1.0, True),
    "dcl": (lambda n, **towers: DCLLoss(1 / BETA, **towers), 0.0, True),
    "sogclr": (lambda n, **towers: SogCLRLoss(n, 1 / BETA, 1.0, **towers), 0.0, False),
    "isir": (lambda n, **towers: EMC2Loss(n, 1 / BETA, kernel="isir", **towers), 0.0, False),
    "isir and positive": (
        lambda n, **towers: EMC2Loss(n, 1 / BETA, kernel="isir", positive_weight=1, **towers),
        1.0,
        False,
    ),
}
each_exact = pytest.mark.parametrize("name", WHOLE)
each_direction = pytest.mark.parametrize("directions", ["both", "x->y", "y->x"])

# All pairs of five items of x and six of y: some items have several of the other side.
PAIRS = [(0, 0), (1, 1), (2, 1), (3, 2), (3, 3), (4, 4), (0, 5), (1, 5)]


def of_pairs(
    items: Tensor, others: Tensor, pairs: list[tuple[int, int]], own: set[tuple[int, int]], kappa: float
) -> Tensor:
    """The objective without false negatives: each pair a row, each item that is not the row's own once a negative."""
    return sum(
        term(items[i], [others[j]], [others[k] for k in range(len(others)) if (i, k) not in own], kappa)
        for i, j in pairs
    ) / len(pairs)  # type: ignore[return-value]


def both_ways(x: Tensor, y: Tensor, own: set[tuple[int, int]], kappa: float, directions: str) -> Tensor:
    turned, turned_own = [(j, i) for i, j in PAIRS], {(j, i) for i, j in own}
    there, back = of_pairs(x, y, PAIRS, own, kappa), of_pairs(y, x, turned, turned_own, kappa)
    return {"x->y": there, "y->x": back, "both": (there + back) / 2}[directions]


@each_direction
@each_exact
@pytest.mark.parametrize("further", [[], [(3, 1), (2, 0)]], ids=["ids", "ids and same"])
def test_repeated_items_of_two_towers(name: str, directions: Any, further: list[tuple[int, int]]) -> None:
    """The batch is all the data: its gradient at the items is that of the objective, on every visit."""
    make, kappa, value = WHOLE[name]
    x, y = normal(5, D, seed=1), normal(6, D, seed=2)
    expected = both_ways(x, y, {*PAIRS, *further}, kappa, directions)
    index, y_index = torch.tensor(PAIRS).T
    same = torch.tensor([[(i, j) in further for j in y_index.tolist()] for i in index.tolist()])
    loss_fn = make((5, 6), towers=2, directions=directions)
    for _ in range(3):
        loss = loss_fn(x[index], y[y_index], index, y_index=y_index, same=same if further else None)
        check(loss, expected, [x, y], value)


@each_direction
@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_the_exact_loss_is_the_objective(kappa: float, directions: Any) -> None:
    x, y = normal(5, D, seed=1), normal(6, D, seed=2)
    index, y_index = torch.tensor(PAIRS).T
    settings = {"directions": directions, "positive_mass": kappa, "index": index, "y_index": y_index}
    loss = two_tower_loss(x[index], y[y_index], 1 / BETA, **settings)
    check(loss, both_ways(x, y, {*PAIRS}, kappa, directions), [x, y])


@each_exact
def test_one_index_is_that_of_both_sides(name: str) -> None:
    make, kappa, value = WHOLE[name]
    x, y = normal(4, D, seed=1), normal(4, D, seed=2)
    index, numbers = torch.tensor([2, 0, 1, 2, 3, 0]), range(4)
    rows = index.tolist()
    there, back = (
        sum(term(a[i], [b[i]], [b[j] for j in numbers if j != i], kappa) for i in rows) / len(rows)
        for a, b in ((x, y), (y, x))
    )
    loss = make(4, towers=2)(x[index], y[index], index)
    check(loss, (there + back) / 2, [x, y], value)  # type: ignore[operator]


@pytest.mark.parametrize("by_view", [False, True])
@pytest.mark.parametrize("name", ["infonce", "dcl", "sogclr"])
def test_repeated_samples_of_one_tower(name: str, by_view: bool) -> None:
    make, kappa, value = WHOLE[name]
    z, index, same = normal(5, 2, D), torch.tensor([3, 0, 1, 3, 2, 1, 4]), torch.zeros(7, 7, dtype=torch.bool)
    same[1, 4] = True  # 0 and 2, said once
    own = {(i, i) for i in range(5)} | {(0, 2), (2, 0)}
    terms = [
        term(z[i, v], [z[i, 1 - v]], [z[j, u] for j in range(5) for u in range(2) if (i, j) not in own], kappa)
        for i in index.tolist()
        for v in range(2)
    ]
    ids = 2 * index[:, None] + torch.arange(2) if by_view else index
    loss_fn = make(10 if by_view else 5)
    for _ in range(2):
        loss = loss_fn(z[index, 0], z[index, 1], ids, same=same)
        check(loss, sum(terms) / len(terms), [z], value)  # type: ignore[arg-type]


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("kappa", [0.0, 0.4, 1.0])
def test_same_alone_will_do(kappa: float, towers: int) -> None:
    """Without ids each embedding is an item of its own."""
    x, y, same = normal(5, D, seed=1), normal(5, D, seed=2), normal(5, 5, seed=3) < -1
    if towers == 1:
        own = same | same.T | torch.eye(5, dtype=torch.bool)
        z = [x, y]
        terms = [
            term(z[v][i], [z[1 - v][i]], [z[u][j] for u in range(2) for j in range(5) if not own[i, j]], kappa)
            for v in range(2)
            for i in range(5)
        ]
    else:
        own = same | torch.eye(5, dtype=torch.bool)
        terms = [term(x[i], [y[i]], [y[j] for j in range(5) if not own[i, j]], kappa) for i in range(5)]
        terms += [term(y[i], [x[i]], [x[j] for j in range(5) if not own[j, i]], kappa) for i in range(5)]
    loss = InfoNCELoss(1 / BETA, positive_weight=kappa, towers=towers)(x, y, same=same)  # type: ignore[arg-type]
    check(loss, torch.stack(terms).mean(), [x, y])


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_several_views(kappa: float, views: int) -> None:
    z = normal(4, views, D)
    terms = [
        term(
            z[i, v],
            [z[i, u] for u in range(views) if u != v],
            [z[j, u] for j in range(4) if j != i for u in range(views)],
            kappa,
        )
        for i in range(4)
        for v in range(views)
    ]
    check(InfoNCELoss(1 / BETA, positive_weight=kappa)(z), torch.stack(terms).mean(), [z])


LABELS = torch.tensor([0, 2, 1, 0, 2, 0, 7])


@pytest.mark.parametrize("views", [2, 3])
def test_labels_are_supervised_contrastive_learning(views: int) -> None:
    """L_out of Khosla et al. 2020, as printed there: the denominator has all but the row itself."""
    z = normal(7, views, D)
    rows = [(i, v) for i in range(7) for v in range(views)]
    total = torch.zeros((), dtype=torch.float64)
    for a in rows:
        others = [b for b in rows if b != a]
        log_all = torch.logsumexp(BETA * similarity(z[a], [z[b] for b in others]), 0)
        positives = [b for b in others if LABELS[b[0]] == LABELS[a[0]]]
        for p in positives:
            total = total + (log_all - BETA * similarity(z[a], [z[p]])[0]) / len(positives) / len(rows)
    check(InfoNCELoss(1 / BETA)(z, labels=LABELS), total, [z])


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
def test_labels_of_two_towers(kappa: float) -> None:
    x, y, terms = normal(7, D, seed=1), normal(7, D, seed=2), []
    for rows, columns in ((x, y), (y, x)):
        for i in range(7):
            alike = [j for j in range(7) if LABELS[j] == LABELS[i]]
            others = [j for j in range(7) if LABELS[j] != LABELS[i]]
            terms.append(term(rows[i], [columns[j] for j in alike], [columns[j] for j in others], kappa))
    loss = InfoNCELoss(1 / BETA, positive_weight=kappa, towers=2)(x, y, labels=LABELS)
    check(loss, torch.stack(terms).mean(), [x, y])


def test_a_label_does_not_make_a_known_pair_a_positive() -> None:
    """An item that is the row's own by its id stays nothing; others of its label are positives."""
    x, y = normal(4, D, seed=1), normal(4, D, seed=2)
    index, labels = torch.tensor([0, 0, 1, 2]), torch.tensor([5, 5, 5, 6])
    y_index = torch.arange(4)
    alike = [[0, 2], [1, 2], [2, 0, 1], [3]]
    terms = [term(x[i], [y[j] for j in alike[i]], [y[j] for j in range(4) if labels[j] != labels[i]]) for i in range(4)]
    loss = DCLLoss(1 / BETA, towers=2, directions="x->y")(x, y, index, y_index=y_index, labels=labels)
    check(loss, torch.stack(terms).mean(), [x, y])


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("of_each", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_hard_negatives(kappa: float, with_ids: bool, of_each: bool, towers: int) -> None:
    """Ids that are the row's own, another row's, new, and new again."""
    x, y, index = normal(3, D, seed=1), normal(3, D, seed=2), torch.tensor([6, 0, 4])
    hard = normal(3, 4, D, seed=3) if of_each else normal(4, D, seed=3)
    hard_index = torch.tensor([6, 3, 8, 3])
    if of_each:
        hard_index = torch.stack([hard_index, torch.tensor([1, 0, 1, 4]), torch.tensor([2, 3, 5, 7])])

    def of(sample: int) -> list[Tensor]:
        rows, ids = (hard[sample], hard_index[sample]) if of_each else (hard, hard_index)
        seen, kept = set(index.tolist()) if with_ids else set(), []
        for z, i in zip(rows, ids.tolist(), strict=True):
            if not with_ids or i not in seen:
                kept.append(z)
            seen.add(i)
        return kept

    z = [x, y]
    if towers == 1:
        terms = [
            term(z[v][i], [z[1 - v][i]], [*(z[u][j] for u in range(2) for j in range(3) if j != i), *of(i)], kappa)
            for v in range(2)
            for i in range(3)
        ]
        expected = torch.stack(terms).mean()
    else:
        there = [term(x[i], [y[i]], [*(y[j] for j in range(3) if j != i), *of(i)], kappa) for i in range(3)]
        back = [term(y[i], [x[i]], [x[j] for j in range(3) if j != i], kappa) for i in range(3)]
        expected = (torch.stack(there).mean() + torch.stack(back).mean()) / 2
    loss_fn = InfoNCELoss(1 / BETA, positive_weight=kappa, towers=towers)  # type: ignore[arg-type]
    extra = {"index": index, "hard_index": hard_index} if with_ids else {}
    check(loss_fn(x, y, hard=hard, **extra), expected, [x, y, hard])


def test_hard_negatives_have_no_rows_of_the_other_direction() -> None:
    x, y = normal(3, D, seed=1), normal(3, D, seed=2)
    with pytest.raises(ValueError, match="hard"):
        InfoNCELoss(towers=2, directions="y->x")(x, y, hard=normal(2, D))


def test_hard_negatives_with_all_in_one_batch_are_exact_for_isir() -> None:
    """Of two towers each visit meets all there is: the batch, and hard negatives that have no id."""
    x, y, hard, index = normal(4, D, seed=1), normal(4, D, seed=2), normal(4, 2, D, seed=3), torch.arange(4)
    loss_fn = EMC2Loss(4, 1 / BETA, kernel="isir", towers=2, directions="x->y", num_chains=3)
    terms = [term(x[i], [y[i]], [*(y[j] for j in range(4) if j != i), *hard[i]]) for i in range(4)]
    for _ in range(4):
        check(loss_fn(x, y, index, hard=hard), torch.stack(terms).mean(), [x, y, hard], value=False)


def test_hard_negatives_that_cannot_be_are_named() -> None:
    z, index = normal(4, D, seed=1), torch.arange(4)
    loss_fn = EMC2Loss(10, 1 / BETA, towers=2)
    with pytest.raises(IndexError, match="hard_index must be at least 0 and below num_samples=10, got 10"):
        loss_fn(z, z, index, hard=normal(2, D), hard_index=torch.tensor([3, 10]))
    with pytest.raises(ValueError, match="a batch of 1 has no negatives"):  # the rows of y have none
        loss_fn(z[:1], z[:1], index[:1], hard=normal(2, D))
    alone = InfoNCELoss(1 / BETA, towers=2, directions="x->y")(z[:1], z[:1], hard=normal(2, D, seed=3))
    x, hard = (torch.nn.functional.normalize(each, dim=1) for each in (z[:1], normal(2, D, seed=3)))
    logits = BETA * torch.cat([torch.ones(1, 1, dtype=torch.float64), x @ hard.T], 1)
    torch.testing.assert_close(alone, logits.logsumexp(1)[0] - logits[0, 0])


@pytest.mark.parametrize("kappa", [0.0, 1.0, "global"])
def test_rows_without_negatives_are_refused_but_by_infonce(kappa: float | str) -> None:
    x, y, index, labels = normal(4, D, seed=1), normal(4, D, seed=2), torch.arange(4), torch.zeros(4, dtype=torch.int64)
    settings: dict[str, Any] = {"positive_weight": kappa, "towers": 2}
    for loss_fn in (
        SogCLRLoss(9, 0.1, **settings),
        EMC2Loss(9, 0.1, **settings),
        EMC2Loss(9, 0.1, kernel="isir", **settings),
    ):
        before = copy.deepcopy(loss_fn.state_dict())
        with pytest.raises(ValueError, match="a row has no negatives"):
            loss_fn(x, y, index, labels=labels)
        torch.testing.assert_close(loss_fn.state_dict(), before, rtol=0, atol=0)
    loss_fn = InfoNCELoss(1 / BETA, num_samples=9, **settings)
    if kappa != 1.0:
        with pytest.raises(ValueError, match="a row has no negatives"):
            loss_fn(x, y, labels=labels)
        return
    positives = [similarity(x[i], list(y)) for i in range(4)] + [similarity(y[i], list(x)) for i in range(4)]
    terms = [(BETA * s).logsumexp(0) - BETA * s.mean() for s in positives]
    check(loss_fn(x, y, labels=labels), torch.stack(terms).mean(), [x, y])
    assert float(loss_fn.last["global_loss"]) == 0


@pytest.mark.parametrize("directions", ["both", "x->y", "y->x"])
@pytest.mark.parametrize("size", [9, None])
def test_a_saved_direction_is_loaded(size: int | None, directions: Any) -> None:
    x, y, index = normal(4, D, seed=1).detach(), normal(4, D, seed=2).detach(), torch.arange(4)
    saved, loaded = (EMC2Loss(size, 0.1, towers=2, directions=directions) for _ in range(2))
    for _ in range(2):
        saved(x, y, index)
    loaded.load_state_dict(saved.state_dict())
    torch.testing.assert_close(loaded(x, y, index), saved(x, y, index), rtol=0, atol=0)
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)


def test_repeated_ids_need_no_default_dtype() -> None:
    x, y, index = normal(5, D, seed=1), normal(5, D, seed=2), torch.tensor([0, 1, 1, 2, 3])
    losses: list[Callable[[], ContrastiveLoss]] = [
        lambda: InfoNCELoss(0.3),
        lambda: SogCLRLoss(9, 0.3),
        lambda: EMC2Loss(9, 0.3, kernel="isir"),
        lambda: NegativeCacheLoss(9, D, 0.3),
        lambda: MomentumLoss(0.3),
    ]
    for build in losses:
        further = {"slow": (x, y)} if build().needs_slow else {}
        values = []
        for dtype in (torch.float32, torch.float64):
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                loss_fn = build()
                values.append([loss_fn(x, y, index, **further).detach() for _ in range(3)])
            finally:
                torch.set_default_dtype(before)
        torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("given", [{"y": [[1.0]]}, {"hard": [[1.0]]}, {"same": np.eye(3, dtype=bool)}])
def test_what_is_no_tensor_is_refused_by_its_name(given: dict[str, Any]) -> None:
    x = torch.randn(3, 4)
    (name,) = given
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got "):
        InfoNCELoss()(x, **({"y": x} | given))
