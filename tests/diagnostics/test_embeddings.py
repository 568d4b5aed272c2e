"""The data sets to measure at are as they say."""

import torch

from torch_emc2.diagnostics import clustered_embeddings


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
