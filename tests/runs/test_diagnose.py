"""A run's diagnosis, against the same done by hand."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from torch_emc2 import DCLLoss, EMC2Loss, InfoNCELoss
from torch_emc2.config import Config, read_config, recorded_config, to_yaml
from torch_emc2.data import (
    ContrastiveDataset,
    RandomView,
    open_dataset,
)
from torch_emc2.diagnostics import gradient_error, target_statistics
from torch_emc2.diagnostics.estimators import Diagnosis, embed_views
from torch_emc2.diagnostics.markdown import to_markdown
from torch_emc2.models import load_encoder
from torch_emc2.runs import diagnose_run
from torch_emc2.training import train


def test_a_diagnosis_is_that_of_the_run_s_views_and_weights(tiny: Config) -> None:
    finished = train(replace(tiny, emc2=replace(tiny.emc2, carry="encode_if_used")))  # whose chains keep scores
    diagnosis = diagnose_run(finished, samples=24, batch_size=8, epochs=2, seed=1)
    written = json.loads((finished / "diagnosis.json").read_text())
    assert written == json.loads(json.dumps(asdict(diagnosis)))
    assert (written["samples"], written["batch_size"], written["temperature"]) == (24, 8, 0.1)
    text = (finished / "diagnosis.md").read_text()
    assert all(text.count(f"| {name} |") >= 2 for name in diagnosis.errors)
    width, height = Image.open(finished / "diagnosis.png").size
    assert (width, height) == (1500, 570)

    config = read_config(str(finished / "config.yaml"))
    images = open_dataset("digits", "train", Path("data"), limit=66, seed=config.seed)
    views = ContrastiveDataset(images, RandomView(config.data.augmentation), seed=1)
    picks = torch.randperm(66, generator=torch.Generator().manual_seed(1))[:24].tolist()
    encoder = load_encoder(finished)

    def embed(i: int) -> Tensor:
        return F.normalize(encoder(torch.stack([views.view(0, i, view) for view in range(2)])), dim=1).detach()

    z = torch.stack([embed(i) for i in picks])
    by_hand = gradient_error(lambda _: DCLLoss(0.1), z, 0.1, 8, epochs=2, runs=3)
    assert diagnosis.errors["DCL"].squared_error == pytest.approx(by_hand.squared_error, rel=1e-3)
    assert diagnosis.target.peak == pytest.approx(target_statistics(z, 0.1, 8).peak, rel=1e-4)
    inner = diagnosis.errors["DCL"].at_parameters
    assert inner is not None
    assert inner.one_epoch > 0

    state = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["loss._extra_state"]
    differences = []
    for place, i in enumerate(picks):
        carried, stored = state["chains"]["ids"][i].item(), state["chains"]["similarities"][i].item() / 0.1
        if carried >= 0:
            differences += (z[place] @ embed(carried).T / 0.1 - stored).abs().flatten().tolist()
    assert diagnosis.staleness is not None
    assert 4 * diagnosis.staleness.chains == len(differences)
    assert diagnosis.staleness.median == pytest.approx(float(torch.tensor(differences).quantile(0.5)), rel=1e-3)


def test_a_run_with_a_weight_of_the_positive_is_held_to_its_objective(finished: Path, tmp_path: Path) -> None:
    kappa, mass = 0.5, 0.5 * 15 / 3
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "config.yaml").write_text(to_yaml(replace(recorded_config(finished), positive_weight=kappa)))
    diagnosis = diagnose_run(run, samples=16, batch_size=4, epochs=2)
    assert (diagnosis.positive_weight, diagnosis.positive_mass) == (kappa, mass)
    assert f"positive_weight κ = {kappa}. " in (run / "diagnosis.md").read_text()
    assert f"the positive counts κ N / n = {mass:g}, " in (run / "diagnosis.md").read_text()

    config = recorded_config(finished)
    images = open_dataset("digits", "train", Path("data"), limit=66, seed=config.seed)
    views = ContrastiveDataset(images, RandomView(config.data.augmentation), seed=0)
    picks = torch.randperm(66, generator=torch.Generator().manual_seed(0))[:16].tolist()
    encoder = load_encoder(finished)
    z = embed_views(encoder, torch.stack([torch.stack([views.view(0, i, view) for view in range(2)]) for i in picks]))
    for name, make in (
        ("InfoNCE", lambda _: InfoNCELoss(0.1, positive_weight=kappa, num_samples=32)),
        ("EMC², isir", lambda seed: EMC2Loss(32, 0.1, kernel="isir", carry="encode", seed=seed, positive_weight=kappa)),
    ):
        by_hand = gradient_error(make, z, 0.1, 4, positive_mass=mass, epochs=2, runs=3)
        assert diagnosis.errors[name].squared_error == pytest.approx(by_hand.squared_error, rel=1e-3)


def test_a_loss_of_ones_own_is_measured_beside_the_others(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is the library's has that one's numbers; a run's own is imported only where it is named."""
    run = shutil.copytree(finished, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("loss: emc2\n", "loss: torch_emc2:DCLLoss\n"))
    settings = {"samples": 24, "batch_size": 8, "epochs": 1, "mixing_epochs": 2}
    caplog.set_level("INFO")
    errors = diagnose_run(run, **settings, loss="torch_emc2:DCLLoss").errors
    own = errors["torch_emc2:DCLLoss"]
    assert errors["torch_emc2:DCLLoss"] == replace(
        errors["DCL"], at_parameters=errors["torch_emc2:DCLLoss"].at_parameters
    )
    assert errors["torch_emc2:DCLLoss"].at_parameters == errors["DCL"].at_parameters
    assert "left out" not in caplog.text
    told = f"torch_emc2:DCLLoss: squared bias {own.squared_bias:.4f} ({len(errors)} of {len(errors)})"
    assert told in caplog.text
    with pytest.raises(ValueError, match="has no class Margin derived from"):
        diagnose_run(run, **settings, loss="torch_emc2:Margin")
    with pytest.raises(ValueError, match="batch_size must be from 2"):
        diagnose_run(run, samples=4)
    assert "The run's own loss is left out; --loss torch_emc2:DCLLoss imports it" in caplog.text


