"""A loss for sentence-transformers' trainer, instead of its `MultipleNegativesRankingLoss`."""

from __future__ import annotations

import copy
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from torch_emc2.batch import NoNegatives
from torch_emc2.chunked import in_chunks
from torch_emc2.error_text import one_line
from torch_emc2.files import whole_file
from torch_emc2.integrations.checks import require_loss, require_model
from torch_emc2.integrations.text_ids import text_ids
from torch_emc2.losses import ContrastiveLoss, EMC2Loss

__all__ = ["EMC2SentenceLoss", "LossMemoryCallback"]

_RUN = "torch_emc2"  # name of the run's id in the trainer's state

_NOT_TEXT = {"pixel_values", "pixel_values_videos", "input_features", "input_values"}


class EMC2SentenceLoss(nn.Module):
    """A contrastive loss of (anchor, positive) pairs, or (anchor, positive, negative, …), by any loss of this library.

    Inputs and labels are as for `MultipleNegativesRankingLoss`; all rows of a batch share the columns of negatives. In
    evaluation mode, and without gradient, no chain moves. A batch without negatives, such as a last one of a single
    pair, has loss 0. Several processes gather their batches. `LossMemoryCallback` keeps the memory in the trainer's
    checkpoints. In an `AdaptiveLayerLoss`, which calls the loss once per layer, all layers would share the memory.

    Args:
        model: the `SentenceTransformer`, or what it is wrapped in.
        loss: a loss of this library that needs neither a momentum encoder nor ``encode``; by default
            ``EMC2Loss(None, 0.05, positive_weight=1.0)``, whose weight of the positive is InfoNCE's, as pretrained
            models need. With ``towers=1``, as in the default, all embeddings of a batch are negatives, anchors as well
            as positives; with ``towers=2`` only those of the other column are.
            ``InfoNCELoss(0.05, towers=2, directions="x->y")`` equals `MultipleNegativesRankingLoss`. The loss is copied
            and not called itself: in a `MatryoshkaLoss` each width has its own memory.
        ids_from_labels: take ids from the data's label column, which holds a whole number per row, or a list with one
            per text. With one per row, the text in column c gets the id label · columns + c, so ``num_samples`` must be
            None or at least (largest label + 1) · columns. By default a text's id is a hash of its tokens, which needs
            no column: equal texts are the same item, and no negatives of each other's partners.
        mini_batch_size: rows embedded at a time, for batches larger than memory, as for
            `CachedMultipleNegativesRankingLoss` (GradCache, Gao et al. 2021): the gradient is the whole batch's, and
            each row is embedded twice. Not in a `MatryoshkaLoss` or `AdaptiveLayerLoss`.

    Attributes:
        called: whether the loss has been called.

    Example::

        >>> loss = EMC2SentenceLoss(model)
        >>> memory = LossMemoryCallback(loss)
        >>> SentenceTransformerTrainer(model, args, train_dataset, loss=loss, callbacks=[memory])  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        loss: ContrastiveLoss | None = None,
        *,
        ids_from_labels: bool = False,
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        require_model(model, "EMC2SentenceLoss(model, loss)")
        self.model = model
        self.loss = EMC2Loss(None, temperature=0.05, positive_weight=1.0) if loss is None else loss
        require_loss(self.loss)
        self.ids_from_labels, self.mini_batch_size = ids_from_labels, mini_batch_size
        if mini_batch_size is not None and mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must be at least 1, or None for all rows, got {mini_batch_size}")
        if not ids_from_labels and any(size is not None for size in self.loss.sizes):
            raise ValueError(
                f"texts' ids are hashes, beyond num_samples={self.loss.num_samples}: build the loss with "
                "num_samples=None, or, of as many texts as rows times columns, give ids_from_labels=True"
            )
        self._by_width: dict[int, ContrastiveLoss] = {}
        self.called = False

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Return the loss of a batch, from the model's inputs for each column and the label column."""
        self.called = True
        columns = list(sentence_features)
        if len(columns) < 2:
            raise ValueError(f"the data must have columns (anchor, positive, [negative, …]), got {len(columns)}")
        ids = self._ids_of_labels(labels, len(columns)) if self.ids_from_labels else _ids_of_texts(columns)
        embeddings = [self._embed(column) for column in columns]
        (x, y, *hard), (index, y_index, *hard_index) = embeddings, ids
        loss_fn = self._of_width(x.shape[1])
        loss_fn.train(self.model.training and torch.is_grad_enabled())  # trainers call eval() on the model only
        loss_fn.temperature = self.loss.temperature  # which may be learnt, or assigned
        further = {"hard": torch.cat(hard), "hard_index": torch.cat(hard_index)} if hard else {}
        if loss_fn.towers == 1:
            index = torch.stack([index, y_index], dim=1)
        else:
            further["y_index"] = y_index
        try:
            loss: Tensor = loss_fn(x, y, index, **further)
        except NoNegatives as error:
            warnings.warn(f"a batch teaches nothing: {error}", stacklevel=2)
            return torch.stack(embeddings).sum() * 0.0  # with a graph, so that backward() works
        if not hard and torch.stack([(each == each[0]).all() for each in ids]).any():
            warnings.warn(
                "a batch teaches nothing: all of its anchors, or of its positives, are one item", stacklevel=2
            )
        return loss

    def _embed(self, column: dict[str, Any]) -> Tensor:
        """(b, d) embeddings of a column; chunks keep no graph, and are embedded again in the backward pass."""
        if self.mini_batch_size is None:
            embeddings: Tensor = self.model(column)["sentence_embedding"]
            return embeddings
        if type(self.model.forward).__name__ == "ForwardDecorator":  # it is gone by the second pass
            raise ValueError("in a MatryoshkaLoss or AdaptiveLayerLoss mini_batch_size must be None")

        def embed(part: dict[str, Any]) -> Tensor:  # its tensors tell torch whose random state to keep
            return cast(Tensor, self.model(dict(part))["sentence_embedding"])

        chunks = in_chunks(column, self.mini_batch_size)
        return torch.cat([checkpoint(embed, chunk, use_reentrant=False) for chunk in chunks])

    def _ids_of_labels(self, labels: Tensor | None, columns: int) -> list[Tensor]:
        if labels is None or labels.is_floating_point() or labels.shape[1:] not in ((), (columns,)):
            got = "none" if labels is None else f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(
                f"ids_from_labels needs whole numbers in a column label, (b,) or (b, {columns}); got {got}"
            )
        if labels.ndim == 1:
            labels = labels[:, None] * columns + torch.arange(columns, device=labels.device)
        return list(labels.unbind(1))

    def _of_width(self, width: int) -> ContrastiveLoss:
        if width not in self._by_width:
            self._by_width[width] = copy.deepcopy(self.loss)
        return self._by_width[width]

    @property
    def last(self) -> dict[str, Tensor]:
        """Detached numbers of the last call, for logs; with several widths, those of the largest."""
        return self._by_width[max(self._by_width)].last if self._by_width else {}

    def get_extra_state(self) -> dict[int, dict[str, Any]]:
        """Return the memory by width, for ``state_dict()``."""
        return {width: loss_fn.state_dict() for width, loss_fn in self._by_width.items()}

    def set_extra_state(self, state: dict[int, dict[str, Any]]) -> None:
        """Load a saved memory: the next call does what the call after the save would have done."""
        self._by_width = {}
        for width, saved in state.items():
            loss_fn = self._of_width(width)
            loss_fn.temperature = self.loss.temperature
            try:
                loss_fn.load_state_dict(saved)
            except RuntimeError as error:  # it has other entries
                raise ValueError(f"the memory was saved by another loss than {self.loss}: {one_line(error)}") from error

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for the model card."""
        own = {"ids_from_labels": self.ids_from_labels, "mini_batch_size": self.mini_batch_size}
        return {"loss": repr(self.loss), **own}

    @property
    def citation(self) -> str:
        """BibTeX, for the model card."""
        return """
