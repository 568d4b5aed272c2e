"""A step in chunks against the plain step, which keeps the whole graph."""

import copy
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss, NegativeCacheLoss, SogCLRLoss, cached_backward
from torch_emc2.kernels import Metropolis

M, B, D, STEPS = 20, 7, 5, 4
MAKERS: dict[str, Callable[[], Any]] = {
    "infonce": lambda: InfoNCELoss(0.1),
    "dcl": lambda: DCLLoss(0.1),
    "sogclr": lambda: SogCLRLoss(M, 0.1),
    "negative-cache": lambda: NegativeCacheLoss(M, D, 0.1, refresh_fraction=0.2),
    "emc2-encode": lambda: EMC2Loss(M, 0.1, kernel=Metropolis(0.1), carry="encode", num_chains=2),
    "emc2-if-used": lambda: EMC2Loss(M, 0.1, kernel=Metropolis(0.1), carry="encode_if_used"),
    "emc2-cache": lambda: EMC2Loss(M, 0.1, kernel=Metropolis(0.1)),
    "emc2-drop": lambda: EMC2Loss(M, 0.1, kernel=Metropolis(0.1), carry="drop"),
    "emc2-isir": lambda: EMC2Loss(M, 0.1, carry="encode", kernel="isir"),
}
IMAGES = torch.randn(M, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def encoder(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, D)).double()


