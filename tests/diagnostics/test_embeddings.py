"""The data sets to measure at are as they say."""

import pytest
import torch

from torch_emc2.diagnostics import clustered_embeddings, clustered_pairs


def test_clusters_samples_and_views_are_as_far_apart_as_they_say() -> None:
    """In so many dimensions random offsets are orthogonal, and cosines those of right triangles."""
    z = clustered_embeddings(6, 40_000, clusters=3, spread=0.8, view_spread=0.4, seed=1)
    assert z.shape == (6, 2, 40_000)
    torch.testing.assert_close(z.norm(dim=2), torch.ones(6, 2))
    cosines = torch.einsum("ivd,jwd->ijvw", z, z)
    of_views = 1 / (1 + 0.4**2)
    for i in range(6):
        for j in range(6):
            within = of_views / (1 + 0.8**2) if i % 3 == j % 3 else 0.0
            expected = torch.full((2, 2), of_views if i == j else within)
            if i == j:
                expected.fill_diagonal_(1.0)
            torch.testing.assert_close(cosines[i, j], expected, rtol=0, atol=0.03)
    assert torch.equal(z, clustered_embeddings(6, 40_000, clusters=3, spread=0.8, view_spread=0.4, seed=1))


def test_queries_are_farther_from_their_samples_than_keys_and_off_by_a_gap() -> None:
    x, y = clustered_pairs(6, 40_000, clusters=3, spread=0.8, query_spread=0.7, key_spread=0.3, gap=0.5, seed=1)
    torch.testing.assert_close(torch.cat([x, y]).norm(dim=1), torch.ones(12))
    query, key = 1 / (1 + 0.7**2 + 0.5**2) ** 0.5, 1 / (1 + 0.3**2) ** 0.5  # cosines to a sample
    gap = 0.5**2 * query**2  # what two queries have in common besides
    for i in range(6):
        for j in range(6):
            samples = 1.0 if i == j else 1 / (1 + 0.8**2) if i % 3 == j % 3 else 0.0
            got = [float(x[i] @ y[j]), float(x[i] @ x[j]), float(y[i] @ y[j])]
            across = query * key * samples
            expected = [across, *(2 * [1.0] if i == j else [query**2 * samples + gap, key**2 * samples])]
            assert got == pytest.approx(expected, abs=0.03)
    assert torch.equal(x, clustered_pairs(6, 40_000, clusters=3, spread=0.8, seed=1)[0])
