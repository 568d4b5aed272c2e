"""The lower halves of digits, found by their upper ones: two encoders from scratch, batches of 8, some thousand steps.

    OMP_NUM_THREADS=1 python benchmarks/digit_halves.py

Each loss is searched over learning rates and temperatures on a validation part with seed 0, for each schedule; then
five seeds on the test part. Every run keeps an average of its encoders, which a momentum encoder is: both are tested.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from torch_emc2 import DCLLoss, InfoNCELoss, MomentumLoss
from torch_emc2.losses import ContrastiveLoss

BATCH = 8
LOSSES: dict[str, type[ContrastiveLoss]] = {"InfoNCE": InfoNCELoss, "DCL": DCLLoss, "Momentum": MomentumLoss}
GRID = [(lr, temperature) for lr in (1e-3, 2e-3, 4e-3, 8e-3) for temperature in (0.05, 0.1, 0.2)]


def parts() -> tuple[Tensor, Tensor, Tensor]:
    """Images (n, 64) to train on, to choose by and to test on."""
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validation, test = images[order].split([1197, 300, 300])
    return train, validation, test


def mrr(encoders: nn.ModuleList, images: Tensor) -> float:
    """Mean reciprocal rank, in per cent, of an image's lower half among all."""
    with torch.no_grad():
        x, y = (normalize(encoder(half)) for encoder, half in zip(encoders, images.chunk(2, 1), strict=True))
    scores = x @ y.T
    return 100 * (1 / (scores >= scores.diag()[:, None]).sum(1)).mean().item()


def run(
    loss: str, lr: float, temperature: float, seed: int, images: tuple[Tensor, Tensor], epochs: int, cosine: bool
) -> tuple[float, float]:
    """Train, and return what the encoders find, and what their average does."""
    torch.manual_seed(seed)
    train, other = images
    encoders = nn.ModuleList(nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 64)) for _ in range(2))
    slow = AveragedModel(encoders, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    loss_fn = LOSSES[loss](temperature=temperature)  # type: ignore[call-arg]
    optimizer = torch.optim.AdamW(encoders.parameters(), lr=lr)
    steps = epochs * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item()) / 2 if cosine else 1.0
    )
    for _ in range(epochs):
        for index in torch.randperm(len(train)).split(BATCH)[: len(train) // BATCH]:
            upper, lower = train[index].chunk(2, 1)
            further = {}
            if loss_fn.needs_slow:
                with torch.no_grad():
                    further["slow"] = slow.module[0](upper), slow.module[1](lower)
            ids = torch.stack([index, len(train) + index], 1)
            optimizer.zero_grad()
            loss_fn(encoders[0](upper), encoders[1](lower), ids, **further).backward()
            optimizer.step()
            schedule.step()
            slow.update_parameters(encoders)
    return mrr(encoders, other), mrr(slow.module, other)


def main() -> None:
    """Search, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, validation, test = parts()
    print("| rate | loss | epochs | lr, τ | its encoders | their average | seconds |\n|---|---|--:|--:|--:|--:|--:|")
    rows = [("InfoNCE", 1), ("InfoNCE", 2), ("DCL", 1), ("Momentum", 1)]  # twice the epochs: more than equal seconds
    for cosine, (loss, times) in itertools.product((False, True), rows):
        epochs = times * args.epochs
        scores = {
            point: run(loss, *point, 0, (train, validation), epochs, cosine) for point in tqdm(GRID, loss, leave=False)
        }
        best, averaged = (max(GRID, key=lambda point: scores[point][which]) for which in range(2))
        begun = time.process_time()
        own, mean = (
            [run(loss, *point, seed, (train, test), epochs, cosine)[which] for seed in range(1, args.seeds + 1)]
            for which, point in enumerate((best, averaged))
        )
        seconds = (time.process_time() - begun) / 2 / args.seeds
        shown = [f"{statistics.fmean(found):.1f} ± {statistics.stdev(found):.1f}" for found in (own, mean)]
        rate = "cosine" if cosine else "constant"
        points = " / ".join(f"{lr:g}, {temperature:g}" for lr, temperature in (best, averaged))
        print(f"| {rate} | {loss} | {epochs} | {points} | {shown[0]} | {shown[1]} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
