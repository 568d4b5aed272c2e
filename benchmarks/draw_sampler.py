"""Draw docs/sampler.png: how the chain of one row comes to the softmax over all negatives.

    python benchmarks/draw_sampler.py docs/sampler.png

64 keys, fixed; the row is in every batch, of 8 pairs, so that a visit offers it 7 of its 63 negatives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from matplotlib.figure import Figure
from torch import Tensor

from torch_emc2 import EMC2Loss
from torch_emc2.kernels import Metropolis

KEYS, BATCH, TEMPERATURE = 64, 8, 0.25
VISITS, CHAINS, REPEATS = 12, 256, 2000
SHOWN = 1, 3, 12  # visits
KERNELS = {"isir": "isir", "metropolis": Metropolis(burn_in=0.5)}


def batches(seed: int) -> Iterator[Tensor]:
    """Yield ids (b,) of a visit's batch: the row's own, 0, and others at random."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(VISITS):
        others = torch.randperm(KEYS - 1, generator=generator)[: BATCH - 1] + 1
        yield torch.cat([torch.zeros(1, dtype=torch.int64), others])


def carried(kernel: str, x: Tensor, y: Tensor) -> Tensor:
    """Return the law (visits, keys) of the negative that the row's chain carries after each visit."""
    law = torch.zeros(VISITS, KEYS)
    for seed in range(REPEATS):
        loss_fn = EMC2Loss(
            KEYS, TEMPERATURE, kernel=KERNELS[kernel], num_chains=CHAINS, carry="cache", towers=2, seed=seed
        )
        for visit, ids in enumerate(batches(seed)):
            loss_fn(x[ids], y[ids], ids)
            law[visit] += loss_fn.sides[0].chains.ids.data[0].bincount(minlength=KEYS)
    return law / (REPEATS * CHAINS)


def in_batch(scores: Tensor) -> Tensor:
    """Return the mean (keys,) of the batch's softmax, which is DCL's in the place of all negatives'."""
    mean = torch.zeros(KEYS)
    for seed in range(REPEATS):
        for ids in batches(seed):
            mean[ids[1:]] += scores[ids[1:]].softmax(0)
    return mean / (REPEATS * VISITS)


def distance(law: Tensor, target: Tensor) -> Tensor:
    """Total variation."""
    return (law - target).abs().sum(-1) / 2


def main(out: str) -> None:
    torch.manual_seed(3)
    x, y = (torch.nn.functional.normalize(torch.randn(KEYS, 6), dim=1) for _ in range(2))
    scores = (x[0] @ y.T) / TEMPERATURE
    order = scores[1:].argsort(descending=True) + 1  # the row's own key is no negative
    target = torch.zeros(KEYS)
    target[1:] = scores[1:].softmax(0)
    laws, biased = {name: carried(name, x, y) for name in KERNELS}, in_batch(scores)

    figure = Figure((10.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    place = range(1, KEYS)
    left.bar(place, target[order], color="#d8dee6", width=1, label="softmax over all negatives: the target")
    for visits, colour in zip(SHOWN, ("#d9822b", "#2e9e6b", "#3b7dd8"), strict=True):
        label = f"after {visits} visit{'s' * (visits > 1)} (isir)"
        left.plot(place, laws["isir"][visits - 1][order], color=colour, lw=1.4, label=label)
    left.plot(place, biased[order], "--", color="#8a8a8a", lw=1.4, label="the batch's softmax on average: DCL")
    left.set(xlim=(0.5, 30.5), xlabel="negatives, the hardest first", ylabel="probability")
    left.set_title("The negative that a chain carries", loc="left", fontsize=10.5)
    left.legend(frameon=False, fontsize=8)
    for (name, law), colour in zip(laws.items(), ("#3b7dd8", "#c2459b"), strict=True):
        right.plot(range(1, VISITS + 1), distance(law, target), color=colour, label=name)
    right.axhline(float(distance(biased, target)), ls="--", color="#8a8a8a", label="the batch's softmax: DCL")
    right.set(ylim=(0, 0.32), xlabel="visits", ylabel="total variation distance to the target")
    right.set_title("How far it is from the target", loc="left", fontsize=10.5)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)
    print({name: distance(law, target)[-1].item() for name, law in laws.items()}, distance(biased, target).item())


if __name__ == "__main__":
    main(sys.argv[1])
