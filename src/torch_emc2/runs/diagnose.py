"""How wrong each estimator's gradient is at a run's weights, on its own images."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from torch_emc2.checkpoint import load_checkpoint
from torch_emc2.data import ContrastiveDataset, RandomView
from torch_emc2.diagnostics import Staleness, score_staleness
from torch_emc2.diagnostics.estimators import MIXING_EPOCHS, Diagnosis, diagnose, embed_views
from torch_emc2.diagnostics.markdown import to_markdown
from torch_emc2.files import whole_file
from torch_emc2.losses.registry import LossContext, find
from torch_emc2.memory.chains import EMPTY
from torch_emc2.models import Encoder
from torch_emc2.runs.finished import leave_out_advised, load_run
from torch_emc2.runs.pictures import plot_errors
from torch_emc2.settings.losses import is_outside
from torch_emc2.training.run_images import same_images

__all__ = ["diagnose_run"]

_LOG = logging.getLogger(__name__)


def diagnose_run(
    run: Path,
    *,
    samples: int = 512,
    batch_size: int | None = None,
    epochs: int = 64,
    mixing_epochs: int = MIXING_EPOCHS,
    loss: str | None = None,
    seed: int = 0,
) -> Diagnosis:
    """Measure how wrong each estimator's gradient is at a run's weights, and why.

    Writes diagnosis.json, diagnosis.md and diagnosis.png; `torch_emc2.diagnostics.estimators` says what is in them.

    Args:
        run: its folder.
        samples: at most so many random training images, with two views each of the run's own augmentation.
        batch_size: samples a batch, by default the run's.
        epochs: the largest number of epochs averaged.
        mixing_epochs: epochs before the first that counts.
        loss: a class beside the library's own, as package.module:Class, which is imported.
        seed: of the choice of images and of their views.

    Raises:
        ValueError: the folder is no finished run, the samples do not fill a batch, or there is no such loss.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}: a lone sample has no negatives")
    config, encoder, _ = load_run(run)
    own = None if loss is None else find(loss)
    if is_outside(config.loss) and loss != config.loss:
        _LOG.info("The run's own loss is left out; --loss %s imports it, and measures it too", config.loss)
    data = config.data
    images = same_images(config, run)
    views = ContrastiveDataset(images, RandomView(data.augmentation), seed=seed, on_bad_image=data.on_bad_image)
    picks = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:samples]
    with leave_out_advised(run):
        index, pairs = _two_views(views, picks)
    given = LossContext(
        2 * len(index), config.temperature, encoder.config.out_dim, 2, positive_weight=config.positive_weight
    )
    diagnosis = diagnose(
        encoder,
        pairs,
        config.temperature,
        config.batch_size if batch_size is None else batch_size,
        positive_weight=config.positive_weight,
        burn_in=0.5 if config.emc2.burn_in is None else config.emc2.burn_in,
        epochs=epochs,
        mixing_epochs=mixing_epochs,
        further={} if own is None else {own.name: own.maker({}, given)},
        # Finite views have chains of their own, which met other views than these two.
        staleness=None if data.finite_views else _staleness(run, encoder, views, index, pairs, config.temperature),
    )
    with whole_file(run / "diagnosis.json") as file:
        file.write_text(json.dumps(asdict(diagnosis), indent=2, ensure_ascii=False) + "\n")
    with whole_file(run / "diagnosis.md") as file:
        file.write_text(to_markdown(diagnosis), encoding="utf-8")
    with whole_file(run / "diagnosis.png") as file:
        plot_errors(diagnosis.errors, file)
    return diagnosis


def _two_views(views: ContrastiveDataset, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Draw two views of images ``ids``: the ids that can be read (k,), and (k, 2, c, s, s)."""
    batch = views.__getitems__([(0, i) for i in ids.tolist()])
    return batch.index, torch.stack([batch.first, batch.second], 1)


def _staleness(
    run: Path, encoder: Encoder, views: ContrastiveDataset, index: Tensor, pairs: Tensor, temperature: float
) -> Staleness | None:
    """Compare what the run's last checkpoint has stored, for the chains of samples ``index`` with views ``pairs``."""
    file = run / "checkpoints" / "last.ckpt"
    if not file.is_file():
        return None
    chains = load_checkpoint(file)["state_dict"].get("loss._extra_state", {}).get("chains", {})
    if "similarities" not in chains:
        return None
    ids, similarities = (chains[name][index] for name in ("ids", "similarities"))
    if (ids != EMPTY).sum() < 2:
        return None
    carried_index, carried_pairs = _two_views(views, torch.unique(ids[ids != EMPTY]).long())
    row, chain = torch.isin(ids, carried_index).nonzero(as_tuple=True)
    place = torch.searchsorted(carried_index, ids[row, chain].long())
    anchors, carried = embed_views(encoder, pairs), embed_views(encoder, carried_pairs)
    return score_staleness(similarities[row, chain] / temperature, anchors[row], carried[place], temperature)
