"""Batches are those of where a run stands."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outcomes import assert_same, interrupt, outcome, photos
from torch_emc2.config import Config
from torch_emc2.data import open_dataset
from torch_emc2.training import ContrastiveData, train


def test_data_is_placed_after_the_steps_taken(tiny: Config) -> None:
    images = open_dataset("digits", "train", Path("data"), limit=66)
    data = ContrastiveData(replace(tiny, accumulate=2), images, None)

    def batches_after(steps: int) -> list[list[int]]:
        strategy = type("Strategy", (), {"root_device": torch.device("cpu")})()
        names = {"global_step": steps, "global_rank": 0, "world_size": 1, "strategy": strategy}
        data.trainer = type("Trainer", (), names)()  # type: ignore[assignment]
        return [batch.index.tolist() for batch in data.train_dataloader()]

    first, second = batches_after(0), batches_after(2)  # two steps of two batches are an epoch
    assert len(first) == len(second) == 4
    assert first != second
    assert batches_after(1) == first[2:]
    assert batches_after(3) == second[2:]


def test_ids_stay_where_the_host_reads_them(tiny: Config) -> None:
    data = ContrastiveData(tiny, open_dataset("digits", "train", Path("data"), limit=66), None)
    batch = data.dataset.__getitems__([(0, 3), (0, 5)])
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved.index.device.type == "cpu"
    assert moved.index.tolist() == [3, 5]
    assert {each.device.type for each in (moved.first, moved.second, moved.carried)} == {"meta"}


def test_views_drawn_on_the_device_go_on_and_do_not_depend_on_workers(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(tiny, data=replace(tiny.data, augment="device"), precision="64-true", checkpoint_every_steps=3)
    whole = outcome(train(replace(tiny, out=tiny.out + "-whole")))
    tiny = replace(tiny, data=replace(tiny.data, num_workers=2))
    interrupt(tiny, 5, monkeypatch)
    assert_same(outcome(train(tiny, resume=True)), whole)


def test_images_decoded_once_are_the_same(tiny: Config, tmp_path: Path) -> None:
    data = replace(tiny.data, name=photos(tmp_path / "photos", 20), limit=None, root=str(tmp_path), on_bad_image="skip")
    tiny = replace(tiny, data=data, batch_size=10)
    each_time = outcome(train(replace(tiny, out=tiny.out + "-each-time")))
    tiny = replace(tiny, data=replace(data, decode_once=True, num_workers=1))
    assert_same(outcome(train(tiny)), each_time)
    assert (tmp_path / "decoded").exists()
    with pytest.raises(ValueError, match=r"7\.png"):
        train(replace(tiny, out=tiny.out + "-raise", data=replace(tiny.data, on_bad_image="raise")))
