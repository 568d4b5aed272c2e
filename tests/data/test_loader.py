import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from torch_emc2.data import (
    ArrayImages,
    BadImageError,
    ContrastiveDataset,
    DataError,
    EpochSampler,
    FileImages,
    ImageDataset,
    RandomView,
    make_loader,
    seeded_view,
)
from torch_emc2.settings.images import Augmentation

COUNT, BATCH = 22, 4


def _images():
    pixels = torch.randint(0, 256, (COUNT, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageDataset(ArrayImages(pixels))


def _carried_ids():
    ids = torch.randint(-1, COUNT, (COUNT, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    ids[:6] = -1
    return ids


def _dataset(**kwargs):
    return ContrastiveDataset(_images(), RandomView(Augmentation(10)), seed=5, **kwargs)


def _same(a, b):
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


def test_a_batch_holds_the_views_of_its_samples_and_of_their_carried_ones():
    carried_ids = _carried_ids()
    dataset, images, transform = _dataset(carried_ids=carried_ids), _images(), RandomView(Augmentation(10))
    batch = dataset.__getitems__([(3, 20), (3, 1), (3, 9)])
    assert batch.index.tolist() == [20, 1, 9]
    assert batch.index.dtype == batch.carried_ids.dtype == torch.int64
    assert (batch.epoch, batch.skipped) == (3, 0)
    for view, views in enumerate((batch.first, batch.second)):
        expected = [seeded_view(transform, images.image(i), 5, 3, i, view) for i in (20, 1, 9)]
        assert torch.equal(views, torch.stack(expected))
    wanted = sorted({int(i) for i in carried_ids[[20, 1, 9]].flatten()} - {-1})
    assert batch.carried_ids.tolist() == wanted
    assert torch.equal(
        batch.carried, torch.stack([seeded_view(transform, images.image(i), 5, 3, i, 2) for i in wanted])
    )
    assert torch.equal(batch.carried, dataset.encode_inputs(3, batch.carried_ids))
    assert torch.equal(dataset.view(3, 9, 1), batch.second[2])


def test_nothing_carried_has_the_shape_of_nothing():
    for dataset in (_dataset(), _dataset(carried_ids=_carried_ids())):
        batch = dataset.__getitems__([(0, 0), (0, 1)])
        assert batch.carried_ids.shape == (0,)
        assert batch.carried.shape == (0, 3, 10, 10)


@pytest.fixture(scope="module")
def epochs():
    """Two epochs of batches by number of workers; between them the training process changes the chains."""
    result = {}
    for workers in (0, 2):
        carried_ids, sampler = _carried_ids(), EpochSampler(COUNT, BATCH, seed=5)
        loader = make_loader(_dataset(carried_ids=carried_ids), sampler, BATCH, workers)
        result[workers] = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            for batch in loader:
                result[workers].append(batch)
                carried_ids[batch.index] = (batch.index[:, None] + torch.tensor([1, 2])).int() % COUNT
    return result


def test_batches_do_not_depend_on_the_number_of_workers(epochs):
    assert len(epochs[0]) == len(epochs[2]) == 2 * (COUNT // BATCH)
    assert all(_same(a, b) for a, b in zip(epochs[0], epochs[2], strict=True))


def test_workers_see_the_chains_of_the_training_process(epochs):
    for number, batch in enumerate(epochs[2][COUNT // BATCH :]):
        seen_before = set(torch.cat([b.index for b in epochs[2][: COUNT // BATCH]]).tolist())
        fresh = {(i + k) % COUNT for i in batch.index.tolist() if i in seen_before for k in (1, 2)}
        assert fresh <= set(batch.carried_ids.tolist()), number


def test_epochs_differ(epochs):
    first, second = epochs[0][0], epochs[0][COUNT // BATCH]
    assert (first.epoch, second.epoch) == (0, 1)
    assert first.index.tolist() != second.index.tolist()


# --- unreadable images ------------------------------------------------------------------------------------------------


def _files(folder, bad):
    for i in range(6):
        Image.new("RGB", (12, 12), (40 * i, 0, 0)).save(folder / f"{i}.png")
    for i in bad:
        (folder / f"{i}.png").write_bytes(b"")
    return ImageDataset(FileImages([str(folder / f"{i}.png") for i in range(6)]))


def test_bad_images_are_skipped_and_counted(tmp_path):
    images = _files(tmp_path, bad=(1, 4))
    dataset = ContrastiveDataset(images, RandomView(Augmentation(10)), seed=0, on_bad_image="skip")
    batch = dataset.__getitems__([(0, i) for i in range(6)])
    assert batch.index.tolist() == [0, 2, 3, 5]
    assert batch.skipped == 2
    assert torch.equal(batch.second[2], dataset.view(0, 3, 1))
    with pytest.raises(DataError, match=r"1 of the 2 images .*4\.png"):
        dataset.__getitems__([(0, 0), (0, 4)])


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_raise_one_line_through_the_loader(tmp_path, workers):
    dataset = ContrastiveDataset(_files(tmp_path, bad=(2,)), RandomView(Augmentation(10)), seed=0)
    with pytest.raises(BadImageError) as caught:
        list(make_loader(dataset, EpochSampler(6, 3, seed=0), 3, workers))
    assert str(caught.value).startswith(f"cannot read image {str(tmp_path / '2.png')!r}")
    assert "\n" not in str(caught.value)


# --- the sampler ------------------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(0, 60), st.integers(1, 5), st.integers(1, 4)).map(lambda t: (t[0] + t[1] * t[2], *t[1:]))


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(0, 2**40), st.integers(0, 1000))
def test_ranks_one_after_the_other_are_the_single_process(sizes, seed, epoch):
    count, local, world = sizes
    ranks = [EpochSampler(count, local, seed, rank, world) for rank in range(world)]
    single = EpochSampler(count, local * world, seed)
    for sampler in (*ranks, single):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)
    keys = list(single)
    batches = [keys[i : i + local * world] for i in range(0, len(keys), local * world)]
    parts = [list(sampler) for sampler in ranks]
    for t, batch in enumerate(batches):
        assert [key for part in parts for key in part[t * local : (t + 1) * local]] == batch
    indices = [index for _, index in keys]
    assert len(set(indices)) == len(indices) == count // (local * world) * local * world
    assert set(indices) <= set(range(count))
    assert all(key_epoch == epoch for key_epoch, _ in keys)


@settings(max_examples=50, deadline=None)
@given(sizes, st.data())
def test_skip_resumes_exactly_once(sizes, data):
    count, local, world = sizes
    sampler = EpochSampler(count, local, 7, data.draw(st.integers(0, world - 1)), world)
    sampler.set_epoch(3)
    full = list(sampler)
    skipped = data.draw(st.integers(0, len(full) // local))
    sampler.skip(skipped)
    assert len(sampler) == len(full)
    assert list(sampler) == full[skipped * local :]
    assert list(sampler) == full


def test_every_sample_comes_about_equally_often():
    sampler, counts = EpochSampler(10, 7, seed=0), torch.zeros(10)
    for epoch in range(2000):
        sampler.set_epoch(epoch)
        counts[[index for _, index in sampler]] += 1
    assert (counts / 2000 - 0.7).abs().max() < 5 * (0.7 * 0.3 / 2000) ** 0.5


def test_loader_resumes_in_the_middle_of_an_epoch():
    sampler = EpochSampler(COUNT, BATCH, seed=1)
    loader = make_loader(_dataset(), sampler, BATCH, num_workers=0)
    full = list(loader)
    sampler.skip(3)
    rest = list(loader)
    assert len(rest) == len(full) - 3
    assert all(_same(a, b) for a, b in zip(rest, full[3:], strict=True))


def test_wrong_arguments():
    with pytest.raises(DataError, match="7 samples do not fill one global batch of 8"):
        EpochSampler(7, 4, seed=0, world_size=2)
    with pytest.raises(DataError, match="cannot skip 6 batches of an epoch of 5"):
        EpochSampler(COUNT, BATCH, seed=0).skip(6)
    with pytest.raises(DataError, match="batch_size 8"):
        make_loader(_dataset(), EpochSampler(COUNT, BATCH, seed=0), 8, 0)
    with pytest.raises(DataError, match="3 rows for 22 images"):
        _dataset(carried_ids=torch.zeros(3, 1))
    with pytest.raises(DataError, match="'ignore'"):
        _dataset(on_bad_image="ignore")
