"""A loop under Accelerate, whose checkpoints have the chains: stopped after half of the epochs, and gone on with.

torchrun --standalone --nproc-per-node 2 examples/accelerate_loop.py    # on CPUs
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_emc2 import EMC2Loss

Parts = tuple[nn.Module, torch.optim.Optimizer, DataLoader, EMC2Loss]


def prepared() -> tuple[Accelerator, Parts]:
    set_seed(0)
    # An order that depends on seed and epoch alone: several processes' usual one is not in a checkpoint.
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    data = TensorDataset(images, torch.arange(len(images)))
    loader = DataLoader(data, batch_size=128 // accelerator.num_processes, shuffle=True, drop_last=True)
    encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
    loss_fn = EMC2Loss(len(images), temperature=0.2)  # without parameters, so not prepared: it gathers by itself
    accelerator.register_for_checkpointing(loss_fn)
    return accelerator, (*accelerator.prepare(encoder, optimizer, loader), loss_fn)


def train(accelerator: Accelerator, parts: Parts, epochs: range) -> None:
    encoder, optimizer, loader, loss_fn = parts
    for epoch in epochs:
        loader.set_epoch(epoch)  # another order
        views = torch.Generator().manual_seed(epoch * accelerator.num_processes + accelerator.process_index)
        for batch, index in loader:
            view1, view2 = batch + 0.3 * torch.randn(2, *batch.shape, generator=views)
            z1, z2 = encoder(torch.cat([view1, view2])).chunk(2)
            accelerator.backward(loss_fn(z1, z2, index))
            optimizer.step()
            optimizer.zero_grad()
        ranks, global_loss = accelerator.num_processes, loss_fn.last["global_loss"]
        accelerator.print(f"epoch {epoch}, {ranks} processes: global loss {global_loss:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    epochs = parser.parse_args().epochs
    accelerator, whole = prepared()
    train(accelerator, whole, range(epochs // 2))
    accelerator.save_state("half-way")
    train(accelerator, whole, range(epochs // 2, epochs))

    again, resumed = prepared()
    again.load_state("half-way")
    train(again, resumed, range(epochs // 2, epochs))
    weights = [torch.cat([each.flatten() for each in encoder.parameters()]) for encoder, *_ in (whole, resumed)]
    chains = [loss_fn.chains.ids.data for *_, loss_fn in (whole, resumed)]
    accelerator.print(f"gone on with: weights equal {torch.equal(*weights)}, chains equal {torch.equal(*chains)}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
