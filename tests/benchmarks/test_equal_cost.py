"""The pure parts of benchmarks/equal_cost: splits, metrics, the search, what is kept."""

from __future__ import annotations

import io
import math
import os
import signal
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize

pytest.importorskip("numba")
pytest.importorskip("scipy")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "equal_cost"))

import why
from bags import Bags, _tokens
from cells import Cell, Kept
from encoders import BagEncoder
from methods import METHODS, Given, of_either
from momentum import Slow
from problem import Problem, Side, split
from problems import PROBLEMS
from retrieval import global_loss, metrics, ranks
from run import Runner
from search import search
from seconds import microseconds
from table import by_batch_size, by_kappa, costs, groups, mrr, searched, within
from towers import towers
from train import run
from wordnet import senses

CELL = Cell("tiny", "infonce", 8, epochs=2, lr=1e-3, temperature=0.1)
ids = st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), min_size=6, max_size=40)


@given(ids)
@settings(max_examples=30, deadline=None)
def test_no_part_has_an_item_of_another(pairs: list[tuple[int, int]]) -> None:
    x_ids, y_ids = torch.tensor(pairs).T
    parts = split(x_ids, y_ids, validation=2, test=3)
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(len(pairs)))
    for side in (x_ids, y_ids):
        sets = [set(side[part].tolist()) for part in parts.values()]
        assert sum(map(len, sets)) == len(set.union(*sets))


def test_a_split_has_the_sizes_asked_for_and_is_always_the_same() -> None:
    own = torch.arange(50)
    parts = split(own, own, validation=7, test=11)
    assert {name: len(part) for name, part in parts.items()} == {"test": 11, "validation": 7, "train": 32}
    assert all(torch.equal(part, split(own, own, validation=7, test=11)[name]) for name, part in parts.items())


