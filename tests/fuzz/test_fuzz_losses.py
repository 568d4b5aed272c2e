"""Any call of a loss gives a finite loss and gradient, or an error that says something and has changed nothing."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from fuzzing import fuzz, refusal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, NegativeCacheLoss, SogCLRLoss, cached_backward
from torch_emc2.kernels import Isir, Metropolis

M = 12
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OTHERS = [torch.int64, torch.bool, torch.complex64, torch.uint8]
JUNK = st.sampled_from([None, "0.1", True, float("nan"), float("inf"), -1, 0, 0.0, 1j, [1], 2**63, 1.5])

mostly = st.sampled_from([True] * 7 + [False])
temperatures = st.sampled_from([1e-4, 0.01, 0.07, 1.0, 1e4])


@st.composite
def losses(draw: st.DrawFn) -> Any:
    """A loss, or the error of building it."""
    num_samples = draw(st.sampled_from([M, M, M, None])) if draw(mostly) else draw(JUNK)
    temperature = draw(temperatures) if draw(mostly) else draw(JUNK)
    burn_in = draw(st.floats(0, 1)) if draw(mostly) else draw(JUNK)
    num_chains = draw(st.integers(1, 3)) if draw(mostly) else draw(JUNK)
    make = draw(
        st.sampled_from([
            lambda: InfoNCELoss(temperature),
            lambda: DCLLoss(temperature),
            lambda: SogCLRLoss(num_samples, temperature, burn_in),
            lambda: NegativeCacheLoss(num_samples, num_chains, temperature, refresh_fraction=burn_in),
            *(
                lambda carry=carry, kernel=kernel: EMC2Loss(
                    num_samples, temperature, kernel=kernel(), num_chains=num_chains, carry=carry
                )
                for carry in ("encode", "encode_if_used", "cache", "drop")
                for kernel in (lambda: Metropolis(burn_in), Isir)
            ),
        ])
    )  # fmt: skip
    return refusal("losses built", make)[0]


@st.composite
def matrices(draw: st.DrawFn, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    shape = (rows, columns) if draw(mostly) else tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    large = 10 ** draw(st.sampled_from([0, 0, 0, -3, 3]))
    z = large * torch.randn(shape, dtype=torch.float64, generator=generator)
    if z.numel() and not draw(mostly):
        z.view(-1)[draw(st.integers(0, z.numel() - 1))] = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    if len(z.shape) == 2 and rows and not draw(mostly):
        z[: draw(st.integers(0, rows))] = draw(st.sampled_from([0.0, 1.0]))  # collapsed, or of no direction
    return z.to(dtype if draw(mostly) else draw(st.sampled_from(FLOATS + OTHERS)))


@st.composite
def indices(draw: st.DrawFn, rows: int) -> Tensor | None:
    size = rows * draw(st.sampled_from([1, 2]))
    index = torch.tensor(draw(st.permutations(range(M)))[:size])
    if size == 2 * rows and size <= M:
        index = index.view(rows, 2)
    if draw(mostly):
        return index
    spoilt = index.clone()
    if spoilt.numel():
        spoilt.view(-1)[draw(st.integers(0, spoilt.numel() - 1))] = draw(
            st.sampled_from([-1, M, 0, 1, 2**40 * 3, -(2**63), 2**63 - 1])
        )
    narrow = st.sampled_from([torch.int8, torch.uint8, torch.int32, torch.float32, torch.bool, torch.complex64])
    return draw(st.sampled_from([None, spoilt, index.to(draw(narrow)), index[:-1], index[:, None], index[:0]]))


@st.composite
def encodes(draw: st.DrawFn, columns: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    weights = torch.randn(M, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)
    weights.requires_grad_()

    def fail(ids: Tensor) -> Tensor:
        raise ValueError("no such image")

    good = lambda ids: weights[ids % M]  # noqa: E731
    if draw(mostly):
        return good
    return draw(
        st.sampled_from([
            None,
            fail,
            lambda ids: good(ids)[:-1],
            lambda ids: good(ids)[:, None].repeat(1, 2, 1),
            lambda ids: good(ids) * torch.nan,
            lambda ids: good(ids) * 0,
            lambda ids: good(ids).long(),
            lambda ids: good(ids).float().detach(),
        ])
    )  # fmt: skip


@fuzz(600)
@given(st.data())
def test_calls(data: st.DataObject) -> None:
    loss_fn = data.draw(losses())
    if loss_fn is None:
        return
    columns = data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from(FLOATS))
    for _ in range(data.draw(st.integers(1, 3))):
        rows = data.draw(st.integers(1, 6))
        z = [data.draw(matrices(rows, columns, dtype)) for _ in range(2)]
        index, encode = data.draw(indices(rows)), data.draw(encodes(columns, dtype))
        loss_fn.train(data.draw(mostly))
        inputs = [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in z]
        before = copy.deepcopy(loss_fn.state_dict())
        if data.draw(mostly):

            def call(inputs=inputs, index=index, encode=encode) -> Tensor:
                loss = loss_fn(*inputs, index, encode=encode)
                loss.backward()
                return loss

        else:
            chunk_size = data.draw(st.integers(0, 4))

            def call(z=z, index=index, encode=encode, chunk_size=chunk_size) -> Tensor:
                views, scale = [x.detach() for x in z], torch.ones((), dtype=torch.float64, requires_grad=True)
                return cached_backward(loss_fn, lambda x: x * scale, views, index, chunk_size=chunk_size, encode=encode)

        loss, words = refusal("calls of losses", call)
        if words:
            torch.testing.assert_close(loss_fn.state_dict(), before, rtol=0, atol=0, equal_nan=True)
            continue
        assert loss.isfinite()
        halves = (torch.float16, torch.bfloat16)  # whose gradient may overflow
        assert all(x.grad.isfinite().all() for x in inputs if x.grad is not None and x.dtype not in halves)
