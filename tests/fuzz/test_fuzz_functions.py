"""The functions below the losses: a finite result, or an error that says something."""

import pytest
import torch
from fuzzing import fuzz, refusal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_emc2 import InfoNCELoss
from torch_emc2.diagnostics import clustered_embeddings, gradient_error
from torch_emc2.evaluation import accuracies, label_free_numbers
from torch_emc2.exact import global_backward, global_contrastive_loss, two_tower_loss
from torch_emc2.kernels.metropolis import metropolis_hastings

mostly = st.sampled_from([True] * 7 + [False])
dtypes = st.sampled_from([torch.float32, torch.float64])
others = st.sampled_from([torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if not draw(mostly):
        shape = draw(shapes)
    tensor = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    tensor *= 10.0 ** draw(st.integers(-3, 4))
    if tensor.numel() and not draw(mostly):
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(st.sampled_from([-torch.inf, 0.0]))
    return tensor.to(dtype if draw(mostly) else draw(others))


@fuzz(300)
@given(st.data())
def test_metropolis_hastings(data: st.DataObject) -> None:
    rows, steps, dtype = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 9)), data.draw(dtypes)
    log_scores, entry = data.draw(tensors((rows, steps), dtype)), data.draw(tensors((rows,), dtype))
    noise = data.draw(tensors((rows, steps), dtype))
    if noise.is_floating_point():
        noise = noise.abs().nan_to_num(posinf=1.0)  # finite by contract
    valid = data.draw(st.sampled_from([None, torch.rand(rows, steps) < 0.5, torch.ones(rows, steps)]))
    path, _ = refusal("metropolis_hastings", lambda: metropolis_hastings(log_scores, entry, noise, valid))
    if path is None:
        return
    state, score = path
    assert state.shape == log_scores.shape
    for row in range(rows):  # the loop
        at, current = -1, entry[row].item()
        for k in range(steps):
            x = log_scores[row, k].item()
            allowed = valid is None or bool(valid[row, k])
            if allowed and current < (log_scores[row, k] + noise[row, k]).item():
                at, current = k, x
            assert state[row, k] == at
        assert score[row].item() == current


@fuzz(300)
@given(st.data())
def test_exact(data: st.DataObject) -> None:
    z = data.draw(tensors((data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3)), 3), data.draw(dtypes)))
    temperature = data.draw(st.sampled_from([0.05, 1.0, 1e3]))
    chunk_size = data.draw(st.sampled_from([None, None, 1, 2, 100, 0, -1]))
    mass = data.draw(st.sampled_from([0.0, 0.0, 1.0, 1e3, -1.0]))
    loss, _ = refusal(
        "exact", lambda: global_contrastive_loss(z, temperature, chunk_size=chunk_size, positive_mass=mass)
    )
    assert loss is None or loss.isfinite()


@fuzz(300)
@given(st.data())
def test_two_towers(data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 6))
    x, y = (data.draw(tensors((m, 3), data.draw(dtypes))) for _ in range(2))
    ids = st.none() | st.lists(st.integers(-1, 3), min_size=m, max_size=m).map(torch.tensor)
    index, y_index = data.draw(ids), data.draw(ids)
    temperature = data.draw(st.sampled_from([0.05, 1.0, 1e3]))
    chunk_size = data.draw(st.sampled_from([None, 1, 2, 100]))
    mass = data.draw(st.sampled_from([0.0, 1.0, 1e3]))
    loss, _ = refusal(
        "two towers",
        lambda: two_tower_loss(
            x, y, temperature, positive_mass=mass, index=index, y_index=y_index, chunk_size=chunk_size
        ),
    )
    assert loss is None or loss.isfinite()


def test_exact_backward_of_an_encoder_that_gives_nonsense() -> None:
    for embed in (lambda ids: torch.zeros(len(ids), 4), lambda ids: torch.zeros(len(ids), 1, 4)):
        with pytest.raises(ValueError, match="z must be"):
            global_backward(embed, 5, 0.1)


@fuzz(100)
@given(st.data())
def test_evaluation(data: st.DataObject) -> None:
    n, q, d = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    numbers = st.sampled_from([0, 0, 0, 1, 1, 2, 7, 10**8]) if data.draw(mostly) else st.integers(-(10**18), 10**18)
    dtype = data.draw(st.sampled_from([torch.int64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32]))

    def labels(count: int) -> Tensor:
        return torch.tensor(data.draw(st.lists(numbers, min_size=count, max_size=count))).to(dtype)

    x, y = (data.draw(tensors((count, d), data.draw(dtypes))) for count in (n, q))
    found, _ = refusal("accuracies", lambda: accuracies(x, labels(n), y, labels(q), ks=(1, 3)))
    if found is not None:
        measured, notes = found
        assert all(0 <= share <= 1 for share in measured.values())
        assert "knn1_cosine" in measured
        assert "probe" in measured or notes
    views = data.draw(tensors((n, 2, d), torch.float32))
    free, _ = refusal("label-free numbers", lambda: label_free_numbers(x, views))
    assert free is None or torch.tensor(list(free.values())).isfinite().all()


@fuzz(60)
@given(
    st.integers(2, 8), st.integers(2, 4), st.integers(1, 10), st.sampled_from(["sample", "view"]),
    st.integers(1, 2), st.integers(2, 3),
)  # fmt: skip
def test_gradient_error(samples: int, dim: int, batch_size: int, ids: str, epochs: int, runs: int) -> None:
    z = clustered_embeddings(samples, dim, clusters=2)
    error, _ = refusal(
        "diagnostics",
        lambda: gradient_error(
            lambda seed: InfoNCELoss(), z, 0.07, batch_size, ids=ids, epochs=epochs, mixing_epochs=1, runs=runs
        ),
    )
    assert error is None or torch.isfinite(torch.tensor([error.one_epoch, error.squared_bias])).all()
