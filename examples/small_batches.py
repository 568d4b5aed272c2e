"""Batches of 8, with a momentum encoder: scikit-learn's digits in a plain PyTorch loop."""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from torch_emc2 import MomentumLoss


def found(encoder: nn.Module, views: tuple[Tensor, Tensor]) -> float:
    """How often, in per cent, the nearest of all second views is that of the same image."""
    with torch.no_grad():
        z1, z2 = (nn.functional.normalize(encoder(view)) for view in views)
    return 100 * ((z1 @ z2.T).argmax(1) == torch.arange(len(z1))).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("small_batches.pt"), help="saved here, and gone on with for more epochs"
    )
    args = parser.parse_args()

    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    augment = v2.RandomAffine(15, translate=(0.1, 0.1), scale=(0.8, 1.2))
    test = tuple(torch.stack([augment(image) for image in images]) for _ in range(2))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    slow_encoder = AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    loss_fn = MomentumLoss(temperature=0.1)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    parts = {"encoder": encoder, "slow_encoder": slow_encoder, "loss": loss_fn, "optimizer": optimizer}
    start = 0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint)
        start = saved.pop("epochs")
        for name, state in saved.items():
            parts[name].load_state_dict(state)

    print(f"other view found: {found(slow_encoder, test):.1f}%")
    for epoch in range(start, start + args.epochs):
        torch.manual_seed(1 + epoch)  # an epoch is the same wherever training goes on from
        for index in torch.randperm(len(images)).split(8)[:-1]:
            view1, view2 = (torch.stack([augment(image) for image in images[index]]) for _ in range(2))
            with torch.no_grad():
                slow = slow_encoder(view1), slow_encoder(view2)
            loss = loss_fn(encoder(view1), encoder(view2), index, slow=slow)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            slow_encoder.update_parameters(encoder)
        print(f"epoch {epoch}: global loss {loss_fn.last['global_loss']:.3f}, 0 if all embeddings were equal")
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state | {"epochs": epoch + 1}, args.checkpoint)
    # At a constant learning rate the average of the weights is the better encoder.
    print(f"other view found: {found(slow_encoder, test):.1f}%, by the encoder itself {found(encoder, test):.1f}%")


if __name__ == "__main__":
    main()
