"""Other libraries' losses against ours where the objective is the same; of those that are installed (`peers`)."""

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_emc2 import DCLLoss, InfoNCELoss, Temperature
from torch_emc2.diagnostics import clustered_embeddings, gradient_error

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from peers import as_ours, peers

M, T = 40, 0.2
LABELS = torch.tensor([3, 0, 3, 1, 0, 3])
PACKAGES = {"lightly": 2, "pytorch_metric_learning": 1, "libauc": 1, "sentence_transformers": 1}  # benchmarked of each


def embeddings(*size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    drawn = 3 * torch.randn(*size, 6, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return tuple(each.requires_grad_() for each in drawn.unbind())


def assert_same(theirs: Tensor, ours: Tensor, inputs: Sequence[Tensor], our_inputs: Sequence[Tensor] = ()) -> None:
    """Compare value and gradient."""
    got = theirs, *torch.autograd.grad(theirs, inputs)
    want = ours, *torch.autograd.grad(ours, our_inputs or inputs)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


BENCHMARKED: dict[str, nn.Module] = {
    "lightly, NTXentLoss": InfoNCELoss(T),
    "lightly, DCLLoss": DCLLoss(T),
    "pytorch-metric-learning, NTXentLoss": InfoNCELoss(T),
    "LibAUC, GCLoss_v1": DCLLoss(T),  # at the first visit, and in its gradient
    "sentence-transformers, MultipleNegativesRankingLoss (other view)": InfoNCELoss(T, towers=2),
}


@pytest.mark.parametrize("title", BENCHMARKED)
@pytest.mark.parametrize("index", [torch.arange(6), torch.arange(12).view(6, 2)], ids=["sample", "view"])
def test_what_the_benchmarks_call(title: str, index: Tensor) -> None:
    if title not in peers(M, T):
        pytest.skip(f"{title.partition(',')[0]} is not installed")
    remembers = title.startswith("LibAUC")  # in float32, and its value is another
    z = embeddings(2, dtype=torch.float32 if remembers else torch.float64)
    theirs, ours = peers(M, T)[title](0)(*z, index, encode=None), BENCHMARKED[title](*z)
    if remembers:
        got, want = (torch.autograd.grad(loss, z) for loss in (theirs, ours))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    else:
        assert_same(theirs, ours, z)


@pytest.mark.parametrize("negatives", [0, 1, 2])  # pairs, triplets, n-tuples
@pytest.mark.parametrize("directions", ["x->y", "both"])
def test_sentence_transformers_ranking(negatives: int, directions: Any) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    settings = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    columns = embeddings(2 + negatives)
    theirs = losses.MultipleNegativesRankingLoss(nn.Identity(), 1 / T, **(settings if directions == "both" else {}))
    features = [{"sentence_embedding": column} for column in columns]  # what a model returns
    x, y, *hard = columns
    ours = InfoNCELoss(T, towers=2, directions=directions)(x, y, hard=torch.cat(hard) if hard else None)
    assert_same(theirs(features, None), ours, columns)


@pytest.mark.parametrize("learnt", ["temperature", "logit_scale"])
def test_open_clip_loss(learnt: str) -> None:
    clip_loss = pytest.importorskip("open_clip.loss").ClipLoss()
    x, y = embeddings(2)
    logit_scale = torch.tensor(-math.log(0.07)).double().requires_grad_()  # rounded as a float32 model's is
    theirs = clip_loss(F.normalize(x), F.normalize(y), logit_scale.exp())
    if learnt == "temperature":
        loss_fn = InfoNCELoss(Temperature(0.07), towers=2).double()
        ours, parameters = loss_fn(x, y), list(loss_fn.parameters())
    else:
        ours, parameters = InfoNCELoss(towers=2)(x, y, logit_scale=logit_scale.exp()), [logit_scale]
    assert_same(theirs, ours, (x, y, logit_scale), (x, y, *parameters))


def test_open_clip_training_steps() -> None:
    """One model a way to call: theirs, ours with the model's logit_scale, ours with a temperature of its own."""
    open_clip = pytest.importorskip("open_clip")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=generator)
    texts = torch.randint(1, 16, (5, 4), generator=generator)
    clip_loss, given, own = open_clip.ClipLoss(), InfoNCELoss(towers=2), InfoNCELoss(Temperature(0.07), towers=2)
    calls = [
        lambda x, y, scale: clip_loss(x, y, scale),
        lambda x, y, scale: given(x, y, logit_scale=scale),
        lambda x, y, scale: own(x, y),
    ]
    losses, weights = [], []
    for call in calls:
        torch.manual_seed(0)
        model = open_clip.model.CLIP(
            8,
            {"layers": 1, "width": 16, "head_width": 8, "patch_size": 4, "image_size": 8},
            {"layers": 1, "width": 16, "heads": 2, "context_length": 4, "vocab_size": 16},
        ).double()
        temperature = own.temperature.double().logit_scale if call is calls[2] else model.logit_scale
        encoders = [each for name, each in model.named_parameters() if name != "logit_scale"]
        optimizer = torch.optim.AdamW([temperature, *encoders], lr=0.01)
        for _ in range(3):
            loss = call(*model(images, texts))
            losses.append(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights.append([temperature.detach(), *encoders])
    assert len(set(losses[:3])) == 3
    torch.testing.assert_close(losses[3:], 2 * losses[:3])
    for ours in weights[1:]:
        torch.testing.assert_close(ours, weights[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("labels", [torch.arange(6), LABELS], ids=["samples", "classes"])
def test_supervised_contrast_of_pytorch_metric_learning(views: int, labels: Tensor) -> None:
    theirs = pytest.importorskip("pytorch_metric_learning.losses").SupConLoss(T)
    z = embeddings(views)
    assert_same(theirs(torch.cat(z), labels.repeat(views)), InfoNCELoss(T)(torch.stack(z, 1), labels=labels), z)


@pytest.mark.parametrize("labels", [torch.arange(6), LABELS], ids=["samples", "classes"])
def test_two_towers_of_pytorch_metric_learning(labels: Tensor) -> None:
    theirs = pytest.importorskip("pytorch_metric_learning.losses").SupConLoss(T)
    x, y = embeddings(2)
    ours = InfoNCELoss(T, towers=2, directions="x->y")(x, y, labels=labels)
    assert_same(theirs(x, labels, ref_emb=y, ref_labels=labels.clone()), ours, (x, y))


def test_one_that_remembers_is_given_samples() -> None:
    seen = []
    loss = as_ours(lambda z1, z2, index: seen.append(index) or z1.sum(), scale=0.5, indexed=True)  # type: ignore[func-returns-value]
    z, index = torch.ones(3, 2), torch.tensor([4, 2, 7])
    assert loss(z, z, index) == loss(z, z, 2 * index[:, None] + torch.arange(2), encode=z.__getitem__) == 3
    assert all(torch.equal(each, index) for each in seen)


def test_their_errors_are_measured_as_ours_are() -> None:
    measure = partial(gradient_error, z=clustered_embeddings(M), temperature=T, batch_size=8, epochs=2, runs=2)
    theirs, ours = measure(lambda _: as_ours(lambda z1, z2: InfoNCELoss(T)(z1, z2))), measure(lambda _: InfoNCELoss(T))
    assert (theirs.squared_error, theirs.squared_bias) == (ours.squared_error, ours.squared_bias)
    assert theirs.last == {}


def test_what_is_not_installed_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    here = len(peers(M, T))
    for package, losses in PACKAGES.items():
        listed = len(peers(M, T))
        for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
            monkeypatch.setitem(sys.modules, name, None)
        assert len(peers(M, T)) in (listed - losses, listed)
    assert peers(M, T) == {}
    assert here <= len(BENCHMARKED)
