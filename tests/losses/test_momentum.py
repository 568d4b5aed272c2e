"""Momentum: slow positives and a queue. Its steps beside loops are in `test_one_tower` and `test_two_towers`."""

import copy
from typing import Any

import pytest
import torch
from side_by_side import check_memory, follow
from slow import Batch, Momentum
from slowed import slow_of
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, MomentumLoss, UniformityLoss, cached_backward
from torch_emc2.diagnostics import at_rest, gradient_error
from torch_emc2.losses import ContrastiveLoss
from torch_emc2.losses.momentum import ema_decay

B, D = 6, 5


def batch(step: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).unbind()
    return x, y


def slow(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return slow_of(x), slow_of(y)


@pytest.mark.parametrize("towers", [1, 2])
def test_without_ids_all_that_is_queued_is_a_negative(towers: Any) -> None:
    batches = [Batch(x, y, slow=slow(x, y)) for x, y in map(batch, range(4))]
    fast, loops = MomentumLoss(0.2, queue_size=17, towers=towers), Momentum(17, towers=towers)
    follow(fast, loops, batches)
    check_memory(fast, loops)


def test_it_is_dcl_or_infonce_where_slow_is_the_batch_s_own_and_nothing_is_queued() -> None:
    """In value; of the gradient the positives' own part is missing, which are constants."""
    x, y = batch(0)
    for kappa, plain in ((0.0, DCLLoss(0.3)), (1.0, InfoNCELoss(0.3))):
        loss_fn = MomentumLoss(0.3, queue_size=0, positive_weight=kappa)
        for _ in range(2):
            torch.testing.assert_close(loss_fn(x, y, slow=(x, y)), plain(x, y))


def test_a_queue_of_everything_is_the_softmax_over_everything() -> None:
    """At an encoder that does not move a batch of 2 has the weights of all, by the exact sum."""
    z = torch.nn.functional.normalize(torch.randn(20, 2, D, dtype=torch.float64), dim=2)
    loss_fn = MomentumLoss(0.5, queue_size=40)
    for index in torch.arange(20).split(2):
        loss_fn(z[index, 0], z[index, 1], index, slow=(z[index, 0], z[index, 1]))
    found = loss_fn.eval()(z[:2, 0], z[:2, 1], torch.arange(2), slow=(z[:2, 0], z[:2, 1]))
    rows, expected = z.flatten(0, 1), []
    for i in range(4):
        others = [j for j in range(40) if j // 2 != i // 2]
        logits = (rows[i] @ rows[others].T / 0.5).logsumexp(0)
        expected.append(logits - rows[i] @ rows[i ^ 1] / 0.5)
    torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-6, atol=1e-6)


def test_a_queue_keeps_the_last_ones_across_a_save() -> None:
    whole, first = MomentumLoss(0.2, queue_size=20), MomentumLoss(0.2, queue_size=20)
    for step in range(3):
        x, y = batch(step)
        whole(x, y, torch.arange(B) + 3 * step, slow=slow(x, y))
        first(x, y, torch.arange(B) + 3 * step, slow=slow(x, y))
    second = MomentumLoss(0.2, queue_size=20)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    x, y = batch(3)
    for loss_fn in (whole, second):
        assert loss_fn.sides[0].ids[:, 0].tolist() == sorted([*range(6, 12)] * 2) + sorted([*range(3, 7)] * 2)
    torch.testing.assert_close(*(each(x, y, slow=slow(x, y)) for each in (whole, second)), rtol=0, atol=0)
    empty = first.get_extra_state() | {"ids": torch.empty(20, 0, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"the saved queue is damaged: it needs ids \(k, 1 \+ p\)"):
        second.load_state_dict({"_extra_state": empty})
    with pytest.raises(ValueError, match="the saved queue has 20 embeddings, this loss queue_size=8"):
        MomentumLoss(0.2, queue_size=8).load_state_dict(first.state_dict())


def test_what_is_forgotten_leaves_the_queue() -> None:
    loss_fn = MomentumLoss(0.2)
    x, y = batch(0)
    loss_fn(x, y, torch.arange(B), slow=slow(x, y))
    loss_fn.forget(torch.tensor([0, 2, 4, 77]))
    assert loss_fn.sides[0].ids[:, 0].tolist() == [1, 1, 3, 3, 5, 5]
    torch.testing.assert_close(
        loss_fn.sides[0].vectors.double(),
        torch.nn.functional.normalize(torch.stack([each[1::2] for each in slow(x, y)], 1).flatten(0, 1)),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, ValueError, r"^MomentumLoss needs the batch's embeddings by a momentum encoder, loss\(x, y, slow="),
        (torch.ones(B, D), TypeError, "slow must be a pair of tensors, of x and of y, got Tensor"),
        ((torch.ones(B, D),), TypeError, "slow must be a pair"),
        (
            (torch.ones(B, D), torch.ones(B, D + 1)),
            ValueError,
            r"slow\[1\] must be \(6, 5\), one for each embedding, got",
        ),
        ((torch.ones(B, D), [1.0]), TypeError, r"slow\[1\] must be embeddings, .*, got list"),
        ((torch.ones(B, D).long(), torch.ones(B, D)), TypeError, r"slow\[0\] must be .*, got torch.int64"),
        ((torch.ones(B, D), torch.zeros(B, D)), ValueError, r"slow\[1\]\[0\] has length 0"),
        ((torch.ones(B, D, device="meta"), torch.ones(B, D)), ValueError, r"slow\[0\] must be on the device of x, cpu"),
    ],
)
def test_bad_slow_embeddings_are_named(given: Any, error: type[Exception], message: str) -> None:
    loss_fn = MomentumLoss(0.2)
    x, y = batch(0)
    loss_fn(x, y, slow=(x, y))
    before = copy.deepcopy(loss_fn.state_dict())
    with pytest.raises(error, match=message):
        loss_fn(x, y, slow=given)
    torch.testing.assert_close(loss_fn.state_dict(), before, rtol=0, atol=0)


