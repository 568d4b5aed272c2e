"""Two processes by Lightning Fabric. The loss gathers by itself: each rank calls it with its own part of the batch."""

import argparse

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_emc2 import EMC2Loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    fabric = Fabric(accelerator="cpu", devices=args.processes, strategy="ddp")  # whose back end on CPUs is gloo
    fabric.launch()
    fabric.seed_everything(0, verbose=False)

    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    data = TensorDataset(images, torch.arange(len(images)))
    loader = DataLoader(data, batch_size=128 // args.processes, shuffle=True, drop_last=True)
    loader = fabric.setup_dataloaders(loader)  # each rank draws its own samples of an epoch
    encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    encoder, optimizer = fabric.setup(encoder, torch.optim.AdamW(encoder.parameters(), lr=2e-3))
    loss_fn = EMC2Loss(len(images), temperature=0.2)  # without parameters, so not set up; a learnt temperature has one

    views = torch.Generator().manual_seed(fabric.global_rank)
    for epoch in range(args.epochs):
        loader.sampler.set_epoch(epoch)
        for batch, index in loader:
            view1, view2 = batch + 0.3 * torch.randn(2, *batch.shape, generator=views)
            z1, z2 = encoder(torch.cat([view1, view2])).chunk(2)
            optimizer.zero_grad()
            fabric.backward(loss_fn(z1, z2, index))
            optimizer.step()
        fabric.print(f"epoch {epoch}: global loss {fabric.all_reduce(loss_fn.last['global_loss']):.3f}")

    chains = fabric.all_gather(loss_fn.chains.ids.data)  # every rank has all: save those of one
    visited, alike = int((chains[0] >= 0).sum()), bool((chains == chains[0]).all())
    fabric.print(f"chains of {visited} samples on each of {len(chains)} ranks, alike: {alike}")
    torch.distributed.destroy_process_group()  # whose threads would abort a process that ends with them, now and then


if __name__ == "__main__":
    main()
