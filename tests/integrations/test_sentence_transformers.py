"""Under sentence-transformers' own trainer, with a BERT of a few weights."""

import datetime
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.utils._pytree import tree_map_only

from torch_emc2 import ContrastiveLoss, DCLLoss, EMC2Loss, InfoNCELoss, MomentumLoss, Temperature, UniformityLoss

transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from page import code_of_page  # noqa: E402
from sentence_transformers.sentence_transformer import losses  # noqa: E402

from torch_emc2.integrations.sentence_transformers import EMC2SentenceLoss, LossMemoryCallback  # noqa: E402
from torch_emc2.integrations.text_ids import text_ids  # noqa: E402

T, WORDS = 0.05, 40
COLUMNS = ["anchor", "positive", "negative", "worse"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that knows words w0, w1, …"""
    path = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{word}" for word in range(WORDS))]
    (path / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **sizes)
    transformers.BertModel(config).save_pretrained(path)
    return path


def load(folder: Path, dropout: float = 0.1) -> Any:
    config = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", config_kwargs=config)


@pytest.fixture
def model(folder: Path) -> Any:
    return load(folder, dropout=0.0).train()


def texts(count: int, columns: int, seed: int = 0) -> dict[str, list[str]]:
    """All different, and of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(WORDS, (row % 4,), generator=generator).tolist() for row in range(count * columns)]
    lines = [
        f"w{row % WORDS} w{row // WORDS} " + " ".join(f"w{word}" for word in more) for row, more in enumerate(words)
    ]
    return {name: lines[column::columns] for column, name in enumerate(COLUMNS[:columns])}


def tokens(model: Any, columns: dict[str, list[str]]) -> list[dict[str, Tensor]]:
    return [model.preprocess(column) for column in columns.values()]