def test_of_several_views_slow_is_as_they_are() -> None:
    z = torch.randn(B, 3, D)
    loss_fn = MomentumLoss(0.2)
    loss_fn(z, slow=slow_of(z))
    with pytest.raises(TypeError, match="slow must be embeddings, a tensor of a floating-point dtype, got tuple"):
        loss_fn(z, slow=(z, z))
    with pytest.raises(ValueError, match=r"slow\[2, 1\] is not finite"):
        loss_fn(z, slow=z.masked_fill(torch.arange(3 * B).view(B, 3, 1) == 7, torch.nan))


def test_other_losses_have_no_use_for_slow_embeddings() -> None:
    x, y = batch(0)
    for loss_fn in (DCLLoss(0.2), InfoNCELoss(0.2), UniformityLoss(0.2), EMC2Loss(9)):
        assert isinstance(loss_fn, ContrastiveLoss)
        with pytest.raises(
            ValueError, match=f"{type(loss_fn).__name__} has no use for slow embeddings: MomentumLoss has"
        ):
            loss_fn(x, y, torch.arange(B), slow=(x, y))


def test_what_cannot_be_set_is_refused() -> None:
    with pytest.raises(ValueError, match="queue_size must be at least 0, got -1"):
        MomentumLoss(queue_size=-1)
    with pytest.raises(TypeError, match=r"queue_size must be an int, got 2\.5"):
        MomentumLoss(queue_size=2.5)  # type: ignore[arg-type]
    x, y = batch(0)
    with pytest.raises(ValueError, match="labels are not known of what is queued"):
        MomentumLoss()(x, y, slow=(x, y), labels=torch.arange(B))
    loss_fn = MomentumLoss()
    loss_fn(x, y, slow=(x, y))
    with pytest.raises(ValueError, match="the queue holds embeddings of 5 dimensions, the batch's have 4"):
        loss_fn(x[:, 1:], y[:, 1:], slow=(x[:, 1:], y[:, 1:]))


def test_slow_embeddings_are_constants() -> None:
    x, y = batch(0)
    given = [each.requires_grad_() for each in slow(x, y)]
    leaf = x.clone().requires_grad_()
    MomentumLoss(0.2)(leaf, y, slow=given).backward()
    assert leaf.grad is not None
    assert all(each.grad is None for each in given)


def test_a_step_in_chunks_is_the_plain_step() -> None:
    torch.manual_seed(0)
    encoder = nn.Linear(7, D).double()
    average = AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    losses, gradients = [MomentumLoss(0.2), MomentumLoss(0.2)], []
    for in_chunks, loss_fn in enumerate(losses):
        encoder.zero_grad()
        for step in range(2):
            views = torch.randn(2, B, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).unbind()
            with torch.no_grad():
                given = average(views[0]), average(views[1])
            if in_chunks:
                cached_backward(loss_fn, encoder, views, chunk_size=2, slow=given)
            else:
                loss_fn(encoder(views[0]), encoder(views[1]), slow=given).backward()
        gradients.append(encoder.weight.grad)
    torch.testing.assert_close(*gradients)


