"""Groups of near duplicates, against a search by a plain loop."""

from pathlib import Path

import matplotlib.image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_emc2.runs import Duplicates, draw_duplicates
from torch_emc2.runs import duplicates as module
from torch_emc2.runs.duplicates import near_duplicates
from torch_emc2.runs.gallery import Gallery


def by_loop(z: torch.Tensor, threshold: float) -> set[frozenset[int]]:
    near = torch.nn.functional.cosine_similarity(z[:, None].double(), z[None].double(), dim=2) >= threshold
    left, groups = set(range(len(z))), set()
    while left:
        group, new = set(), {left.pop()}
        while new:
            group |= new
            new = {j for i in new for j in range(len(z)) if near[i, j]} - group
        left -= group
        groups.add(frozenset(group))
    return {group for group in groups if len(group) > 1}


@given(st.integers(1, 40), st.integers(0, 2**16), st.sampled_from([0.3, 0.7, 0.9]), st.sampled_from([1, 7, 256]))
@settings(max_examples=40, deadline=None)
def test_groups_hang_together_by_pairs(size: int, seed: int, threshold: float, chunk: int) -> None:
    z = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        groups = near_duplicates(z, threshold)
    assert {frozenset(hit.row for hit in group) for group in groups} == by_loop(z, threshold)
    twice = near_duplicates(torch.cat([z, z]), 1.0)
    assert sorted([hit.row for hit in group] for group in twice) == [[i, i + size] for i in range(size)]
    least = [round(min(cosine for _, cosine in group), 6) for group in groups]
    assert least == sorted(least, reverse=True)  # the surest first
    for group in groups:
        first = z[group[0].row]
        expected = torch.nn.functional.cosine_similarity(z[[hit.row for hit in group]], first[None])
        assert [hit.similarity for hit in group] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_picture_and_a_paragraph_a_group(tmp_path: Path) -> None:
    z = torch.tensor([[1.0, 0], [0, 1], [1, 0.01], [0.01, 1], [1, 1]])
    image = torch.full((3, 4, 4), 200, dtype=torch.uint8)
    gallery = Gallery(z, list("abcde"), [None] * 5, lambda i: image)
    found = Duplicates(gallery, near_duplicates(z, 0.99))
    assert str(found) == " 1.000  a\n 1.000  c\n\n 1.000  b\n 1.000  d"
    draw_duplicates(found, tmp_path / "d.png")
    picture = (matplotlib.image.imread(tmp_path / "d.png")[..., :3] * 255).round()
    assert (picture == 200).all(-1).sum() == pytest.approx(4 * 175**2, rel=0.05)