def tiny(pairs: int = 40, shared: int = 4) -> Problem:
    """Vectors and noisy copies; every ``shared`` pairs have a key in common."""
    content = torch.randn(pairs, 6, generator=torch.Generator().manual_seed(0))
    x, y = Side(content, torch.arange(pairs)), Side(content + 0.1, torch.arange(pairs) // shared)
    parts = split(x.ids, y.ids, validation=4, test=4)
    return Problem(x, y, parts, lambda: (nn.Linear(6, 128), nn.Linear(6, 128)), 2, lr=1e-3, temperature=0.1)


@given(ids)
@settings(max_examples=30, deadline=None)
def test_positives_are_all_keys_paired_with_the_query_somewhere(pairs: list[tuple[int, int]]) -> None:
    x_ids, y_ids = torch.tensor(pairs).T
    problem = Problem(Side(None, x_ids), Side(None, y_ids), {}, lambda: (nn.Identity(), nn.Identity()), 1, 1.0, 1.0)
    queries, keys = torch.tensor([0, 4, 2]), torch.tensor([5, 0, 3, 2])
    expected = {
        (i, j)
        for i, query in enumerate(queries.tolist())
        for j, key in enumerate(keys.tolist())
        if (pairs[query][0], pairs[key][1]) in pairs
    }
    assert set(zip(*(places.tolist() for places in problem.positives(queries, keys)), strict=True)) == expected


def test_ranks_and_the_global_loss_are_those_of_a_loop() -> None:
    torch.manual_seed(0)
    queries, keys = normalize(torch.randn(7, 3)), normalize(torch.randn(11, 3))
    keys[5] = keys[2]  # a tie
    positive = [{2}, {0, 1}, {5}, {3}, {4, 10}, {7}, {8}]
    places = torch.tensor([(i, j) for i, own in enumerate(positive) for j in own]).T
    expected, losses = [], []
    for query, own in zip(queries, positive, strict=True):
        scores = [float(query @ key) for key in keys]
        best, others = max(scores[j] for j in own), [score for j, score in enumerate(scores) if j not in own]
        expected.append(1 + sum(score >= best - 1e-6 for score in others))
        mass = math.log(sum(math.exp(score / 0.5) for score in others) / len(others))
        losses.append(mass - sum(scores[j] for j in own) / len(own) / 0.5)
    found = ranks(queries, keys, (places[0], places[1]), chunk_size=3)
    assert found.tolist() == expected
    assert found[0] > 1  # what ties with a negative is behind it
    loss = global_loss(queries, keys, (places[0], places[1]), 0.5, chunk_size=3)
    assert loss == pytest.approx(sum(losses) / 7, abs=1e-5)
    assert metrics(torch.tensor([1, 2, 10, 20])) == pytest.approx({"R@1": 25, "R@10": 75, "MRR": 41.25})


def test_a_bag_has_a_words_grams_and_rows_in_any_order() -> None:
    bags = Bags(["Cat", "a cat", "dog, cats"])
    assert len(_tokens("cat")) == 1 + 3 + 2  # cat, <ca cat at> <cat cat>
    tokens, begins = bags[torch.tensor([2, 0])]
    assert tokens.tolist() == [*_tokens("dog"), *_tokens("cats"), *_tokens("cat")]
    assert begins.tolist() == [0, len(_tokens("dog")) + len(_tokens("cats"))]


def test_senses_of_a_data_file(tmp_path: Path) -> None:
    lines = {
        "noun": '00000001 03 n 02 big_cat 0 lion 0 000 | a large cat; often feared; "the lion slept"; "two lions"\n',
        "adj": "  1 a licence\n00000002 00 a 01 alive(p) 0 000 | living\n",
        "verb": '00000003 29 v 01 nod 2 000 | be almost asleep; "He sat nodding"\n',
        "adv": "",
    }
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as tar:
        for part, text in lines.items():
            entry = tarfile.TarInfo(f"package/dict/data.{part}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    lion, nod = senses(tmp_path / "package.tgz")
    assert (lion.key, lion.example) == ("big cat, lion: a large cat; often feared", "the lion slept")
    assert (nod.key, nod.example) == ("nod: be almost asleep", "He sat nodding")


def test_a_search_finds_the_best_outside_of_where_it_began_and_all_its_neighbours_are_worse() -> None:
    start = replace(CELL, kappa=0.0)
    scores: dict[Cell, float] = {}

    def score(cell: Cell) -> float:
        assert cell not in scores
        distance = abs(math.log2(cell.lr / 8e-3)) + abs(2 * math.log2(cell.temperature / 0.05))
        return scores.setdefault(cell, -distance - (cell.kappa != 0.05))

    found = search(start, score, budget=30, kappas=(0.0, "global", 0.05))
    assert found.inside
    assert found.tried == len(scores)
    assert found.cell == replace(start, lr=8e-3, temperature=0.05, kappa=0.05) or scores[found.cell] > -1e-9
    cut = search(start, lambda cell: -scores.get(cell, -99.0), budget=3)
    assert (cut.tried, cut.inside) == (3, False)


def test_what_is_kept_survives_a_writer_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    Kept(path).keep(CELL, {"steps": 1})
    with path.open("a") as file:
        file.write('{"cell": {"problem": "ti')  # as far as it came
    Kept(path).keep(replace(CELL, seed=1), {"steps": 2})
    assert Kept(path).results == {CELL: {"steps": 1}, replace(CELL, seed=1): {"steps": 2}}


def test_a_cell_is_trained_once_and_one_whose_process_is_killed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trained = tmp_path / "cells.jsonl", tmp_path / "trained"

    def train(cell: Cell, problem: Problem, device: str) -> dict[str, object]:
        with trained.open("a") as file:
            file.write("x")
        if len(trained.read_text()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"steps": 3}

    monkeypatch.setattr("run.run", train)
    with pytest.raises(RuntimeError, match="code -9"):
        Runner("tiny", tiny(), Kept(path)).measure(CELL)
    for _ in range(2):
        assert Runner("tiny", tiny(), Kept(path)).measure(CELL)["steps"] == 3
    assert trained.read_text() == "xx"


def test_a_search_begins_where_the_nearest_other_batch_size_ended(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "tiny.jsonl")
    for batch_size, lr, score in ((4, 1.0, 1.0), (32, 2.0, 3.0), (32, 4.0, 5.0), (64, 8.0, 9.0), (16, 9.0, 9.0)):
        kept.keep(replace(CELL, batch_size=batch_size, lr=lr, temperature=lr), result(score, 1))
    kept.keep(replace(CELL, batch_size=32, lr=5.0, epochs=3), result(9.0, 1))  # of another length
    runner = Runner("tiny", tiny(), kept)
    assert runner._known("infonce", 16, [4, 64, 32]) == (32, 4.0, 4.0, None)
    assert runner._known("infonce", 16, [4]) == (4, 1.0, 1.0, None)
    assert runner._known("infonce", 16, []) == runner._known("dcl", 16, [4, 32]) == (32, 1e-3, 0.1, None)


def test_a_search_begun_again_trains_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def scored(cell: Cell, *_: object) -> dict[str, object]:
        trained.append(cell)
        return result(-abs(math.log(cell.lr / 7e-4)) - abs(math.log(cell.temperature / 0.05)), 1)

    monkeypatch.setattr("run.run", scored)
    monkeypatch.setattr("run._in_process", lambda work: work())
    found = []
    for _ in range(2):  # each reads what is kept
        runner = Runner("tiny", tiny(), Kept(tmp_path / "tiny.jsonl"))
        searched = (32, []), (8, [32]), (16, [32, 8])
        found.append([runner.search("infonce", size, 12, before) for size, before in searched])
    assert found[0] == found[1]
    assert len(trained) == len(set(trained))


def test_a_second_start_finds_the_higher_hill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(cell: Cell, *_: object) -> dict[str, object]:
        low, high = ((math.log2(cell.lr / lr)) ** 2 for lr in (CELL.lr, 64 * CELL.lr))
        return result(max(1 - low, 2 - high) - abs(math.log(cell.temperature / CELL.temperature)), 1)

    monkeypatch.setattr("run.run", scored)
    monkeypatch.setattr("run._in_process", lambda work: work())
    problem = tiny()
    problem = replace(problem, lr=CELL.lr, temperature=CELL.temperature)
    runner = Runner("tiny", problem, Kept(tmp_path / "tiny.jsonl"))
    once, twice = (runner.search("infonce", 32, 20, second=second) for second in (None, (0.032, 0.1)))
    assert (once.cell.lr, twice.cell.lr) == (CELL.lr, 0.064)
    assert once.inside
    assert twice.inside
    again = runner.search("infonce", 32, 20, second=(CELL.lr, 0.2))  # which climbs the lower again
    assert (again.cell, again.tried > once.tried) == (once.cell, True)


def test_what_a_guide_finds_nearer_than_the_positive_is_no_negative() -> None:
    problem = tiny(pairs=30, shared=1)
    x, y = towers(problem, "cpu")
    rows = torch.arange(5)
    step = METHODS["gist"].make(Given(x, y, 5, 0.1, None, 1, 0, 128))

    def scores() -> list[list[float]]:
        """Each row's positive, and 3 · 4 others in an order."""
        a, b = (normalize(tower(rows)).tolist() for tower in (x, y))
        dot = lambda u, v: sum(i * j for i, j in zip(u, v, strict=True))  # noqa: E731
        pairs = [[(a[i], b[j]), (a[i], a[j]), (b[i], b[j])] for i in range(5) for j in range(5) if j != i]
        others = [dot(*pair) for own in pairs for pair in own]
        return [[dot(a[i], b[i]), *others[12 * i : 12 * i + 12]] for i in range(5)]

    guide = scores()
    for tower in (x, y):  # which the guide does not follow
        nn.init.normal_(tower.encoder.weight, generator=torch.Generator().manual_seed(1))
    expected, left_out = 0.0, 0
    for own, known in zip(scores(), guide, strict=True):
        left = [score for score, nearer in zip(own, known, strict=True) if nearer <= known[0]]
        left_out += len(own) - len(left)
        expected += (math.log(sum(math.exp(score / 0.1) for score in left)) - own[0] / 0.1) / 5
    assert left_out > 0
    assert step(rows).item() == pytest.approx(expected, rel=1e-4)


def test_a_momentum_encoder_is_the_average_of_all_weights_though_words_follow_when_they_are_met() -> None:
    texts = [f"word{i} other{i % 5}" for i in range(12)]
    side = Side(Bags(texts), torch.arange(12))
    problem = Problem(side, side, {"train": torch.arange(12)}, lambda: (BagEncoder(), BagEncoder()), 1, 1e-3, 0.1)
    tower, _ = towers(problem, "cpu")
    fast = dict(tower.encoder.named_parameters())
    slow, expected = Slow(tower, 0.8), {name: each.detach().clone() for name, each in fast.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        rows = torch.randperm(12, generator=generator)[:3]
        for name, each in expected.items():
            each.lerp_(fast[name].detach(), 0.2)
        found = slow(rows)
        torch.testing.assert_close(found, torch.func.functional_call(tower.encoder, expected, (side.content[rows],)))
        with torch.no_grad():
            for each in tower.encoder.mlp.parameters():
                each.add_(torch.randn(each.shape, generator=generator), alpha=0.1)
            met = side.content[rows][0].unique()
            fast["bag.weight"][met] += torch.randn(len(met), fast["bag.weight"].shape[1], generator=generator)


def test_sides_of_one_encoder_share_its_momentum_encoder() -> None:
    problem = tiny()
    one = nn.Linear(6, 128)
    x, y = towers(replace(problem, encoders=lambda: (one, one)), "cpu")
    first = Slow(x, 0.5)
    second = Slow(y, 0.5, first)
    before = one.weight.detach().clone()
    with torch.no_grad():
        one.weight.add_(1.0)
    first(torch.arange(2))
    second(torch.arange(2))
    assert second.encoder is first.encoder
    torch.testing.assert_close(first.encoder.weight, before + 0.5)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"mnrl", "mnrl-together"}))