def batch(step: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(step)
    index = torch.randperm(M, generator=generator)[:B]
    first, second = IMAGES[index] + 0.3 * torch.randn(2, B, 6, dtype=torch.float64, generator=generator)
    return (first, second), index


def plain_backward(
    loss_fn: Any,
    net: Callable[[Tensor], Tensor],
    views: tuple[Tensor, Tensor],
    index: Tensor | None,
    chunk_size: int,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What is to be equalled; in chunks too, so that dropout draws alike, but all of them with graph."""

    def chunked(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda inputs: torch.cat([function(chunk) for chunk in inputs.split(chunk_size)])

    first, second = map(chunked(net), views)
    loss: Tensor = loss_fn(first, second, index, encode=None if encode is None else chunked(encode))
    loss.backward()
    return loss.detach()


def trained(backward: Any, name: str, chunk_size: int, *, with_encode: bool, dropout: float) -> list[Any]:
    """Losses, gradients (which add up), state of the loss and the random state after some steps."""
    loss_fn, net, losses = MAKERS[name](), encoder(dropout), []
    for step in range(STEPS):
        views, index = batch(step)
        encode = (lambda ids: net(IMAGES[ids])) if with_encode else None
        losses.append(backward(loss_fn, net, views, index, chunk_size=chunk_size, encode=encode))
    return [losses, [parameter.grad for parameter in net.parameters()], loss_fn.state_dict(), torch.get_rng_state()]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("name", MAKERS)
def test_equals_the_plain_step(name: str, chunk_size: int, dropout: float) -> None:
    for with_encode in [True] if MAKERS[name]().__dict__.get("carry", "").startswith("encode") else [True, False]:
        got, want = (
            trained(backward, name, chunk_size, with_encode=with_encode, dropout=dropout)
            for backward in (cached_backward, plain_backward)
        )
        torch.testing.assert_close(got[:2], want[:2], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got[2:], want[2:], rtol=0, atol=0)


def test_chunks_do_not_matter_without_randomness() -> None:
    one, all_at_once = (trained(cached_backward, "emc2-encode", n, with_encode=True, dropout=0.0) for n in (1, B))
    torch.testing.assert_close(one[1], all_at_once[1], rtol=1e-10, atol=1e-10)


def test_no_graph_is_larger_than_a_chunk() -> None:
    sizes, net = [], encoder()
    views, index = batch(0)

    def seen(inputs: Tensor) -> Tensor:
        sizes.append((torch.is_grad_enabled(), len(inputs)))
        output: Tensor = net(inputs)
        return output

    loss_fn = MAKERS["emc2-encode"]()
    for _ in range(2):
        sizes.clear()
        cached_backward(loss_fn, seen, views, index, chunk_size=3, encode=lambda ids: seen(IMAGES[ids]))
    first_pass, second_pass = ([size for graph, size in sizes if graph is wanted] for wanted in (False, True))
    assert max(first_pass) == 3
    assert sorted(first_pass) == sorted(second_pass)
    assert first_pass[:6] == second_pass[-6:] == [3, 3, 1, 3, 3, 1]
    assert len(first_pass) > 6


def test_a_constant_encode() -> None:
    nets = encoder(), encoder()
    for backward, net in zip((cached_backward, plain_backward), nets, strict=True):
        loss_fn = MAKERS["emc2-encode"]()
        for step in range(STEPS):
            backward(loss_fn, net, *batch(step), chunk_size=3, encode=lambda ids: IMAGES[ids, :D])
    got, want = ([parameter.grad for parameter in net.parameters()] for net in nets)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backward", [cached_backward, plain_backward])
def test_an_encoder_without_a_gradient_is_no_step(backward: Any) -> None:
    with pytest.raises(RuntimeError, match="does not require grad"):
        backward(InfoNCELoss(0.1), lambda inputs: inputs[:, :D], *batch(0), chunk_size=3)


def _scaled_step(backward: Any, device: str, dtype: torch.dtype) -> tuple[float, Tensor]:
    net, loss_fn, scaler = encoder(0.4).float().to(device), InfoNCELoss(0.1), torch.amp.GradScaler(device, 64.0)
    views, index = batch(0)
    torch.manual_seed(2)
    with torch.autocast(device, dtype=dtype):
        loss = backward(
            lambda *args, **kwargs: scaler.scale(loss_fn(*args, **kwargs)),
            lambda inputs: net(inputs.float().to(device)),  # views may stay on the CPU
            views,
            index,
            chunk_size=3,
        )
    scaler.unscale_(torch.optim.SGD(net.parameters()))
    return float(loss) / 64, torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast_and_a_scaler(device: str) -> None:
    """Weights cast in the first pass are cached without graph: the second must not take them."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    dtype = torch.bfloat16 if device == "cpu" else torch.float16
    loss, got = _scaled_step(cached_backward, device, dtype)
    expected, want = _scaled_step(plain_backward, device, dtype)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (got - want).norm() < 0.01 * want.norm()  # sums of other roundings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"views": (IMAGES[:B].clone().requires_grad_(), IMAGES[:B])}, "views must have no graph"),
        ({"encoder": nn.Sequential(nn.Linear(6, D), nn.BatchNorm1d(D)).double()}, "encoder.1 is a batch norm"),
        ({"encoder": nn.BatchNorm1d(6).double()}, "encoder is a batch norm"),
        ({"views": (IMAGES[:B], IMAGES[: B - 1])}, r"\(7, 5\) and \(6, 5\)"),
        ({"views": (torch.ones(()), IMAGES[:B])}, r"views must be \(b, …\), got a single number"),
        ({"views": ({"a": IMAGES[:B], "b": IMAGES[:3]}, IMAGES[:B])}, r"tensors \(b, …\) of one length, got \[3, 7\]"),
        ({"views": ({}, IMAGES[:B])}, "of one length, got none"),
        ({"encode": lambda ids: IMAGES[ids]}, r"encode must return"),
    ],
)
def test_what_is_not_usable_changes_nothing(change: dict[str, Any], message: str) -> None:
    net, loss_fn = encoder(), MAKERS["emc2-encode"]()
    views, index = batch(0)
    given = {"encoder": net, "views": views, "index": index, "chunk_size": 3, "encode": lambda ids: net(IMAGES[ids])}
    cached_backward(loss_fn, **given)
    before = copy.deepcopy([loss_fn.state_dict(), [parameter.grad for parameter in net.parameters()]])
    with pytest.raises(ValueError, match=message):
        cached_backward(loss_fn, **(given | change))
    after = [loss_fn.state_dict(), [parameter.grad for parameter in net.parameters()]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_rows_by_name_that_are_not_split_are_told_of() -> None:
    net, view = encoder(), {"texts": list(IMAGES[:B]), "mask": torch.ones(B, 1)}
    with pytest.raises(ValueError, match=r"returned 7 embeddings for 3 inputs: of inputs by name only tensors"):
        cached_backward(InfoNCELoss(0.1), lambda inputs: net(torch.stack(inputs["texts"])), (view, view), chunk_size=3)
    with pytest.raises(TypeError, match=r"views must be tensors \(b, …\), or dictionaries of such, got list"):
        cached_backward(InfoNCELoss(0.1), net, ([1, 2], [3, 4]), chunk_size=3)  # type: ignore[arg-type]


def test_inputs_by_name_and_a_loss_of_ones_own() -> None:
    """As a tokenizer returns them; what is no tensor goes with every chunk, and a loss gets what was given alone."""
    views, seen, gradients = batch(0)[0], [], []
    for chunked in (True, False):
        net = encoder()
        named = tuple({"pixels": view, "scale": torch.full((B, 1), 2.0).double(), "mode": "double"} for view in views)

        def embed(inputs: dict[str, Any], net: nn.Module = net) -> Tensor:
            seen.append((inputs["mode"], len(inputs["scale"])))
            inputs["embedded"] = net(inputs["pixels"] * inputs.pop("scale"))  # as some models treat their inputs
            embedded: Tensor = inputs["embedded"]
            return embedded

        def own_loss(x: Tensor, y: Tensor) -> Tensor:
            return InfoNCELoss(0.1)(x, y)

        if chunked:
            cached_backward(own_loss, embed, named, chunk_size=3)
        else:
            own_loss(*map(embed, named)).backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    assert seen == [("double", n) for n in [3, 3, 1] * 4 + [B] * 2]


def test_batch_norm_in_evaluation_mode() -> None:
    net = nn.Sequential(nn.Linear(6, D), nn.BatchNorm1d(D)).double().eval()
    views, index = batch(0)
    got = cached_backward(InfoNCELoss(0.1), net, views, index, chunk_size=3)
    torch.testing.assert_close(got, InfoNCELoss(0.1)(net(views[0]), net(views[1])).detach())


SIZES = (4, 3)  # samples of each rank


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SIZES), timeout=timeout
    )
    results = {}
    for name in MAKERS:
        for chunk_size in (1, 3, 100):
            net, loss_fn = DistributedDataParallel(encoder()), MAKERS[name]()
            for step in range(STEPS):
                views, index = batch(step)
                first, second, mine = (whole.split(SIZES)[rank] for whole in (*views, index))
                cached_backward(
                    loss_fn,
                    net,
                    (first, second),
                    mine,
                    chunk_size=chunk_size,
                    encode=lambda ids, f=net: f(IMAGES[ids]),
                )
                results[name, chunk_size, step] = [parameter.grad.clone() for parameter in net.parameters()]
                net.zero_grad()
            results[name, chunk_size] = loss_fn.state_dict()
    torch.save(results, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=len(SIZES))  # type: ignore[no-untyped-call]
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(len(SIZES))]
    for name, make in MAKERS.items():
        loss_fn = make()
        for step in range(STEPS):
            net = encoder()
            plain_backward(loss_fn, net, *batch(step), 100, encode=lambda ids, f=net: f(IMAGES[ids]))
            want = [parameter.grad for parameter in net.parameters()]
            for results in ranks:
                for chunk_size in (1, 3, 100):
                    torch.testing.assert_close(results[name, chunk_size, step], want, rtol=1e-10, atol=1e-10)
        for results in ranks:
            torch.testing.assert_close(results[name, 1], loss_fn.state_dict(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("name", ["infonce", "sogclr", "negative-cache", "encode", "encode_if_used", "cache"])
def test_two_towers_equal_the_plain_step(name: str, chunk_size: int) -> None:
    makers: dict[str, Callable[[], Any]] = {
        "infonce": lambda: InfoNCELoss(0.1, towers=2),
        "sogclr": lambda: SogCLRLoss(M, 0.1, towers=2),
        "negative-cache": lambda: NegativeCacheLoss(M, D, 0.1, refresh_fraction=0.2, towers=2),
    }
    outcomes = []
    for in_chunks in (False, True):
        loss_fn = makers.get(name, lambda: EMC2Loss(M, 0.1, kernel=Metropolis(0.0), carry=name, towers=2))()  # type: ignore[arg-type]
        nets, logit_scale = (encoder(), encoder()), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        nn.init.normal_(nets[1][0].weight)
        encode = tuple((lambda ids, net=net: net(IMAGES[ids])) for net in nets)
        losses = []
        for step in range(STEPS):
            (x, y), index = batch(step)
            if in_chunks:
                losses.append(
                    cached_backward(
                        loss_fn,
                        nets,
                        (x, y),
                        index,
                        chunk_size=chunk_size,
                        encode=encode,
                        logit_scale=logit_scale.exp(),
                    )
                )
            else:
                loss = loss_fn(nets[0](x), nets[1](y), index, encode=encode, logit_scale=logit_scale.exp())
                loss.backward()
                losses.append(loss.detach())
        gradients = [parameter.grad for net in nets for parameter in net.parameters()]
        outcomes.append([losses, gradients, logit_scale.grad, loss_fn.state_dict()])
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-9, atol=1e-9)
