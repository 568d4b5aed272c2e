"""What is exported computes what the run's encoder does, wherever it is loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from torch_emc2.cli import main
from torch_emc2.config import read_config, to_yaml
from torch_emc2.data import evaluation_transform
from torch_emc2.models import build_encoder, load_backbone, save_encoder
from torch_emc2.runs import export_run
from torch_emc2.settings.model import ModelConfig


def finished_run(folder: Path, model: ModelConfig, channels: int, size: int, **weights: Any) -> tuple[Path, Any]:
    """Write what a run leaves behind, without training it; each weight and statistic has a value of its own."""
    config = read_config("quickstart", ["--data.augmentation.size", str(size), "--data.name", f"folder:{folder}"])
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(replace(config, model=model)))
    (folder / "versions.json").write_text(json.dumps({"images": "321, 0a1b"}))
    encoder = build_encoder(model, channels, size)
    generator = torch.Generator().manual_seed(2)
    for tensor in encoder.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    save_encoder(encoder, folder)
    return folder, encoder.eval()


def pretrained(tmp_path: Path, name: str) -> str:
    torch.save(timm.create_model(name).state_dict(), tmp_path / "w.pth")
    return str(tmp_path / "w.pth")


def images(channels: int, size: int) -> Tensor:
    return torch.rand(5, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("backbone", "channels", "size", "started"),
    [
        ("test_resnet", 1, 96, "random"),
        ("test_resnet", 3, 64, "pretrained"),
        ("test_vit", 3, 48, "pretrained"),
        ("test_efficientnet", 1, 64, "pretrained"),
    ],
)
def test_timm_loads_the_folder_and_computes_the_same(
    backbone: str, channels: int, size: int, started: str, tmp_path: Path
) -> None:
    model = ModelConfig(backbone, pretrained=started == "pretrained" and pretrained(tmp_path, backbone))
    run, encoder = finished_run(tmp_path / "run", model, channels, size)
    files = export_run(run, tmp_path / "out")
    assert [file.name for file in files] == ["README.md", "config.json", "model.safetensors"]
    timms = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert timms.num_features == encoder.feature_dim
    config = resolve_data_config({}, model=timms)
    x = images(channels, size)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    assert (mean.flatten().tolist() == [0] * channels) == (started == "random")
    with torch.no_grad():
        torch.testing.assert_close(timms((x - mean) / std), encoder.features(x), rtol=1e-5, atol=1e-5)
        own = load_backbone(tmp_path / "out" / "model.safetensors").eval()
        torch.testing.assert_close(own(x), encoder.features(x), rtol=0, atol=0)


@pytest.mark.parametrize(("size", "side"), [(48, 70), (96, 130), (224, 300)])
def test_timms_transform_is_the_one_of_evaluation(size: int, side: int, tmp_path: Path) -> None:
    model = ModelConfig("test_resnet", stem="standard", pretrained=pretrained(tmp_path, "test_resnet"))
    run, encoder = finished_run(tmp_path / "run", model, 3, size)
    export_run(run, tmp_path / "out")
    timms = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    smooth = torch.nn.functional.interpolate(images(3, 6)[:1], (side, side + 40), mode="bicubic")[0].clamp(0, 1)
    image = Image.fromarray((255 * smooth).byte().permute(1, 2, 0).numpy())
    theirs = create_transform(**resolve_data_config({}, model=timms))(image)
    ours = encoder.normalize(evaluation_transform(size)(pil_to_tensor(image)))
    assert theirs.shape == ours.shape == (3, size, size)
    assert (theirs - ours).abs().max() < 2.1 / 255 / min(encoder.architecture.std)  # Pillow rounds after each axis


@pytest.mark.parametrize("changed", [{"stem": "small"}, {"norm": "group"}])
def test_what_timm_cannot_build_is_loaded_as_the_card_says(changed: dict[str, Any], tmp_path: Path) -> None:
    run, encoder = finished_run(tmp_path / "run", ModelConfig("test_resnet", **changed), 3, 64)
    export_run(run, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["README.md", "model.safetensors"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "timm cannot build it" in card
    (code,) = [part.removeprefix("python\n") for part in card.split("```") if part.startswith("python")]
    names = {"images": images(3, 64)}
    exec(code, names)  # a reader's copy of it
    torch.testing.assert_close(names["features"], encoder.features(images(3, 64)), rtol=0, atol=0)


def test_the_card_says_what_the_model_is_and_how_it_is_used(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    numbers = {"trained": {"probe": 0.4321}}
    evaluation = {"data": "folder:/home/me/cats", "train_images": 3, "test_images": 2, "viewed_images": 2}
    (run / "evaluation-cats-0a.json").write_text(json.dumps(evaluation | {"numbers": numbers, "notes": []}))
    export_run(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("on 66 images of digits", "loss `emc2`", "On folder:cats:", "43.21 %", "burn_in: 0.1", "## Licence"):
        assert words in card
    assert "pretrained weights" not in card
    assert "/home/me" not in card

    (run / "evaluation-cats-0a.json").rename(run / "evaluation-cats-0a-9-epochs.json")  # of an encoder before
    export_run(run, tmp_path / "later")
    assert "43.21 %" not in (tmp_path / "later" / "README.md").read_text()
    (run / "evaluation-cats-0a-9-epochs.json").rename(run / "evaluation-cats-0a.json")

    (run / "evaluation-cats-0a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"evaluation-cats-0a\.json is damaged"):
        export_run(run, tmp_path / "again")


def test_the_cards_code_runs_and_it_has_no_paths_but_its_own(tmp_path: Path) -> None:
    model = ModelConfig("test_resnet", pretrained=pretrained(tmp_path, "test_resnet"))
    run, encoder = finished_run(tmp_path / "run", model, 3, 64)
    export_run(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "on 321 images of folder:run" in card
    assert "pretrained: w.pth" in card
    assert "began with pretrained weights (w.pth), whose own licence counts too" in card
    assert str(tmp_path) not in card.replace(str(tmp_path / "out"), "")
    assert str(tmp_path).encode() not in (tmp_path / "out" / "model.safetensors").read_bytes()
    (code,) = [part.removeprefix("python\n") for part in card.split("```") if part.startswith("python")]
    image = Image.new("RGB", (64, 64), (10, 200, 100))
    names: dict[str, Any] = {"image": image}
    exec(code, names)
    expected = encoder.features(evaluation_transform(64)(pil_to_tensor(image))[None])
    torch.testing.assert_close(names["features"], expected, rtol=1e-5, atol=1e-5)


def test_a_run_goes_on_from_what_another_has_exported(tmp_path: Path) -> None:
    run, encoder = finished_run(tmp_path / "run", ModelConfig("test_resnet", stem="standard"), 3, 64)
    export_run(run, tmp_path / "out")
    again = build_encoder(ModelConfig("test_resnet", pretrained=str(tmp_path / "out")), 3, 64).eval()
    torch.testing.assert_close(again.features(images(3, 64)), encoder.features(images(3, 64)))


@pytest.mark.parametrize("feature", ["backbone", "hidden"])
def test_onnx_takes_images_as_they_are_and_gives_the_runs_features(feature: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = ModelConfig("test_resnet", feature=feature, pretrained=pretrained(tmp_path, "test_resnet"))
    run, encoder = finished_run(tmp_path / "run", model, 3, 64)
    files = export_run(run, tmp_path / "out", onnx=True)
    assert [file.name for file in files] == ["README.md", "config.json", "model.onnx", "model.safetensors"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for count in (1, 5):
        x = images(3, 64)[:count]
        (features,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(features), encoder.features(x).detach(), rtol=1e-4, atol=1e-5)


def test_without_the_package_onnx_is_refused_before_anything_is_written(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_emc2.runs.export.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install onnxscript"):
        export_run(finished, tmp_path / "out", onnx=True)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_written(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(finished), str(tmp_path / "out")]) == 0
    told, written = capsys.readouterr().out.splitlines()
    assert told.startswith("timm cannot build this backbone")
    assert written == f"Written: {tmp_path}/out/README.md, {tmp_path}/out/model.safetensors"


def test_a_folder_that_has_files_is_kept(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("own")
    with pytest.raises(FileExistsError, match="is not empty: give a new folder"):
        export_run(finished, tmp_path)
    assert (tmp_path / "README.md").read_text() == "own"


def test_pushing_gives_the_hub_the_folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Hub:
        def create_repo(self, name: str, **settings: Any) -> None:
            asked.append((name, settings))

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            asked.append((repo_id, sorted(file.name for file in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    export_run(finished, tmp_path / "out", push="me/cats")
    assert asked == [
        ("me/cats", {"private": True, "exist_ok": True}),
        ("me/cats", ["README.md", "model.safetensors"]),
    ]
    monkeypatch.setattr(Hub, "create_repo", lambda *args, **settings: 1 / 0)
    with pytest.raises(
        RuntimeError, match=r"is written, but not pushed to me/cats \(division by zero\): hf auth login"
    ):
        export_run(finished, tmp_path / "again", push="me/cats")
    assert (tmp_path / "again" / "README.md").is_file()


def test_what_cannot_be_onnx_leaves_the_folder_empty(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ValueError, match=r"cannot be written as ONNX \(no such operation"):
        export_run(finished, tmp_path / "out", onnx=True)
    assert not list((tmp_path / "out").glob("*"))
