"""Batches whose views are drawn where training is hold what other batches do."""

import pytest
import torch
from PIL import Image

from torch_emc2.data import (
    ArrayImages,
    BatchedViews,
    DataError,
    EpochSampler,
    FileImages,
    ImageDataset,
    UndrawnDataset,
    make_loader,
    view_seed,
)
from torch_emc2.settings.images import Augmentation

AUGMENTATION = Augmentation(10)


def _dataset():
    generator = torch.Generator().manual_seed(0)
    images = ImageDataset(ArrayImages(torch.randint(0, 256, (22, 3, 12, 12), dtype=torch.uint8, generator=generator)))
    carried_ids = torch.full((22, 2), -1)
    carried_ids[9], carried_ids[20] = torch.tensor([4, 1]), torch.tensor([4, -1])
    return UndrawnDataset(images, AUGMENTATION, seed=5, carried_ids=carried_ids)


def test_a_batch_is_drawn_of_its_samples_and_of_their_carried_ones():
    dataset, ids = _dataset(), [20, 1, 9]
    batch = dataset.draw(dataset.__getitems__([(3, i) for i in ids]))
    assert (batch.index.tolist(), batch.carried_ids.tolist(), batch.epoch, batch.skipped) == (ids, [1, 4], 3, 0)
    draw, parts = (
        BatchedViews(AUGMENTATION),
        ((batch.first, ids, 0), (batch.second, ids, 1), (batch.carried, [1, 4], 2)),
    )
    for views, own, view in parts:
        images = torch.stack([dataset.images.image(i) for i in own])
        assert torch.equal(views, draw(images, [view_seed(5, 3, i, view) for i in own]))
    assert torch.equal(batch.carried, dataset.encode_inputs(3, batch.carried_ids))
    nothing = dataset.draw(dataset.__getitems__([(0, 0), (0, 1)]))
    assert nothing.carried.shape == (0, 3, 10, 10)


def test_batches_do_not_depend_on_the_number_of_workers():
    batches = [
        [dataset.draw(batch) for batch in make_loader(dataset, EpochSampler(22, 4, seed=5), 4, workers)]
        for workers in (0, 2)
        for dataset in [_dataset()]
    ]
    for one, other in zip(*batches, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_images_of_several_sizes_are_refused(tmp_path):
    for i, size in enumerate([(12, 12), (12, 12), (9, 12)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"")
    images = ImageDataset(FileImages([str(tmp_path / f"{i}.png") for i in range(4)]))
    dataset = UndrawnDataset(images, AUGMENTATION, seed=0, on_bad_image="skip")
    assert dataset.__getitems__([(0, 0), (0, 3), (0, 1)]).skipped == 1
    with pytest.raises(DataError, match=r"images of one size, these have 12x9, 12x12: use data.augment: workers"):
        dataset.__getitems__([(0, 0), (0, 2)])