@inproceedings{yau2024emc2,
    title={{EMC}$^2$: Efficient {MCMC} Negative Sampling for Contrastive Learning with Global Convergence},
    author={Chung-Yiu Yau and Hoi-To Wai and Parameswaran Raman and Soumajyoti Sarkar and Mingyi Hong},
    booktitle={International Conference on Machine Learning},
    year={2024},
}
"""


def _ids_of_texts(columns: list[dict[str, Tensor]]) -> list[Tensor]:
    if other := sorted({name for column in columns for name in column if name in _NOT_TEXT}):
        raise ValueError(
            f"what the model is given has {', '.join(other)}, which tokens do not tell apart: give ids in a column "
            "label, with ids_from_labels=True"
        )
    try:
        return [text_ids(column["input_ids"], column["attention_mask"]) for column in columns]
    except KeyError as error:
        raise ValueError(
            f"what the model is given has no {error} (b, length) to tell texts by: give ids in a column label, with "
            "ids_from_labels=True"
        ) from error


class LossMemoryCallback(TrainerCallback):
    """Save a loss's memory in the trainer's checkpoints, which otherwise hold only the model, and load it on resume.

    A run that is stopped and resumed then continues as if it had not been stopped. Without this callback it would
    continue with empty chains. A memory of another run than the checkpoint's is refused.

    Args:
        loss: an `EMC2SentenceLoss`, or a module that has some, such as a `MatryoshkaLoss`; for a dictionary of losses,
            ``nn.ModuleDict(losses)``.
    """

    FILE = "loss_memory.pt"

    def __init__(self, loss: nn.Module) -> None:
        self._losses = {name: each for name, each in loss.named_modules() if isinstance(each, EMC2SentenceLoss)}
        if not self._losses:
            raise ValueError(f"there is no EMC2SentenceLoss in {type(loss).__name__}: give the trainer's loss")
        several = loss.values() if isinstance(loss, nn.ModuleDict) else [loss]
        self._all = all(any(isinstance(each, EMC2SentenceLoss) for each in one.modules()) for one in several)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse losses that the trainer does not call: their memory would be saved empty."""
        if self._all and not any(each.called for each in self._losses.values()):
            raise ValueError("the trainer has another loss than LossMemoryCallback: give both the same object")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the memory next to the model that has just been saved."""
        if args.should_save:
            losses = {name: each.get_extra_state() for name, each in self._losses.items()}
            memory = {"step": state.global_step, "run": state.stateful_callbacks.get(_RUN), "losses": losses}
            with whole_file(self._file(args.output_dir, state)) as partial:
                torch.save(memory, partial)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the memory if a run is resumed."""
        if state.global_step == 0:
            state.stateful_callbacks[_RUN] = {"args": {}, "attributes": {"id": uuid.uuid4().hex}}  # kept with the state
            return
        file = self._file(args.output_dir, state)
        if args.resume_from_checkpoint:
            file = Path(args.resume_from_checkpoint, self.FILE)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is not there: resume from a checkpoint that was saved with LossMemoryCallback; one outside of "
                "output_dir is found if it is args.resume_from_checkpoint, too"
            )
        memory = torch.load(file, map_location="cpu", weights_only=True)
        if memory["step"] != state.global_step or memory["losses"].keys() != self._losses.keys():
            raise ValueError(
                f"{file} is of step {memory['step']} and of the losses {list(memory['losses'])}, the run goes on from "
                f"step {state.global_step} with {list(self._losses)}: args.resume_from_checkpoint must name the "
                "checkpoint that trainer.train is given, and the losses be those of before"
            )
        if memory.get("run") != state.stateful_callbacks.get(_RUN):
            raise ValueError(
                f"{file} is of another run than the checkpoint that the run goes on from: args.resume_from_checkpoint "
                "must name that checkpoint too, where it is not in output_dir"
            )
        for name, each in self._losses.items():
            each.set_extra_state(memory["losses"][name])

    def _file(self, output_dir: str, state: Any) -> Path:
        return Path(output_dir, f"checkpoint-{state.global_step}", self.FILE)
