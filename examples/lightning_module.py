"""A LightningModule of your own. The loss is one of its modules, so that Lightning's checkpoints have the chains."""

import argparse

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_emc2 import EMC2Loss


class Contrastive(L.LightningModule):
    """Two noisy views of each image, made where it trains."""

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.head = nn.Linear(256, 64)
        self.loss = EMC2Loss(num_samples, temperature=0.2)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, index = batch
        view1, view2 = (images + 0.3 * torch.randn_like(images) for _ in range(2))
        loss: Tensor = self.loss(self.head(self.encoder(view1)), self.head(self.encoder(view2)), index)
        self.log_dict(self.loss.last, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", default="lightning")
    args = parser.parse_args()

    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    loader = DataLoader(TensorDataset(images, torch.arange(len(images))), batch_size=128, shuffle=True, drop_last=True)

    def train(epochs: int, resume: str | None = None) -> L.Trainer:
        L.seed_everything(0)
        settings = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=args.out, **settings)
        trainer.fit(Contrastive(len(images)), loader, ckpt_path=resume)
        return trainer

    trainer = train(args.epochs)
    checkpoint = trainer.checkpoint_callback.best_model_path
    visited = int((trainer.model.loss.chains.ids.data >= 0).sum())
    print(f"global loss {trainer.callback_metrics['global_loss']:.3f}, chains of {visited} samples")

    longer = train(args.epochs + 1, resume=checkpoint)
    before, after = trainer.model.loss.get_extra_state()["calls"], longer.model.loss.get_extra_state()["calls"]
    print(f"one more epoch from {checkpoint}: calls of the loss {before}, then {after}")


if __name__ == "__main__":
    main()