def value_and_gradient(loss: nn.Module, model: Any, features: list[dict[str, Tensor]]) -> list[Tensor]:
    value = loss([dict(each) for each in features], None)
    weights = [each for each in model.parameters() if each.requires_grad]
    gradients = torch.autograd.grad(value, weights, allow_unused=True)
    return [value.detach(), *(each for each in gradients if each is not None)]


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("directions", ["x->y", "both"])
def test_with_infonce_it_is_their_ranking_loss(model: Any, columns: int, directions: Any) -> None:
    model.double()
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    theirs = losses.MultipleNegativesRankingLoss(model, 1 / T, **(both if directions == "both" else {}))
    ours = EMC2SentenceLoss(model, InfoNCELoss(T, towers=2, directions=directions))
    features = tokens(model, texts(6, columns))
    got, want = (value_and_gradient(loss, model, features) for loss in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    assert len(want) > 10


@pytest.mark.parametrize("towers", [1, 2])
def test_what_comes_again_is_no_negative(model: Any, towers: Any) -> None:
    """Against sums by hand: an anchor and a positive come again, and a hard negative is another one's positive."""
    model.double()
    data = texts(5, 4)
    data["anchor"][3], data["positive"][4] = data["anchor"][0], data["positive"][1]
    data["worse"][2] = data["positive"][0]
    features = tokens(model, data)
    with torch.no_grad():
        x, y, *hard = (nn.functional.normalize(model(dict(each))["sentence_embedding"]) for each in features)
    # Rows 0 and 3 share the anchor, so both positives are their own; 1 and 4 a positive. For others the second is no
    # negative; with one tower nor is its partner.
    group, value = [0, 1, 2, 0, 1], 0.0
    first_x, first_y = ([0, 1, 2, 4], [0, 1, 2, 3]) if towers == 2 else ([0, 1, 2], [0, 1, 2])
    directions = [(x, x, y)] if towers == 2 else [(x, x, y), (y, y, x)]
    for rows, alike, other in directions:
        columns_alike = first_x if rows is x else first_y
        columns_other = first_y if rows is x else first_x
        for row in range(5):
            negatives = [rows[row] @ other[each] for each in columns_other if group[each] != group[row]]
            if towers == 1:
                negatives += [rows[row] @ alike[each] for each in columns_alike if group[each] != group[row]]
            negatives += [*(hard[0] @ rows[row]), *(hard[1][[0, 1, 3, 4]] @ rows[row])]
            value += float(torch.stack(negatives).div(T).logsumexp(0) - rows[row] @ other[row] / T)
    loss = EMC2SentenceLoss(model, DCLLoss(T, towers=towers, **({"directions": "x->y"} if towers == 2 else {})))
    assert loss(features).item() == pytest.approx(value / (5 * len(directions)), rel=1e-9)


def train(
    folder: Path,
    out: Path,
    loss: ContrastiveLoss | None = None,
    wrap: Callable[[Any, nn.Module], nn.Module] = lambda model, loss: loss,
    *,
    resume: bool | Path = False,
    remember: bool = True,
    remembered: Callable[[Any], nn.Module] | None = None,
    dropout: float = 0.1,
    **settings: Any,
) -> tuple[dict[str, Tensor], Any, Any]:
    """Return the weights, what the loss remembers, and the trainer."""
    torch.manual_seed(1)
    model = load(folder, dropout)
    ours = EMC2SentenceLoss(model, loss)
    whole = wrap(model, ours)
    settings = {"num_train_epochs": 2, "save_steps": 3, "learning_rate": 0.01, **settings}
    args = sentence_transformers.SentenceTransformerTrainingArguments(
        str(out),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model,
        args,
        datasets.Dataset.from_dict(texts(19, 3)),  # the last batch of an epoch has one row
        datasets.Dataset.from_dict(texts(9, 3, seed=1)),
        loss=whole,
        callbacks=[LossMemoryCallback(remembered(model) if remembered else whole)] if remember else [],
    )
    trainer.train(resume_from_checkpoint=str((out if resume is True else resume) / "checkpoint-3") if resume else None)
    return model.state_dict(), ours.get_extra_state(), trainer


def same(one: Any, other: Any) -> bool:
    try:
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("loss", [lambda: None, lambda: UniformityLoss(0.1)], ids=["emc2", "uniformity"])
def test_stopped_and_resumed_equals_uninterrupted(folder: Path, tmp_path: Path, loss: Any) -> None:
    weights, memory, _ = train(folder, tmp_path, loss())
    assert same(train(folder, tmp_path, loss(), resume=True)[:2], (weights, memory))
    assert memory[8]["_extra_state"]["calls"] == 14  # two epochs of seven batches, accumulated by twos
    assert not same(train(folder, tmp_path, loss(), resume=True, remember=False)[0], weights)


def test_a_memory_of_a_loss_that_is_not_trained_with_is_refused(folder: Path, tmp_path: Path) -> None:
    """Which would be saved empty, and loaded without a word."""
    train(folder, tmp_path)
    for resume in (False, True):
        with pytest.raises(
            ValueError, match="the trainer has another loss than LossMemoryCallback: give both the same"
        ):
            train(folder, tmp_path, remembered=lambda model: EMC2SentenceLoss(model), resume=resume)
    other = LossMemoryCallback(nn.ModuleDict({"a": EMC2SentenceLoss(load(folder)), "b": nn.Identity()}))
    other.on_step_end(None, None, None)  # of several losses, the first step may have been of one without a memory


def test_the_memory_of_another_step_is_refused(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path)
    other = tmp_path / "checkpoint-3" / LossMemoryCallback.FILE
    other.write_bytes((tmp_path / "checkpoint-6" / LossMemoryCallback.FILE).read_bytes())
    with pytest.raises(ValueError, match=r"is of step 6 and of the losses .*, the run goes on from step 3 with"):
        train(folder, tmp_path, resume=True)


def test_the_memory_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    """Resumed from elsewhere, output_dir has a memory of the same step: of the run that was in it."""
    train(folder, tmp_path / "here", num_train_epochs=1)
    train(folder, tmp_path / "there", num_train_epochs=1)
    with pytest.raises(ValueError, match=r"loss_memory\.pt is of another run than the checkpoint"):
        train(folder, tmp_path / "here", resume=tmp_path / "there")
    elsewhere = {"resume_from_checkpoint": str(tmp_path / "there" / "checkpoint-3"), "num_train_epochs": 1}
    with pytest.raises(ValueError, match="is of another run"):  # which is in no output_dir
        train(folder, tmp_path / "here", resume=tmp_path / "here", **elsewhere)
    train(folder, tmp_path / "here", resume=tmp_path / "there", **elsewhere)


def test_a_memory_of_another_loss_is_refused(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path, num_train_epochs=1)
    with pytest.raises(ValueError, match=r"the memory was saved by another loss than DCLLoss\(temperature=0\.05"):
        train(folder, tmp_path, DCLLoss(T), resume=True)


def test_the_trainers_way_with_a_loss_s_modules(model: Any) -> None:
    loss = DCLLoss(Temperature(T))
    for name, child in loss.named_children():  # as it goes through them where it wraps the model
        setattr(loss, name, child)
    assert isinstance(loss.temperature, Temperature)


def test_so_with_a_memory_a_width_and_a_temperature_that_is_learnt(folder: Path, tmp_path: Path) -> None:
    def wrap(model: Any, loss: nn.Module) -> nn.Module:
        return losses.MatryoshkaLoss(model, loss, [8, 4])  # type: ignore[no-any-return]

    weights, memory, _ = train(folder, tmp_path, EMC2Loss(None, Temperature(T), num_chains=2), wrap)
    again = train(folder, tmp_path, EMC2Loss(None, Temperature(T), num_chains=2), wrap, resume=True)
    assert same(again[:2], (weights, memory))
    assert {width: state["_extra_state"]["embeddings"].shape[1] for width, state in memory.items()} == {8: 8, 4: 4}
    first, second = (state["temperature.logit_scale"] for state in memory.values())
    assert first == second != pytest.approx(-math.log(T), abs=1e-3)


def test_evaluation_moves_nothing_and_changes_no_training(folder: Path, tmp_path: Path) -> None:
    plain = train(folder, tmp_path / "plain", dropout=0.0)  # which evaluation would draw otherwise, with any loss
    often = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2}
    weights, memory, trainer = train(folder, tmp_path / "evaluated", dropout=0.0, **often)
    assert same((weights, memory), plain[:2])
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    assert same(trainer.loss.get_extra_state(), memory)