def test_what_limits_a_diagnosis_is_said() -> None:
    z = F.normalize(torch.randn(40, 2, 4, generator=torch.Generator().manual_seed(0)), dim=2)
    errors = {"DCL": gradient_error(lambda _: DCLLoss(0.1), z, 0.1, 4, epochs=1, mixing_epochs=0, runs=2)}
    errors = {"DCL": replace(errors["DCL"], at_parameters=errors["DCL"])}

    def said(batch_size: int, mixing_epochs: int) -> str:
        target = target_statistics(z, 0.1, batch_size)
        shown = Diagnosis(40, batch_size, 0.1, None, 0.0, 0.5, 2, mixing_epochs, target, errors, None)
        return to_markdown(shown)

    visits = target_statistics(z, 0.1, 4).visits
    enough = math.ceil(4 * visits)
    assert f"Chains may take {visits:.0f} visits to come near their target, and had 1 before" in said(4, 1)
    assert f"--mixing-epochs {enough} would tell." in said(4, 1)
    assert "visits to come near" not in said(4, enough)
    assert "Batches of 20 are much of these 40 samples" in said(20, 1)
    assert "are much of these" not in said(4, 1)


def test_a_damaged_checkpoint_is_not_diagnosed(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    torch.save({"a": 1}, run / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged"):
        diagnose_run(run, samples=16, epochs=1)


def test_samples_must_fill_a_batch(finished: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be from 2 to the 10 samples, got 16"):
        diagnose_run(finished, samples=10)
    with pytest.raises(ValueError, match="epochs must be at least 1 and mixing_epochs not negative, got 0 and 20"):
        diagnose_run(finished, samples=20, epochs=0)


def test_finite_views_are_diagnosed_without_staleness(tiny: Config, tmp_path: Path) -> None:
    data = replace(tiny.data, finite_views=2, root=str(tmp_path))
    run = train(replace(tiny, epochs=1, data=data))
    assert diagnose_run(run, samples=20, batch_size=5, epochs=1).staleness is None
