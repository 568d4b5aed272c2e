"""In open_clip's own training step, with a CLIP of a few weights."""

import argparse
import copy
import datetime
import gc
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn

from torch_emc2 import EMC2Loss, InfoNCELoss, MomentumLoss

open_clip = pytest.importorskip("open_clip")

from page import code_of_page  # noqa: E402

from torch_emc2.integrations.open_clip import EMC2ClipLoss  # noqa: E402
from torch_emc2.integrations.text_ids import text_ids  # noqa: E402

VISION = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 4, "image_size": 8}
TEXT = {"layers": 1, "width": 16, "heads": 2, "context_length": 4, "vocab_size": 16}


def clip() -> Any:
    torch.manual_seed(0)
    return open_clip.model.CLIP(8, VISION, TEXT, output_dict=True).double()


def batches(steps: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(steps, size, 3, 8, 8, dtype=torch.float64, generator=generator)
    texts = torch.randint(1, 16, (steps, size, 4), generator=generator)
    return list(zip(images, texts, strict=True))


def train(model: Any, loss: nn.Module, steps: int, take: Callable[[Tensor], Tensor] = lambda whole: whole) -> Any:
    """Train by open_clip's step, on what ``take`` leaves of the batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    values = []
    for images, texts in batches(steps):
        losses = loss(**model(take(images), take(texts)), output_dict=True)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        values.append(losses["contrastive_loss"].detach())
    return values, [each.detach() for each in model.parameters()]


def test_with_infonce_it_is_their_loss() -> None:
    """Value, and weights after some steps, the logit scale among them; once more by their names for its arguments."""
    model, images_texts = clip(), batches(1)[0]
    theirs = open_clip.ClipLoss()
    want = train(clip(), theirs, 3)
    torch.testing.assert_close(train(model, EMC2ClipLoss(model, InfoNCELoss(towers=2)), 3), want, rtol=1e-7, atol=1e-9)

    args = argparse.Namespace(
        distill=False, model="ViT", siglip=False, local_loss=False, gather_with_grad=True, rank=0, world_size=1
    )
    args.horovod = False
    settings = vars(open_clip.create_loss(args))
    named = {name: settings[name] for name in ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size")}
    ours = EMC2ClipLoss(model, InfoNCELoss(towers=2), **named, use_horovod=settings["use_horovod"])
    out = model(*images_texts)
    torch.testing.assert_close(ours(**out), theirs(**out))


def test_in_their_training_loop() -> None:
    """Their own code, an epoch of it: the library's loss called with the same, by hand, must leave the same memory."""
    loop = pytest.importorskip("open_clip_train.train")
    model, loader = clip(), batches(3)
    loss, by_hand = EMC2ClipLoss(model), EMC2Loss(None, towers=2, kernel="isir")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    args = SimpleNamespace(
        device="cpu", precision="fp64", accum_freq=1, distill=False, skip_scheduler=True, grad_clip_norm=None, rank=0,
        world_size=1, local_rank=0, log_every_n_steps=100, log_local=False, batch_size=6, wandb=False, horovod=False,
    )  # fmt: skip
    info = SimpleNamespace(dataloader=_Loader(loader), set_epoch=lambda epoch: None)
    loop.train_one_epoch(model, {"train": info}, loss, 0, optimizer, None, None, None, args)
    for images, texts in loader:
        x, y, scale = model(images, texts).values()
        by_hand(x, y, text_ids(texts), logit_scale=scale)
    torch.testing.assert_close(loss.loss.state_dict(), by_hand.state_dict(), rtol=0, atol=0)
    assert by_hand.get_extra_state()["calls"] == 3


class _Loader(list[Any]):
    num_batches, num_samples = 3, 18


def test_an_equal_caption_is_no_negative() -> None:
    model, ((images, texts),) = clip(), batches(1)
    texts[4] = texts[1]
    x, y, scale = model(images, texts).values()
    same = torch.eye(6, dtype=torch.bool)
    same[1, 4] = same[4, 1] = True
    logits = scale * x @ y.T
    value = 0.0
    for matrix in (logits, logits.T):
        for row in range(6):
            negatives = [column for column in (0, 1, 2, 3, 5) if not same[row, column]]  # 4 is 1 again
            value += (matrix[row, [row, *negatives]].logsumexp(0) - matrix[row, row]).item() / 12
    ours = EMC2ClipLoss(model, InfoNCELoss(towers=2))
    assert ours(**model(images, texts)).item() == pytest.approx(value)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timeout)
    model = clip()
    loss = EMC2ClipLoss(model, rank=rank, world_size=2)
    parallel = nn.parallel.DistributedDataParallel(model)
    results = train(parallel, loss, 4, lambda whole: whole.chunk(2)[rank])
    torch.save((*results, loss.state_dict()), f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    spawn(_rank, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    (values, weights, memory), other = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    model = clip()
    loss = EMC2ClipLoss(model)
    want, want_weights = train(model, loss, 4)
    means = [(one + two) / 2 for one, two in zip(values, other[0], strict=True)]
    torch.testing.assert_close((means, weights), (want, want_weights), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(other[1:], (weights, memory), rtol=0, atol=0)
    alone = loss.state_dict()["loss._extra_state"]
    for side in ("x", "y"):
        ours = memory["loss._extra_state"][side]
        assert torch.equal(ours["keys"], alone[side]["keys"])
        assert torch.equal(ours["chains"]["ids"], alone[side]["chains"]["ids"])
        torch.testing.assert_close(ours["embeddings"], alone[side]["embeddings"])


def test_evaluation_moves_nothing() -> None:
    model = clip()
    loss = EMC2ClipLoss(model)
    train(model, loss, 2)
    before = loss.state_dict()
    with torch.no_grad():
        loss(**model(*batches(1)[0]))
    model.eval()
    loss(**model(*batches(1)[0]))
    torch.testing.assert_close(loss.state_dict(), before, rtol=0, atol=0)
    assert {*before} == {"loss._extra_state"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: _reloaded(model)])
def test_a_copy_of_the_model_knows_nothing_of_the_loss(copied: Callable[[Any], Any]) -> None:
    """As the average of its weights: a pass of it is none that the loss must have seen."""
    model, ((images, texts),) = clip(), batches(1)
    loss = EMC2ClipLoss(model)
    twin = copied(model)
    out = model(images, texts)
    twin.eval()(images[:2], texts[:2].flip(0))
    loss(**out)
    assert set(loss.loss.sides[0].chains.ids.data[:6].flatten().tolist()) <= set(text_ids(texts).tolist())
    assert loss.loss.get_extra_state()["calls"] == 1
    (held,) = twin._forward_pre_hooks.values()
    assert held is not loss._seen
    del loss
    gc.collect()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: _reloaded(both)])