def test_a_width_is_what_it_would_be_alone(model: Any) -> None:
    ours = EMC2SentenceLoss(model)
    matryoshka = losses.MatryoshkaLoss(model, ours, [8, 4], [1.0, 0.5])
    alone = {width: EMC2Loss(None, T, kernel="isir", positive_weight=1.0) for width in (8, 4)}
    for step in range(3):
        features = tokens(model, texts(6, 2, seed=step % 2))
        index = torch.stack([text_ids(each["input_ids"], each["attention_mask"]) for each in features], dim=1)
        embeddings = [model(dict(each))["sentence_embedding"] for each in features]
        each = [loss(*(z[:, :width] for z in embeddings), index) for width, loss in alone.items()]
        got = matryoshka([dict(each) for each in features], None)
        torch.testing.assert_close(got, each[0] + 0.5 * each[1])
    torch.testing.assert_close(ours.last, alone[8].last)


@pytest.mark.parametrize("rows", [3, 20])
def test_rows_in_parts_have_the_whole_batch_s_gradient(model: Any, rows: int) -> None:
    model.double()
    plain, chunked = EMC2SentenceLoss(model), EMC2SentenceLoss(model, mini_batch_size=rows)
    most: list[int] = []
    model.register_forward_pre_hook(lambda _, given: most.append(len(given[0]["input_ids"])))
    for step in range(3):
        features = tokens(model, texts(7, 3, seed=step % 2))
        want = value_and_gradient(plain, model, features)
        most.clear()
        torch.testing.assert_close(value_and_gradient(chunked, model, features), want, rtol=1e-12, atol=1e-14)
        assert max(most) == min(rows, 7)
        assert sum(most) == 2 * 3 * 7  # every row twice
    assert same(plain.get_extra_state(), chunked.get_extra_state())


def test_parts_keep_no_graph_and_draw_one_dropout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for the way back does not grow with the batch; the second pass has the first one's draws."""
    model, devices = load(folder).train(), []

    def seen(*args: Any) -> Any:  # from what torch is given it knows of which devices to keep the state of chance
        tree_map_only(Tensor, lambda tensor: devices.append(tensor.device.type), args)
        return infer(*args)

    infer = torch.utils.checkpoint._infer_device_type
    monkeypatch.setattr(torch.utils.checkpoint, "_infer_device_type", seen)

    def kept(rows: int) -> int:
        numbers: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            EMC2SentenceLoss(model, mini_batch_size=2)(tokens(model, texts(rows, 2)))
        return sum(numbers)

    plain: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: plain.append(t.numel()) or t, lambda t: t):
        EMC2SentenceLoss(model)(tokens(model, texts(24, 2)))
    assert kept(24) < sum(plain) / 10
    torch.manual_seed(0)
    dropped: list[tuple[float, ...]] = []
    dropout = next(module for module in model.modules() if isinstance(module, nn.Dropout))
    dropout.register_forward_hook(lambda *each: dropped.append(tuple(each[2].flatten().tolist())))
    EMC2SentenceLoss(model, mini_batch_size=5)(tokens(model, texts(5, 2))).backward()
    assert len(dropped) == 4
    assert len(set(dropped)) == 2
    assert "cpu" in devices