def test_each_method_trains_and_counts_what_it_encodes(name: str) -> None:
    method, kappas = METHODS[name], METHODS[name].kappas
    cell = replace(CELL, method=name, batch_size=8 // method.batches, kappa=kappas[-1] if kappas else None)
    problem = tiny()
    result = run(cell, problem, "cpu")
    assert result["steps"] == 2 * (len(problem.parts["train"]) // 8)
    least = 2 * result["pairs"]
    assert result["differentiated"] >= least
    assert result["encoded"] >= least
    once = {"infonce", "dcl", "isir-cache", "sogclr", "cross-batch-memory", "dcl-together", "remembered-together"}
    assert result["encoded"] == least or name not in once


@pytest.mark.parametrize("chosen", [slice(None), slice(0, 9), slice(30, None)])
def test_items_of_either_side_are_encoded_in_the_order_of_their_ids(chosen: slice) -> None:
    x, y = towers(tiny(), "cpu")
    queries, keys = len(x.first), len(y.first)
    ids = torch.arange(queries + keys)[chosen]
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    one_by_one = [
        x.of_items(ids[i : i + 1]) if i_d < queries else y.of_items(ids[i : i + 1] - queries)
        for i, i_d in enumerate(ids.tolist())
    ]
    torch.testing.assert_close(of_either(x, y, ids), torch.cat(one_by_one))


def test_a_cell_gives_the_same_again_and_is_tested_only_at_the_end() -> None:
    cell, problem = replace(CELL, method="isir-cache", kappa=0.0), tiny()
    once, again = run(cell, problem, "cpu"), run(replace(cell, final=True), problem, "cpu")
    assert once["validation"] == again["validation"]
    assert "test" not in once
    assert set(again["test"]) == {"R@1", "R@10", "MRR"}


def test_times_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, int]] = []

    def train(cell: Cell, problem: Problem, device: str, steps: int) -> tuple[None, dict[str, float]]:
        done.append((cell.batch_size, steps))
        return None, {"cpu_seconds": len(done), "pairs": 10.0 * cell.batch_size}

    monkeypatch.setattr("seconds.train", train)
    cells = [CELL, replace(CELL, batch_size=20)]
    found = microseconds(cells, tiny(), pairs=40, rounds=2)
    assert done == [(8, 5), (20, 2)] * 3  # the first time is not counted
    assert found == {cells[0]: [3e6 / 80, 5e6 / 80], cells[1]: [4e6 / 200, 6e6 / 200]}


