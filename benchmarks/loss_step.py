"""Time one forward and backward pass of every loss on random embeddings, and its ratio to InfoNCE in the same run.

    python benchmarks/loss_step.py [--device cuda] [--batch-sizes 32 256 1024] [--model resnet18 --image-size 64]

With a model, of timm, the pass is through it too: what a training step pays for its loss. The losses take turns, so
that whatever else the machine does meets all of them alike; the medians are printed.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from peers import peers
from torch import Tensor

from torch_emc2 import EMC2Loss
from torch_emc2.diagnostics import at_rest
from torch_emc2.losses.registry import LossContext, variants

NUM_SAMPLES = 10_000


def cross_entropy(z1: Tensor, z2: Tensor, index: Tensor, temperature: float = 0.07) -> Tensor:
    """InfoNCE as it is usually written with torch."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z) // 2))


def embeddings(args: argparse.Namespace, device: torch.device) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return what gives two views' embeddings that are there already."""

    @cache
    def leaves(batch_size: int) -> tuple[Tensor, Tensor]:
        z1, z2 = torch.randn(2, batch_size, args.dim, device=device).unbind()
        return z1.requires_grad_(), z2.requires_grad_()

    return leaves


def encoder(args: argparse.Namespace, device: torch.device) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return what embeds two views' images anew."""
    import timm

    model = timm.create_model(args.model, num_classes=args.dim).to(device, memory_format=torch.channels_last)

    @cache
    def images(batch_size: int) -> Tensor:
        return torch.randn(2 * batch_size, 3, args.image_size, args.image_size, device=device)

    def embed(batch_size: int) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            z1, z2 = model(images(batch_size)).float().split(batch_size)
        return z1, z2

    return embed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 256, 1024])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--model", help="embed random images by it, in bfloat16")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each batch size")
    parser.add_argument("--losses", nargs="+", help="by their names in the table, InfoNCE among them; default: all")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {name}, d = {args.dim}")

    torch.manual_seed(0)
    table = torch.randn(NUM_SAMPLES, args.dim, device=device)
    chain_a_view = EMC2Loss(2 * NUM_SAMPLES, kernel="metropolis")

    further = {
        "EMC², cache, 4 chains": EMC2Loss(NUM_SAMPLES, kernel="metropolis", num_chains=4),
        "EMC², defer": EMC2Loss(NUM_SAMPLES, kernel="metropolis", carry="defer"),
        "EMC², isir, cache, 4 chains": EMC2Loss(NUM_SAMPLES, kernel="isir", num_chains=4),
    }

    def by_view(z1: Tensor, z2: Tensor, index: Tensor) -> Tensor:
        return chain_a_view(z1, z2, torch.stack([2 * index, 2 * index + 1], 1))

    makers = {**variants(LossContext(NUM_SAMPLES, 0.07, args.dim)), **peers(NUM_SAMPLES, 0.07, args.device)}
    # "encode" is a look-up in a table: what an encoder costs is not the loss's.
    losses: dict[str, Callable[..., Tensor]] = {
        **{name: partial(at_rest(make(0)), encode=table.__getitem__) for name, make in makers.items()},
        "InfoNCE, F.cross_entropy": cross_entropy,
        "EMC², cache, a chain a view": by_view,
        **further,
    }
    losses = {name: loss_fn for name, loss_fn in losses.items() if not args.losses or name in args.losses}
    embed = embeddings(args, device) if args.model is None else encoder(args, device)
    for batch_size in args.batch_sizes:
        times: dict[str, list[float]] = {name: [] for name in losses}
        start, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - start < args.seconds:
            index = torch.randperm(NUM_SAMPLES)[:batch_size].to(device)
            for name, loss_fn in random.sample(
                list(losses.items()), len(losses)
            ):  # none always follows another's cache
                if device.type == "cuda":
                    torch.cuda.synchronize()
                before = time.perf_counter()
                loss_fn(*embed(batch_size), index).backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - before)
            calls += 1
        reference = statistics.median(times["InfoNCE"][2:] or times["InfoNCE"])
        print(f"\n| b = {batch_size} ({calls} calls) | ms | ratio |\n|---|--:|--:|")
        for name, seconds in times.items():
            median = statistics.median(seconds[2:] or seconds)  # the first calls compile and allocate
            print(f"| {name} | {median * 1e3:.3f} | {median / reference:.2f} |")


if __name__ == "__main__":
    main()