def steps(model: Any, wrapped: nn.Module, part: slice, rows: int | None) -> dict[str, Tensor]:
    """Return the weights after some steps on part of each batch."""
    loss, optimizer = EMC2SentenceLoss(wrapped, mini_batch_size=rows), torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        batch = {name: lines[part] for name, lines in texts(8, 2, seed=step).items()}
        loss(tokens(model, batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight for name, weight in model.state_dict().items() if "pooler" not in name}


def load_used(folder: Path) -> Any:
    """Without dropout, and with gradients of what is used alone, as the trainer's DDP needs them."""
    model = load(folder, dropout=0.0).train()
    for name, weight in model.named_parameters():
        weight.requires_grad_("pooler" not in name)
    return model


def _rank(rank: int, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2, timeout=timeout)
    for rows in (None, 3):
        model = load_used(folder)
        parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)  # as the trainer wraps it
        torch.save(steps(model, parallel, slice(4 * rank, 4 * rank + 4), rows), out / f"{rank} {rows}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(folder: Path, tmp_path: Path) -> None:
    spawn(_rank, (folder, tmp_path), nprocs=2)  # type: ignore[no-untyped-call]
    model = load_used(folder)
    alone = steps(model, model, slice(None), None)
    for rows in (None, 3):
        first, second = (torch.load(tmp_path / f"{rank} {rows}.pt") for rank in range(2))
        assert same(first, second)
        torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of_texts", [False, True])
def test_ids_from_labels(model: Any, of_texts: bool) -> None:
    """Against the library's loss with ids of our own; three rows with one anchor, which only a label a text says."""
    features = tokens(model, texts(6, 3))
    labels = torch.tensor([[7, 1, 2], [7, 3, 4], [7, 5, 6], [8, 9, 10], [11, 12, 13], [14, 15, 16]])
    labels = labels if of_texts else labels[:, 1]
    ids = labels if of_texts else torch.stack([3 * labels, 3 * labels + 1, 3 * labels + 2], 1)
    x, y, hard = (model(dict(each))["sentence_embedding"] for each in features)
    want = InfoNCELoss(T)(x, y, ids[:, :2], hard=hard, hard_index=ids[:, 2])
    got = EMC2SentenceLoss(model, InfoNCELoss(T), ids_from_labels=True)(features, labels)
    torch.testing.assert_close(got, want)
    by_text = EMC2SentenceLoss(model, InfoNCELoss(T))(features)  # which are all different
    assert torch.isclose(got, by_text) == (not of_texts)


def test_a_temperature_is_assigned_at_any_time(model: Any) -> None:
    loss, features = EMC2SentenceLoss(model, DCLLoss(1.0)), tokens(model, texts(6, 2))
    loss(features)
    loss.loss.temperature = T
    assert loss(features) == EMC2SentenceLoss(model, DCLLoss(T))(features)


def test_a_batch_without_negatives_teaches_nothing(model: Any) -> None:
    data = texts(1, 2)
    for lines in (data, {name: lines * 3 for name, lines in data.items()}):  # one pair; one, three times
        with pytest.warns(UserWarning, match="a batch teaches nothing: a "):
            loss = EMC2SentenceLoss(model)(tokens(model, lines))
        loss.backward()
        assert loss == 0
        assert all(each.grad is None or not each.grad.any() for each in model.parameters())


@pytest.mark.parametrize("own", [{}, {"towers": 2}, {"towers": 2, "directions": "x->y"}])
@pytest.mark.parametrize("repeated", [0, 1])
def test_a_batch_of_one_anchor_or_one_positive_is_told_of_by_every_loss(
    own: dict[str, Any], repeated: int, model: Any
) -> None:
    data = texts(3, 2)
    loss = EMC2SentenceLoss(model, InfoNCELoss(T, **own))
    name = list(data)[repeated]
    with_hard = texts(3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss(tokens(model, data)) > 0
        assert loss(tokens(model, {**with_hard, name: with_hard[name][:1] * 3})) > 0  # which they are pushed from
    with pytest.warns(UserWarning, match="a batch teaches nothing: all of its anchors, or of its positives, are one"):
        assert loss(tokens(model, {**data, name: data[name][:1] * 3})) == 0


def test_its_state_dict_has_the_memory(model: Any) -> None:
    loss, again = EMC2SentenceLoss(model), EMC2SentenceLoss(model)
    loss(tokens(model, texts(6, 2)))
    again.load_state_dict(loss.state_dict())
    assert same(again.get_extra_state(), loss.get_extra_state())
    assert again.get_extra_state()[8]["_extra_state"]["calls"] == 1


def test_model_card(folder: Path, tmp_path: Path) -> None:
    *_, trainer = train(folder, tmp_path, max_steps=1, save_strategy="no")
    card = trainer.model.model_card_data
    assert "EMC2SentenceLoss" in " ".join(card.citations)
    assert "@inproceedings{yau2024emc2" in trainer.loss.citation
    settings = json.dumps(trainer.loss.get_config_dict())
    assert all(each in settings for each in ("temperature=0.05", "positive_weight=1.0", "kernel=Isir()"))


def test_the_pages_code(model: Any) -> None:
    names = {"model": model}
    exec(code_of_page("sentence_transformers"), names)
    theirs = losses.MultipleNegativesRankingLoss(model)
    features = tokens(model, texts(4, 3))
    torch.testing.assert_close(names["loss"]([dict(each) for each in features]), theirs(features, None))


def test_what_is_wrong_is_named(model: Any, folder: Path, tmp_path: Path) -> None:
    features = tokens(model, texts(4, 2))
    with pytest.raises(ValueError, match=r"texts' ids are hashes, beyond num_samples=100: build the loss with"):
        EMC2SentenceLoss(model, EMC2Loss(100))
    with pytest.raises(ValueError, match=r"columns \(anchor, positive, \[negative, …\]\), got 1"):
        EMC2SentenceLoss(model)(features[:1])
    for labels, got in ((None, "none"), (torch.rand(4), r"float32 \(4,\)"), (torch.ones(4, 3).long(), r"\(4, 3\)")):
        with pytest.raises(ValueError, match=f"whole numbers .* got .*{got}"):
            EMC2SentenceLoss(model, ids_from_labels=True)(features, labels)
    with pytest.raises(ValueError, match="has no 'attention_mask'"):
        EMC2SentenceLoss(model)([{"input_ids": each["input_ids"]} for each in features])
    with pytest.raises(ValueError, match="has pixel_values, which tokens do not tell apart"):
        EMC2SentenceLoss(model)([{**each, "pixel_values": torch.rand(4, 3, 2, 2)} for each in features])
    with pytest.raises(ValueError, match="there is no EMC2SentenceLoss in MultipleNegativesRankingLoss"):
        LossMemoryCallback(losses.MultipleNegativesRankingLoss(model))
    with pytest.raises(ValueError, match="mini_batch_size must be at least 1, or None for all rows, got 0"):
        EMC2SentenceLoss(model, mini_batch_size=0)
    with pytest.raises(ValueError, match="in a MatryoshkaLoss or AdaptiveLayerLoss mini_batch_size must be None"):
        losses.MatryoshkaLoss(model, EMC2SentenceLoss(model, mini_batch_size=2), [8, 4])(features, None)
    with pytest.raises(TypeError, match=r"loss must be a loss of torch_emc2, .* got the class EMC2Loss"):
        EMC2SentenceLoss(model, EMC2Loss)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be the model .*, got DCLLoss: EMC2SentenceLoss\(model, loss\)"):
        EMC2SentenceLoss(DCLLoss(T))
    with pytest.raises(ValueError, match='as carry="encode" needs: build with "cache"'):
        EMC2SentenceLoss(model, EMC2Loss(None, T, carry="encode"))
    with pytest.raises(ValueError, match="the trainer has no momentum encoder, as MomentumLoss needs: write a loop of"):
        EMC2SentenceLoss(model, MomentumLoss(T))
    with pytest.raises(TypeError, match=r"x must be embeddings, a tensor \(b, d\), got list"):
        InfoNCELoss(T)(features)  # type: ignore[arg-type]
    train(folder, tmp_path, num_train_epochs=1, remember=False)
    with pytest.raises(FileNotFoundError, match=r"checkpoint-3/loss_memory\.pt is not there: resume from a checkpoint"):
        train(folder, tmp_path, resume=True)
