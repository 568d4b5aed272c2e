"""A plain PyTorch loop on scikit-learn's digits. All that the loss asks of the data is each sample's index."""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from torch_emc2 import EMC2Loss


class TwoViews(Dataset[tuple[Tensor, Tensor, int]]):
    """Two views of each image, with its index."""

    def __init__(self, images: Tensor, augment: v2.Transform) -> None:
        self.images, self.augment = images, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image = self.images[index]
        return self.augment(image), self.augment(image), index


def found(encoder: nn.Module, data: Dataset[tuple[Tensor, Tensor, int]]) -> float:
    """How often, in per cent, the nearest of all second views is that of the same image."""
    torch.manual_seed(0)  # the same views each time
    view1, view2, index = next(iter(DataLoader(data, batch_size=len(data))))  # type: ignore[arg-type]
    with torch.no_grad():
        z1, z2 = (nn.functional.normalize(encoder(view)) for view in (view1, view2))
    return 100 * ((z1 @ z2.T).argmax(1) == index).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("digits.pt"), help="saved here, and gone on with for more epochs"
    )
    args = parser.parse_args()

    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    augment = v2.RandomAffine(15, translate=(0.1, 0.1), scale=(0.8, 1.2))
    data = TwoViews(images, augment)
    loader = DataLoader(data, batch_size=128, shuffle=True, drop_last=True)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    loss_fn = EMC2Loss(num_samples=len(data), temperature=0.2)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
    parts = {"encoder": encoder, "loss": loss_fn, "optimizer": optimizer}  # the loss has the chains
    start = 0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint)
        start = saved.pop("epochs")
        for name, state in saved.items():
            parts[name].load_state_dict(state)

    print(f"other view found: {found(encoder, data):.1f}%")
    for epoch in range(start, start + args.epochs):
        torch.manual_seed(1 + epoch)  # an epoch is the same wherever training goes on from
        for view1, view2, index in loader:
            loss = loss_fn(encoder(view1), encoder(view2), index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: global loss {loss_fn.last['global_loss']:.3f}, 0 if all embeddings were equal")
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state | {"epochs": epoch + 1}, args.checkpoint)
    print(f"other view found: {found(encoder, data):.1f}%")


if __name__ == "__main__":
    main()