def test_a_copy_of_model_and_loss_is_a_pair_of_its_own(copied: Callable[[Any], Any]) -> None:
    (first, second), model = batches(2), clip()
    both = nn.ModuleDict({"model": model, "loss": EMC2ClipLoss(model)})
    both["loss"](**both["model"](*first))
    twin = copied(both)
    value, want = (each["loss"](**each["model"](*second)) for each in (twin, both))
    torch.testing.assert_close(value, want, rtol=0, atol=0)
    torch.testing.assert_close(twin["loss"].state_dict(), both["loss"].state_dict(), rtol=0, atol=0)


def _reloaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_the_pages_code() -> None:
    (batch,) = batches(1)
    names = dict(zip(("images", "texts"), batch, strict=True), clip=clip())
    exec(code_of_page("open_clip"), names)
    assert set(names["losses"]) == {"contrastive_loss"}
    assert names["loss"].loss.get_extra_state()["calls"] == 1


def test_what_is_wrong_is_named() -> None:
    model, ((images, texts),) = clip(), batches(1)
    for loss in (InfoNCELoss(), EMC2Loss(100, towers=2)):
        with pytest.raises(ValueError, match="images and texts are two towers, with hashes for ids; got"):
            EMC2ClipLoss(model, loss)
    with pytest.raises(ValueError, match="the trainer has no momentum encoder, as MomentumLoss needs: write a loop of"):
        EMC2ClipLoss(model, MomentumLoss(towers=2))
    with pytest.raises(TypeError, match=r"got InfoNCELoss: EMC2ClipLoss\(model, loss\)"):
        EMC2ClipLoss(InfoNCELoss(towers=2))
    with pytest.raises(TypeError, match=r"loss must be a loss of torch_emc2, .* got the class InfoNCELoss"):
        EMC2ClipLoss(model, InfoNCELoss)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='as carry="encode" needs: build with "cache"'):
        EMC2ClipLoss(model, EMC2Loss(None, towers=2, carry="encode"))
    for settings in ({"use_horovod": True}, {"world_size": 2}):
        with pytest.raises(ValueError, match=r"gathers by torch\.distributed, whose process group"):
            EMC2ClipLoss(model, **settings)
    ours = EMC2ClipLoss(model)
    out = model(images, texts)
    twice = {name: torch.cat([out[name]] * 2) for name in ("image_features", "text_features")}
    with pytest.raises(ValueError, match=r"12 text features, and texts in the model's last forward pass: 6\. Call"):
        ours(**twice, logit_scale=out["logit_scale"])
    model(images)
    with pytest.raises(ValueError, match=r"last forward pass: none\. Call the loss once"):
        ours(**out)
