"""One step on a batch that is larger than memory: embed in chunks, twice (GradCache, Gao et al. 2021).

A contrastive loss couples all samples of a batch, but only through their embeddings, which are small. So the embeddings
are computed first, chunk by chunk and without graph. The loss is called once on all of them and gives the gradient at
each. Then each chunk is embedded again, with graph, and its gradient is propagated to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Batch", "cached_backward", "in_chunks"]

Batch = Tensor | Mapping[str, Any]
"""Inputs of an encoder: (b, …), or a dictionary of tensors (b, …) by name, as a tokenizer returns them."""

_RandomState = tuple[Tensor, Tensor | None]  # of the CPU, and of the current CUDA device
_Encoder = Callable[[Any], Tensor]


def cached_backward(
    loss_fn: Callable[..., Tensor],
    encoder: _Encoder | tuple[_Encoder, _Encoder],
    views: tuple[Batch, Batch],
    index: Tensor | None = None,
    *,
    chunk_size: int,
    encode: _Encoder | tuple[_Encoder | None, _Encoder | None] | None = None,
    **further: Any,
) -> Tensor:
    """Do ``loss_fn(encoder(views[0]), encoder(views[1]), index, …).backward()`` chunk by chunk.

    Gradients are added to ``.grad``, as by ``backward()``. Memory holds the graph of one chunk instead of the batch's,
    at the price of a second forward pass. The loss is called once, on the whole batch: its chains and averages move as
    in a plain step. Both passes draw the same dropout (from saved random states of the CPU and the current CUDA
    device). Anything else that a forward pass in training mode changes is changed twice.

    Args:
        loss_fn: any loss of this package, or a callable like it. With a `GradScaler` pass
            ``lambda *args, **kwargs: scaler.scale(loss_fn(*args, **kwargs))``; the loss returned is then scaled too.
        encoder: function from inputs (n, …) to embeddings (n, d), each row by itself. If it is wrapped in
            `DistributedDataParallel`, gradients are averaged with the last chunk only. With two towers a pair.
        views: the batch's first and second views, or both sides, without graph: tensors (b, …), or dictionaries of such
            tensors, as a tokenizer returns them. The encoder is given the same with a chunk of rows.
        index: (b,) or (b, 2) ids as the loss takes them; leave it out for a loss that needs none.
        chunk_size: number of inputs embedded at a time, of a view or for ``encode``.
        encode: function from ids (k,) to embeddings (k, d), as the loss takes it, with two towers a pair; also run in
            chunks.
        further: the loss's other arguments, such as ``y_index`` or ``logit_scale``.

    Returns:
        The loss, a scalar without graph.

    Raises:
        ValueError: ``chunk_size`` is less than 1, views have a graph, or the encoder has batch norms in training mode:
            their statistics would be a chunk's, which changes the gradient, and would be updated twice.
        ValueError, IndexError, TypeError: from the loss; no ``.grad`` has changed.
        RuntimeError: what the encoder returns does not require grad.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    for view in views:
        _require_chunks(view)
    encoders = encoder if isinstance(encoder, tuple) else (encoder, encoder)
    for each in encoders:
        _refuse_batch_norm(each)
    embedded: list[_Embedded] = []

    def embed(function: _Encoder, inputs: Batch) -> Tensor:
        chunks, states, parts = in_chunks(inputs, chunk_size), [], []
        with torch.no_grad():
            for chunk in chunks:
                states.append(_random_state())
                parts.append(_embedded(function, chunk))
            whole = torch.cat(parts)
        if torch.is_grad_enabled():  # a loss may ask for constants
            embedded.append(_Embedded(function, chunks, states, [len(part) for part in parts], whole.requires_grad_()))
        return whole

    def embedding(function: _Encoder | None) -> _Encoder | None:
        return None if function is None else partial(embed, function)

    first, second = (embed(each, view) for each, view in zip(encoders, views, strict=True))
    if encode is not None:
        further["encode"] = tuple(map(embedding, encode)) if isinstance(encode, tuple) else embedding(encode)
    loss = loss_fn(first, second, *(() if index is None else (index,)), **further)
    loss.backward()  # type: ignore[no-untyped-call]

    torch.clear_autocast_cache()  # it holds weights that were cast without graph
    again = [step for whole in reversed(embedded) for step in whole.steps()]  # the last are the encoders'
    stepped = False
    last = {id(function): number for number, (function, *_) in enumerate(again)}
    for number, (function, chunk, state, gradient) in enumerate(again):
        waiting = [_no_sync(each) for each in set(encoders) if number != last.get(id(each))]
        with ExitStack() as contexts:
            contexts.enter_context(_drawing_from(state))
            for context in waiting:
                contexts.enter_context(context)
            part = function(_copy(chunk))
            if part.requires_grad:  # a tower, or `encode`, may be constant
                part.backward(gradient)  # type: ignore[no-untyped-call]
                stepped = True
    if again and not stepped:
        raise RuntimeError("what the encoder returns does not require grad: there is nothing to train")
    return loss.detach()


