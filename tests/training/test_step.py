"""A step computes what it says."""

import copy
import csv
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import timm.optim
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from outcomes import Outcome, Weights, assert_same, outcome
from torch_emc2.checkpoint import load_checkpoint
from torch_emc2.cli import main
from torch_emc2.config import Config, OptimizerConfig, to_yaml
from torch_emc2.data import ContrastiveDataset, open_dataset
from torch_emc2.losses import EMC2Loss
from torch_emc2.losses.visiting import Visiting
from torch_emc2.settings.model import Norm
from torch_emc2.training import ContrastiveData, ContrastiveModule, train
from torch_emc2.training.progress import made_of


@pytest.mark.parametrize("finite_views", [None, 2])
def test_a_step_is_the_loss_of_both_views_and_the_carried(
    finite_views: int | None, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(tiny, data=replace(tiny.data, root=str(tmp_path), finite_views=finite_views))
    seen: list[tuple[Any, Tensor, Weights, Any]] = []
    step = ContrastiveModule.training_step

    def spy(module: ContrastiveModule, batch: Any, batch_idx: int) -> Tensor:
        before = {name: value.clone() for name, value in module.encoder.state_dict().items()}
        memory = module.loss.get_extra_state()
        memory = {**memory, "chains": {name: table.clone() for name, table in memory["chains"].items()}}
        encoded: list[int] = []
        with module.encoder.register_forward_pre_hook(lambda _, images: encoded.append(len(images[0]))):
            loss = step(module, batch, batch_idx)
        assert encoded == [2 * len(batch.index) + len(batch.carried)]  # all in one call
        seen.append((batch, loss.detach(), before, memory))
        return loss

    def keep(module: ContrastiveModule) -> None:
        gradients.append({name: value.grad.clone() for name, value in module.encoder.named_parameters()})

    gradients: list[Any] = []
    monkeypatch.setattr(ContrastiveModule, "training_step", spy)
    monkeypatch.setattr(ContrastiveModule, "on_after_backward", keep)
    train(tiny)
    batch, loss, weights, memory = seen[-1]
    assert len(batch.carried) > 0
    module = ContrastiveModule(tiny, 1, 66)
    module.encoder.load_state_dict(weights)
    module.loss.set_extra_state(memory)
    z = module.encoder(torch.cat([batch.first, batch.second, batch.carried]))
    size = len(batch.index)
    carried = dict(zip(batch.carried_ids.tolist(), z[2 * size :], strict=True))
    assert isinstance(module.loss, EMC2Loss)
    expected = module.loss(
        z[:size], z[size : 2 * size], batch.index, encode=lambda ids: torch.stack([carried[i] for i in ids.tolist()])
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=0)
    expected.backward()
    by_hand = {name: value.grad for name, value in module.encoder.named_parameters()}
    torch.testing.assert_close(gradients[-1], by_hand, rtol=1e-5, atol=1e-7)
    # The images are those that the table named.
    named = memory["chains"]["ids"][batch.index]
    assert batch.carried_ids.tolist() == sorted(set(named[named >= 0].tolist()))


@pytest.mark.parametrize(("norm", "num_chains"), [("batch", 1), ("batch", 12), ("group", 1)])
def test_carried_images_that_are_few_share_the_statistics_of_the_batch(
    norm: Norm, num_chains: int, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm's: with few images the batch's first views are encoded too. Many are enough by themselves."""
    emc2 = replace(tiny.emc2, carry="encode_if_used", burn_in=0.0, num_chains=num_chains)
    tiny = replace(tiny, emc2=emc2, model=replace(tiny.model, norm=norm), precision="64-true")
    step, encode_inputs = ContrastiveModule.training_step, ContrastiveDataset.encode_inputs
    asked: list[tuple[Tensor, Tensor]] = []  # ids and images of this step
    sizes: list[int] = []  # encoded in this step, call by call
    seen: list[Any] = []
    gradients: list[Any] = []

    def spy(module: ContrastiveModule, batch: Any, batch_idx: int) -> Tensor:
        memory = copy.deepcopy(module.loss.get_extra_state())
        weights = copy.deepcopy(module.encoder.state_dict())
        asked.clear()
        sizes.clear()
        with module.encoder.register_forward_pre_hook(lambda _, images: sizes.append(len(images[0]))):
            loss = step(module, batch, batch_idx)
        seen.append((batch, weights, memory, list(asked), list(sizes)))
        return loss

    def spy_inputs(dataset: ContrastiveDataset, epoch: int, ids: Tensor) -> Tensor:
        views = encode_inputs(dataset, epoch, ids)
        asked.append((ids, views.double()))
        return views

    def keep(module: ContrastiveModule) -> None:
        gradients.append({name: value.grad.clone() for name, value in module.encoder.named_parameters()})

    monkeypatch.setattr(ContrastiveModule, "training_step", spy)
    monkeypatch.setattr(ContrastiveModule, "on_after_backward", keep)
    monkeypatch.setattr(ContrastiveDataset, "encode_inputs", spy_inputs)
    train(tiny)
    checked = 0
    for (batch, weights, memory, calls, encoded), gradient in zip(seen, gradients, strict=True):
        size = len(batch.index)
        if not calls or (len(calls[0][0]) < size) != (num_chains == 1):
            continue
        ((ids, images),) = calls
        company = batch.first if norm == "batch" and num_chains == 1 else batch.first[:0]
        assert encoded == [2 * size, len(ids) + len(company)]
        module = ContrastiveModule(tiny, 1, 66).double()
        module.encoder.load_state_dict(weights)
        module.loss.set_extra_state(memory)
        views = module.encoder(torch.cat([batch.first, batch.second]))
        rows = dict(zip(ids.tolist(), module.encoder(torch.cat([company, images]))[len(company) :], strict=True))
        loss = module.loss(
            *views.chunk(2), batch.index, encode=lambda ids, rows=rows: torch.stack([rows[i] for i in ids.tolist()])
        )
        loss.backward()
        by_hand = {name: value.grad for name, value in module.encoder.named_parameters()}
        torch.testing.assert_close(gradient, by_hand)
        checked += 1
    assert checked >= 2


def test_dropout_is_another_at_every_place_in_training_and_the_same_again(tiny: Config) -> None:
    def dropped(seed: int, epoch: int, batch_idx: int, rank: int) -> tuple[float, ...]:
        module = ContrastiveModule(replace(tiny, seed=seed), 1, 66)
        module.trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank)  # type: ignore[assignment]
        module.on_train_batch_start(None, batch_idx)  # type: ignore[arg-type]
        return tuple(torch.nn.functional.dropout(torch.ones(64)).tolist())

    places = list(itertools.product((0, 1), repeat=4))
    draws = [dropped(*place) for place in places]
    assert len(set(draws)) == len(places)
    assert [dropped(*place) for place in places] == draws


def test_learning_rate_warms_up_and_falls_by_half_a_cosine(tiny: Config) -> None:
    run = train(replace(tiny, epochs=5, optimizer=OptimizerConfig(lr=0.01, warmup_epochs=1.5)))
    with (run / "metrics.csv").open(newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    warm = [0.01 * (step + 1) / 6 for step in range(6)]  # four batches an epoch
    cosine = [0.005 * (1 + math.cos(math.pi * step / 14)) for step in range(14)]
    assert rates == pytest.approx([*warm, *cosine], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("lars", timm.optim.Lars)],
)
def test_optimisers(name: Any, kind: type, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ContrastiveModule(replace(tiny, optimizer=OptimizerConfig(name, 0.1, 0.01, 0.8)), 1, 66)
    module.trainer = type("Trainer", (), {"world_size": 1})()  # type: ignore[assignment]
    optimizer = module.configure_optimizers()["optimizer"]
    assert type(optimizer) is kind
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decayed) == len(list(module.encoder.parameters()))
    assert all(decayed[id(p)] == (0.01 if p.ndim > 1 else 0) for p in module.encoder.parameters())
    if name in ("sgd", "lars"):
        assert all(group["momentum"] == 0.8 and not group["nesterov"] for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lars"])
def test_the_backbone_has_its_share_of_the_rate(name: Any, tiny: Config) -> None:
    own = OptimizerConfig(name, 0.1, 0.01, 0.8, warmup_epochs=1, backbone_lr_scale=0.25)
    module = ContrastiveModule(replace(tiny, optimizer=own), 1, 66)
    module.trainer = type("Trainer", (), {"world_size": 1})()  # type: ignore[assignment]
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(list(module.encoder.parameters()))
    assert all(groups[id(p)]["weight_decay"] == (0.01 if p.ndim > 1 else 0) for p in module.encoder.parameters())
    warm = [0.1 * (step + 1) / 4 for step in range(4)]  # four batches an epoch, two epochs
    for rate in warm + [0.05 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]:
        for part, share in ((module.encoder.head, 1), (module.encoder.backbone, 0.25)):
            assert all(groups[id(p)]["lr"] == pytest.approx(share * rate) for p in part.parameters())
        assert schedule.get_last_lr()[0] == pytest.approx(rate)  # which is logged
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("name", "rate"), [("adamw", 1e-3), ("lars", 1.0)])
def test_a_frozen_backbone_stays_as_it_is_and_then_trains(name: Any, rate: float, tiny: Config) -> None:
    assert tiny.model.norm == "batch"
    run = train(replace(tiny, optimizer=OptimizerConfig(name, rate, 0.1, freeze_epochs=1), checkpoint_every_epochs=1))
    torch.manual_seed(tiny.seed)
    start = ContrastiveModule(tiny, 1, 66).encoder.state_dict()
    after = [load_checkpoint(run / "checkpoints" / f"epoch-{epoch}.ckpt")["state_dict"] for epoch in (0, 1)]
    for key, value in start.items():
        frozen, trained = (state[f"encoder.{key}"] for state in after)
        assert torch.equal(frozen, value) == key.startswith("backbone"), key
        assert not torch.equal(trained, frozen), key


def test_similarities_are_float32_under_bf16(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    weigh = Visiting.weigh

    def spy(self: Visiting, rows: Any, scores: Any) -> Any:
        seen.append((rows.vectors.dtype, scores.logits.dtype))
        return weigh(self, rows, scores)

    monkeypatch.setattr(Visiting, "weigh", spy)
    run = train(replace(tiny, precision="bf16-mixed"))
    assert set(seen) == {(torch.float32, torch.float32)}
    assert all(math.isfinite(float(row["loss"])) for row in outcome(run)[3])


@pytest.mark.parametrize("where", ["loss", "gradient", "embedding", "slow embedding"])
def test_a_step_that_is_not_finite_stops_the_run(
    where: str,
    tiny: Config,
    uninterrupted: Callable[[Config], Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = replace(tiny, checkpoint_every_steps=5)
    last = Path(tiny.out) / "checkpoints" / "last.ckpt"
    ids: list[int] = []

    def strike(module: ContrastiveModule, batch: Any, batch_idx: int) -> None:
        start(module, batch, batch_idx)
        if module.trainer.global_step == 6:
            ids.extend(batch.index.tolist())
            if where == "embedding":
                batch.first[3] = math.nan
            elif where == "slow embedding":
                slow: Any = module.slow_encoder
                slow.register_forward_hook(lambda *call: call[-1].index_fill(0, torch.tensor([3]), math.nan))
            elif where == "loss":
                monkeypatch.setitem(vars(module.loss), "temperature", math.nan)  # as no assignment could

    def spoil(module: ContrastiveModule) -> None:
        if where == "gradient" and module.trainer.global_step == 6:
            next(module.encoder.parameters()).grad.view(-1)[0] = math.inf  # type: ignore[union-attr]

    start = ContrastiveModule.on_train_batch_start
    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveModule, "on_train_batch_start", strike)
        patch.setattr(ContrastiveModule, "on_after_backward", spoil)
        if where == "embedding":
            tiny = replace(tiny, model=replace(tiny.model, norm="group"))  # one image, one embedding
        elif where == "slow embedding":
            tiny = replace(tiny, loss="momentum")
        (tmp_path / "tiny.yaml").write_text(to_yaml(tiny))
        assert main(["train", str(tmp_path / "tiny.yaml")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    named = ", ".join(map(str, ids))
    if where.endswith("embedding"):
        name = {"embedding": "x[3]", "slow embedding": "slow[0][3]"}[where]
        assert line.startswith(f"emc2: error: step 6: {name} is not finite")
        assert line.endswith(f"samples {ids[3]}")
    else:
        assert line.startswith(f"emc2: error: step 6: the {where} is not finite (loss ")
        assert f"samples {named})" in line
        assert "global_loss" in line
        assert ("gradient_norm inf" in line) == (where == "gradient")
    state = torch.load(last, weights_only=True)
    assert state["global_step"] == 5
    assert all(value.isfinite().all() for name, value in state["state_dict"].items() if name.startswith("encoder."))
    # The chains that moved in the step are not in the checkpoint either.
    assert_same(outcome(train(tiny, resume=True)), uninterrupted(tiny))


def test_a_gradient_that_is_not_finite_names_all_samples_of_its_step(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(tiny, accumulate=2)
    seen: list[int] = []

    def spoil(module: ContrastiveModule, batch: Any, batch_idx: int) -> None:
        start(module, batch, batch_idx)
        if module.trainer.global_step == 3:
            seen.extend(batch.index.tolist())
            if batch_idx == 2:
                next(module.encoder.parameters()).register_hook(lambda gradient: gradient * math.nan)

    start = ContrastiveModule.on_train_batch_start
    monkeypatch.setattr(ContrastiveModule, "on_train_batch_start", spoil)
    with pytest.raises(ValueError, match=r"step 3: the gradient is not finite") as raised:
        train(tiny)
    assert len(seen) == 32
    assert f"samples {', '.join(map(str, seen))})" in str(raised.value)


@pytest.mark.parametrize("scale", [2.0**127, 1.0])
def test_an_overflow_of_the_scaling_is_skipped(
    scale: float, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_dataset("digits", "train", Path("data"), limit=66)
    module = ContrastiveModule(replace(tiny, emc2=replace(tiny.emc2, carry="drop")), images.channels, len(images))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )

    def spoil(module: ContrastiveModule) -> None:
        next(module.encoder.parameters()).grad.view(-1)[0] = math.inf  # type: ignore[union-attr]

    monkeypatch.setattr(ContrastiveModule, "on_after_backward", spoil)
    before = {name: value.clone() for name, value in module.encoder.named_parameters()}
    if scale == 1:  # nothing is scaled: the gradient itself is infinite
        with pytest.raises(ValueError, match="step 0: the gradient is not finite"):
            trainer.fit(module, ContrastiveData(tiny, images, None))
    else:
        trainer.fit(module, ContrastiveData(tiny, images, None))
        assert scaler.get_scale() == scale / 2
        assert isinstance(module.loss, EMC2Loss)
        assert int((module.loss.chains.ids.data >= 0).sum()) == 16  # the chains moved, the weights did not
    torch.testing.assert_close(dict(module.encoder.named_parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("accumulate", [3, 4, 5])
def test_a_steps_gradient_is_the_mean_over_its_batches(
    accumulate: int, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(tiny, loss="infonce", accumulate=accumulate, epochs=1, precision="64-true")
    batches: list[Any] = []
    steps: list[Any] = []
    step = ContrastiveModule.training_step

    def spy(module: ContrastiveModule, batch: Any, batch_idx: int) -> Tensor:
        batches.append(batch)
        return step(module, batch, batch_idx)

    def keep(module: ContrastiveModule, optimizer: Any) -> None:
        gradients = {name: value.grad.clone() for name, value in module.encoder.named_parameters()}  # type: ignore
        weights = {name: value.clone() for name, value in module.encoder.state_dict().items()}
        steps.append((gradients, weights, list(batches)))
        batches.clear()

    monkeypatch.setattr(ContrastiveModule, "training_step", spy)
    monkeypatch.setattr(ContrastiveModule, "on_before_optimizer_step", keep)
    train(tiny)
    assert [len(group) for *_, group in steps] == {3: [3, 1], 4: [4], 5: [4]}[accumulate]
    for gradients, weights, group in steps:
        module = ContrastiveModule(tiny, 1, 66).double()
        module.encoder.load_state_dict(weights)
        losses = [module.loss(module.encoder(batch.first), module.encoder(batch.second)) for batch in group]
        if tiny.model.norm == "batch":  # whose statistics are of both views
            losses = [module.loss(*module.encoder(torch.cat([b.first, b.second])).chunk(2)) for b in group]
        torch.stack(losses).mean().backward()
        by_hand = {name: value.grad for name, value in module.encoder.named_parameters()}
        torch.testing.assert_close(gradients, by_hand)


def test_channels_last_computes_the_same(tiny: Config) -> None:
    module = ContrastiveModule(replace(tiny, channels_last=True), 1, 66)
    weights = [weight for weight in module.encoder.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    tiny = replace(tiny, precision="64-true")
    runs = [outcome(train(replace(tiny, channels_last=last, out=f"{tiny.out}-{last}"))) for last in (False, True)]
    torch.testing.assert_close(runs[0][:3], runs[1][:3], rtol=1e-6, atol=1e-9)


def test_rows_have_the_numbers_of_their_own_step(tiny: Config) -> None:
    every, some = (
        outcome(train(replace(tiny, log_every_steps=steps, out=f"{tiny.out}-{steps}")))[3] for steps in (1, 3)
    )
    assert some == [every[2], every[5]]


@pytest.mark.parametrize(("given_decay", "decay"), [(0.75, 0.75), (None, 0.99)])
def test_a_momentum_encoder_follows_each_step_of_the_optimiser(
    given_decay: float | None, decay: float, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, loss="momentum", accumulate=2)
    config.momentum.decay = given_decay
    step, weights, given = ContrastiveModule.training_step, [], []

    def spy(module: ContrastiveModule, batch: Any, batch_idx: int) -> Tensor:
        slow = copy.deepcopy(module.slow_encoder)
        assert slow is not None
        with torch.no_grad():
            expected = slow(torch.cat([batch.first, batch.second])).split(len(batch.index))
        forward = module.loss.forward
        with monkeypatch.context() as patch:
            patch.setattr(
                module.loss,
                "forward",
                lambda *args, **further: given.append(further["slow"]) or forward(*args, **further),
            )
            loss = step(module, batch, batch_idx)
        torch.testing.assert_close(given[-1], expected, rtol=0, atol=0)
        return loss

    class Keep(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
            torch.testing.assert_close(dict(module.slow_encoder.module.named_parameters()), self.own(module))

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
            if trainer.global_step > len(weights):
                weights.append(self.own(module))
            self.slow = dict(module.slow_encoder.module.named_parameters())

        def own(self, module: Any) -> Weights:
            return {name: each.detach().clone() for name, each in module.encoder.named_parameters()}

    monkeypatch.setattr(ContrastiveModule, "training_step", spy)
    keep = Keep()
    train(config, callbacks=[keep])
    assert len(given) > len(weights) > 2
    expected = weights[0]
    for own in weights[1:]:
        expected = {name: decay * each + (1 - decay) * own[name] for name, each in expected.items()}
    torch.testing.assert_close({name: each.detach() for name, each in keep.slow.items()}, expected)
    assert not any(each.requires_grad for each in keep.slow.values())


def test_the_decay_is_that_of_a_step_s_samples(tiny: Config) -> None:
    config = replace(tiny, loss="momentum", batch_size=32, accumulate=2)
    assert ContrastiveModule(config, 1, 99).decay(world_size=2) == 1 - 128 / 3200
    config.momentum.decay = 0.75
    module = ContrastiveModule(config, 1, 99)
    assert module.decay(world_size=2) == 0.75
    images = open_dataset("digits", "train", Path("data"))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert made_of(config, images, module, trainer)[2].endswith("and a momentum encoder alike, decay 0.75.")