def result(mrr: float, pairs: int, seconds: float = 1.0) -> dict[str, object]:
    return {"test": {"MRR": mrr}, "validation": {"MRR": mrr}, "pairs": pairs, "cpu_seconds": seconds}


def test_a_table_has_the_means_of_seeds_and_the_best_at_no_more_than_a_cost() -> None:
    final = replace(CELL, final=True)
    dcl, longer = replace(final, method="dcl"), replace(final, method="dcl", epochs=4)
    kept = {
        **{replace(final, seed=seed): result(10.0 + seed, 100) for seed in range(3)},
        replace(dcl, lr=5.0): result(99.0, 100),  # settings of an earlier search
        dcl: result(20.0, 100, seconds=0.5),
        longer: result(30.0, 200),
        replace(CELL, kappa=0.2): result(5.0, 1),
        replace(CELL, kappa=0.2, lr=2.0): result(7.0, 1),
    }
    found = groups(kept)
    reference = found[0]
    assert (reference.mean(mrr), reference.shown(mrr)) == (11.0, "11.00 ± 1.00")
    of_samples, of_seconds = (within(found, reference, costs[cost]) for cost in ("samples", "seconds"))
    assert {name: group.mean(mrr) for name, group in of_samples.items()} == {"infonce": 11.0, "dcl": 20.0}
    assert {name: group.mean(mrr) for name, group in of_seconds.items()} == {"infonce": 11.0, "dcl": 30.0}  # 2 × .5
    assert by_kappa(kept) == {("infonce", 8): {0.2: 7.0}}
    searches = {replace(CELL, lr=lr): result(validation, 1) for lr, validation in ((1e-3, 5.0), (2e-3, 6.0))}
    twice = {replace(final, lr=2e-3): result(1.0, 1), final: result(2.0, 1)}  # the better in validation came first
    (chosen,) = groups({**searches, **twice})
    assert chosen.mean(mrr) == 1.0