def test_at_rest_the_momentum_encoder_is_the_encoder() -> None:
    x, y = batch(0)
    loss_fn, same = MomentumLoss(0.2), MomentumLoss(0.2)
    torch.testing.assert_close(at_rest(loss_fn)(x, y, torch.arange(B)), same(x, y, torch.arange(B), slow=(x, y)))
    plain = DCLLoss(0.2)
    assert at_rest(plain) is plain
    z = torch.randn(12, 2, D, dtype=torch.float64)
    error = gradient_error(lambda seed: MomentumLoss(0.5), z, 0.5, 4, epochs=2, mixing_epochs=1, runs=2)
    assert error.one_epoch > 0


def test_what_an_item_was_paired_with_is_no_negative_of_it_later() -> None:
    """An image with several captions: those of an earlier batch are its own."""
    generator = torch.Generator().manual_seed(0)
    x, first, second = torch.randn(3, B, D, dtype=torch.float64, generator=generator).unbind()
    for towers in (1, 2):
        fresh, used = (MomentumLoss(0.1, towers=towers) for _ in range(2))  # type: ignore[arg-type]

        def given(loss_fn: MomentumLoss, y: Tensor, y_ids: Tensor) -> Tensor:
            ids = torch.arange(B)
            if loss_fn.towers == 1:
                return loss_fn(x, y, torch.stack([ids, y_ids], 1), slow=(x, y))
            return loss_fn(x, y, ids, y_index=y_ids, slow=(x, y))

        given(used, first, torch.arange(100, 100 + B))
        expected, found = (given(each, second, torch.arange(200, 200 + B)) for each in (fresh, used))
        torch.testing.assert_close(found, expected)


def test_slow_embeddings_keep_their_precision_beside_an_encoder_of_half_of_it() -> None:
    x, y = batch(0)
    exact = tuple(1e5 * each.float() for each in slow(x, y))  # beyond float16
    for dtype in (torch.bfloat16, torch.float16):
        loss_fn = MomentumLoss(0.2)
        loss_fn(x.to(dtype), y.to(dtype), slow=exact)
        expected = torch.nn.functional.normalize(torch.stack(exact, 1).flatten(0, 1))
        torch.testing.assert_close(loss_fn.sides[0].vectors, expected, rtol=1e-6, atol=1e-6)


def test_a_queue_is_no_longer_than_it_is_said_to_be() -> None:
    for length in (0, 4, 12, 15):
        loss_fn = MomentumLoss(0.2, queue_size=length)
        for step in range(3):
            x, y = batch(step)
            loss_fn(x, y, slow=slow(x, y))
        (queue,) = loss_fn.sides
        assert len(queue.ids) == len(queue.vectors) == length
        assert queue.vectors.untyped_storage().nbytes() == 4 * D * length