def in_chunks(inputs: Batch, size: int) -> tuple[Batch, ...]:
    """Split a batch into chunks. Each tensor of a dictionary is split; everything else in it goes with every chunk."""
    if isinstance(inputs, Tensor):
        return torch.split(inputs, size)
    rows = _rows(inputs)
    chunks = [slice(start, start + size) for start in range(0, max(1, rows), size)]
    return tuple(
        {name: each[chunk] if isinstance(each, Tensor) else each for name, each in inputs.items()} for chunk in chunks
    )


def _rows(inputs: Batch) -> int:
    return len(inputs if isinstance(inputs, Tensor) else next(e for e in inputs.values() if isinstance(e, Tensor)))


def _embedded(function: _Encoder, chunk: Batch) -> Tensor:
    """Embed a chunk, and check that there is one embedding for each of its rows."""
    part = function(_copy(chunk))
    if len(part) != _rows(chunk):
        raise ValueError(
            f"the encoder returned {len(part)} embeddings for {_rows(chunk)} inputs: of inputs by name only tensors "
            "(b, …) are split, everything else goes with every chunk"
        )
    return part


def _copy(chunk: Batch) -> Batch:
    """Copy a dictionary for one pass: what an encoder removes from it, or adds, does not reach the next pass."""
    return chunk if isinstance(chunk, Tensor) else dict(chunk)


def _require_chunks(view: Batch) -> None:
    """Raise ValueError if a view cannot be split."""
    if not isinstance(view, Tensor | Mapping):
        raise TypeError(f"views must be tensors (b, …), or dictionaries of such, got {type(view).__name__}")
    tensors = [view] if isinstance(view, Tensor) else [each for each in view.values() if isinstance(each, Tensor)]
    if any(each.requires_grad for each in tensors):
        raise ValueError("views must have no graph, which chunks could not share: detach() them")
    if any(each.ndim == 0 for each in tensors):
        raise ValueError("views must be (b, …), got a single number")
    if len(lengths := {len(each) for each in tensors}) != 1:
        raise ValueError(f"a view by name must hold tensors (b, …) of one length, got {sorted(lengths) or 'none'}")


class _Embedded(NamedTuple):
    """What one call has embedded without graph, and all that it takes to do it again."""

    function: _Encoder
    chunks: tuple[Batch, ...]
    states: list[_RandomState]  # before each chunk
    sizes: list[int]  # of each chunk's embeddings
    whole: Tensor

    def steps(self) -> Iterator[tuple[_Encoder, Batch, _RandomState, Tensor]]:
        """Yield for each chunk: the function, its input, the random state before it, the gradient at its output."""
        if self.whole.grad is not None:
            gradients = torch.split(self.whole.grad, self.sizes)
            for chunk, state, gradient in zip(self.chunks, self.states, gradients, strict=True):
                yield self.function, chunk, state, gradient


def _random_state() -> _RandomState:
    on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), torch.cuda.get_rng_state() if on_cuda else None


@contextmanager
def _drawing_from(state: _RandomState) -> Iterator[None]:
    cpu, cuda = state
    with torch.random.fork_rng([] if cuda is None else [torch.cuda.current_device()], device_type="cuda"):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        yield


def _no_sync(encoder: _Encoder) -> AbstractContextManager[None]:
    """Keep a distributed wrapper from averaging gradients that are not complete."""
    return encoder.no_sync() if isinstance(encoder, DistributedDataParallel) else nullcontext()


def _refuse_batch_norm(encoder: _Encoder) -> None:
    for name, module in encoder.named_modules() if isinstance(encoder, nn.Module) else ():
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"{'.'.join(filter(None, ('encoder', name)))} is a batch norm in training mode, which would see chunks "
                "instead of the batch: use group or layer norms (norm: group in a preset), or put it in evaluation mode"
            )
