"""lightly's SimCLR transform and projection head under Lightning, with EMC² in the place of lightly's NTXentLoss."""

import argparse

import lightning as L
import torch
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from torch_emc2 import EMC2Loss


class Views(Dataset[tuple[list[Tensor], int]]):
    """What the transform makes of each image, with its index."""

    def __init__(self, images: list[Image.Image], transform: SimCLRTransform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return self.transform(self.images[index]), index


class SimCLR(L.LightningModule):
    """As in lightly's guide, but for the loss, which needs the index."""

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU()]
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projection_head = SimCLRProjectionHead(64, 64, 32)
        self.criterion = EMC2Loss(num_samples, temperature=0.2)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.projection_head(self.backbone(x))
        return z

    def training_step(self, batch: tuple[list[Tensor], Tensor], _: int) -> Tensor:
        (x0, x1), index = batch
        loss: Tensor = self.criterion(self(x0), self(x1), index)
        self.log_dict(self.criterion.last, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=1797)
    args = parser.parse_args()
    L.seed_everything(0)
    pixels = (load_digits().images[: args.images] / 16 * 255).astype("uint8")
    images = [Image.fromarray(each).convert("RGB").resize((16, 16)) for each in pixels]
    transform = SimCLRTransform(input_size=16, min_scale=0.4, gaussian_blur=0.0, hf_prob=0.0)
    loader = DataLoader(Views(images, transform), batch_size=64, shuffle=True, drop_last=True)
    trainer = L.Trainer(max_epochs=args.epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(SimCLR(len(images)), loader)
    print(f"global loss {trainer.callback_metrics['global_loss']:.3f}, 0 if all embeddings were equal")


if __name__ == "__main__":
    main()