@pytest.mark.parametrize("towers", [1, 2])
def test_an_item_of_several_anchors_is_no_negative_of_any_of_them(towers: Any) -> None:
    """Whichever of its entries in the queue has the anchor for a partner."""
    x, y, last = torch.randn(3, B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    y[1] = y[0]

    def call(loss_fn: MomentumLoss, queries: list[int], keys: list[int], z: Tensor) -> Tensor:
        index, y_index = torch.tensor(queries), torch.tensor(keys)
        if towers == 1:
            return loss_fn(x, z, torch.stack([index, y_index], 1), slow=(x, z))
        return loss_fn(x, z, index, y_index=y_index, slow=(x, z))

    used = MomentumLoss(0.1, towers=towers)
    call(used, [1, 2, 3, 4, 5, 6], [101, 101, 103, 104, 105, 106], y)
    keys = [200, 203, 204, 205, 206, 207]
    found = call(used, [1, 3, 4, 5, 6, 7], keys, last)
    used_without = MomentumLoss(0.1, towers=towers)
    call(used_without, [1, 2, 3, 4, 5, 6], [101, 101, 103, 104, 105, 106], y)
    used_without.sides[0].forget(torch.tensor([101]))
    used_without.sides[-1].forget(torch.tensor([101]))
    torch.testing.assert_close(found, call(used_without, [1, 3, 4, 5, 6, 7], keys, last))


@pytest.mark.parametrize("queue_size", [7, 12, 20])
def test_the_views_are_queued_alike(queue_size: int) -> None:
    loss_fn, ids = MomentumLoss(0.2, queue_size=queue_size), torch.arange(2 * B).view(B, 2)
    for step in range(3):
        x, y = batch(step)
        loss_fn(x, y, ids + 2 * B * step, slow=(x, y))
    kept = loss_fn.sides[0].ids[:, 0]
    assert len(kept) == queue_size
    assert abs(2 * int((kept % 2 == 0).sum()) - queue_size) <= 1


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("by_view", [False, True])
def test_of_what_is_queued_twice_the_newer_counts(towers: Any, by_view: bool) -> None:
    """A queue longer than the data holds no item more than once: κ = n / N stays at most 1."""
    generator, loss_fn = torch.Generator().manual_seed(0), MomentumLoss(0.3, queue_size=100, towers=towers)
    last: dict[int, tuple[Tensor, Tensor]] = {}
    for step in range(7):
        samples = torch.randperm(10, generator=generator)[:4]
        x, y = torch.randn(2, 4, D, dtype=torch.float64, generator=generator).unbind()
        index = torch.stack([2 * samples, 2 * samples + 1], 1) if by_view and towers == 1 else samples
        found = loss_fn(x, y, index, slow=(x, y))
        terms = []
        unit = {
            int(s): nn.functional.normalize(torch.stack(pair), dim=1) for s, *pair in zip(samples, x, y, strict=True)
        }
        seen = {s: z for s, z in last.items() if s not in unit} | unit
        for sample, pair in unit.items():
            for view in (0, 1):
                others = torch.stack([z for s, both in seen.items() if s != sample for z in both])
                if towers == 2:
                    others = others[1 - view :: 2]
                logits = others @ pair[view] / 0.3
                terms.append(logits.logsumexp(0) - pair[view] @ pair[1 - view] / 0.3)
        torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-6, atol=1e-6, msg=f"step {step}")
        last |= {s: z.float().double() for s, z in unit.items()}


@pytest.mark.parametrize("towers", [1, 2])
def test_a_queue_gives_negatives_to_a_batch_without_any(towers: Any) -> None:
    """The last batch of an epoch, or one of a single item."""
    x, y = batch(0)
    last_x, last_y = (nn.functional.normalize(each, dim=1) for each in batch(1))
    for size, index in ((1, [9]), (2, [9, 9])):
        loss_fn = MomentumLoss(0.3, queue_size=20, towers=towers)
        z1, z2 = x[:size], y[:size]
        with pytest.raises(ValueError, match=r"a batch of 1 has no negatives|a row has no negatives"):
            loss_fn(z1, z2, torch.tensor(index), slow=(z1, z2))
        loss_fn(last_x, last_y, torch.arange(B), slow=(last_x, last_y))
        found = loss_fn(z1, z2, torch.tensor(index), slow=(z1, z2))
        terms = []
        for i in range(size):
            pair = nn.functional.normalize(torch.stack([x[i], y[i]]), dim=1)
            for view, others in enumerate((last_y, last_x)):
                others = torch.cat([last_x, last_y]) if towers == 1 else others
                logits = others @ pair[view] / 0.3
                terms.append(logits.logsumexp(0) - pair[view] @ pair[1 - view] / 0.3)
        torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("towers", [1, 2])
def test_last_says_how_far_the_slow_encoder_is(towers: Any) -> None:
    x, y = batch(0)
    loss_fn, given = MomentumLoss(0.3, towers=towers), slow(x, y)
    loss_fn(x, y, slow=given)
    cosines = [
        nn.functional.cosine_similarity(*pair, dim=0) for pair in zip([*x, *y], [*given[0], *given[1]], strict=True)
    ]
    torch.testing.assert_close(loss_fn.last["slow_similarity"], torch.stack(cosines).mean())


def test_the_decay_averages_so_many_samples() -> None:
    """A hundred steps, or 3,200 samples where those are fewer."""
    for batch_size in (4, 32, 64, 128, 256, 512):
        assert 1 / (1 - ema_decay(batch_size)) == pytest.approx(min(100, 3200 / batch_size))
    assert ema_decay(10_000) == 0.5