def test_tables_by_batch_size_have_the_fewest_epochs_and_tell_of_a_search_that_was_not_ended() -> None:
    final = replace(CELL, final=True)
    kept = {
        **{replace(final, seed=seed): result(10.0 + seed, 1) for seed in range(3)},
        replace(final, method="dcl"): result(20.0, 1),
        replace(final, method="dcl", batch_size=16): result(30.0, 1),
        replace(final, epochs=4): result(99.0, 2),
        CELL: result(3.0, 1),
        **{replace(CELL, lr=lr): result(2.0, 1) for lr in (2e-3, 5e-4)},
        **{replace(CELL, temperature=tau): result(1.0, 1) for tau in (0.0707, 0.141)},
        replace(CELL, epochs=4): result(9.0, 1),
        **{replace(CELL, method="dcl", lr=lr): result(2.0 if lr == 1e-3 else 1.0, 1) for lr in (5e-4, 1e-3, 2e-3)},
        replace(CELL, method="dcl", temperature=0.0707): result(1.0, 1),
        replace(CELL, method="dcl", temperature=0.141, kappa=0.2): result(1.0, 1),
    }
    assert by_batch_size(groups(kept)).splitlines() == [
        "|  | b = 8 | 16 |",
        "| --- | --: | --: |",
        "| InfoNCE | 11.00 ± 1.00 | – |",
        "| DCL | **20.00** (1) | 30.00 (1) |",
    ]
    assert searched(kept).splitlines()[2:] == ["| InfoNCE | 5: 0.001, 0.1 |", "| DCL | 5: 0.001, 0.1 … |"]


def test_the_pages_have_the_tables_of_what_is_kept() -> None:
    root = Path(__file__).parents[2]
    cells = Kept(root / "benchmarks" / "equal_cost" / "kept" / "wordnet.jsonl").results
    pages, start = (root / "docs" / "results-retrieval.md").read_text(), (root / "README.md").read_text()
    together = ["infonce-together", "dcl-together", "uniformity-together", "momentum-together"]
    main = ["infonce", "dcl", *together, "moco", "moco-zero"]
    others = ["moco", "cross-batch-memory", "sogclr", "negative-cache"]
    for methods in (main, others):
        kept = {cell: result for cell, result in cells.items() if cell.method in methods}
        assert by_batch_size(groups(kept)) in pages
        assert searched(kept) in pages
    kept = {cell: result for cell, result in cells.items() if cell.method in main}
    assert by_batch_size(groups(kept), digits=1) in start


def test_problems_have_names() -> None:
    assert {"wordnet", "emoji", "emoji-names"} <= set(PROBLEMS)


def test_a_whole_batch_of_dcl_has_no_error_at_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(why, "PAIRS", 12)
    monkeypatch.setattr(why, "LENGTHS", {"epochs": 2, "mixing_epochs": 1, "runs": 2})
    monkeypatch.setattr(why, "ESTIMATORS", {name: why.ESTIMATORS[name] for name in ("DCL", "InfoNCE", "EMC², cache")})
    texts = [f"word{i} other{i % 7}" for i in range(16)]
    own = torch.arange(16).clamp(max=13)  # the last three are one query
    sides = Side(Bags(texts), own), Side(Bags(texts[::-1]), torch.arange(16))
    problem = Problem(*sides, {"train": torch.arange(16)}, lambda: (BagEncoder(), BagEncoder()), 1, 1e-3, 0.1)
    errors = why.measure(*towers(problem, "cpu"), 0.5, 12)
    assert list(errors) == [(of, name) for of in ("two towers", "all embeddings") for name in why.ESTIMATORS]
    for of in ("two towers", "all embeddings"):
        assert errors[of, "DCL"].one_epoch < 1e-9
        assert errors[of, "InfoNCE"].one_epoch == pytest.approx(errors[of, "InfoNCE"].squared_bias, rel=1e-3)
        assert errors[of, "InfoNCE"].squared_bias > 1e-4
