"""The benchmarks run, their ways to train agree, and what they need is asked for by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from tests.dist import run_script
from tests.recipes.test_material import needs_chats, needs_weights

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """The folder's modules by their plain names, as the scripts import each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_all_strategies_find_the_same_loss_in_a_step(tmp_path):
    out = tmp_path / "step.jsonl"
    done = run_script(
        BENCHMARKS / "step.py", 2, "--rows", "192", "--layers", "1", "--turns", "1", "--out", str(out)
    )
    assert done.code == 0, done.output
    record = json.loads(out.read_text())
    assert len(record["step_seconds"]) == 6
    assert record["loss_difference"] < 1e-5
    assert 0 < record["gradient_difference"] < 1e-5
    assert record["averaging_alone_seconds"] > 0
    for name, tokens in record["tokens"].items():
        assert tokens == [192]
        for what in ("", "_without_averaging"):
            (seconds,) = record[f"step_seconds{what}"][name]
            assert record[f"tokens_per_s{what}"][name] == pytest.approx(192 / seconds)


@pytest.mark.weights
@needs_chats
@needs_weights
def test_chats_are_trained_shared_alone_and_padded(tmp_path):
    out = tmp_path / "chats.jsonl"
    sizes = ("--rows", "512", "--workload", "chats", "--layers", "1", "--turns", "1")
    done = run_script(BENCHMARKS / "step.py", 2, *sizes, "--out", str(out))
    assert done.code == 0, done.output
    record = json.loads(out.read_text())
    assert list(record["tokens"]) == [
        "auto auto",
        "auto, packs together",
        "own pack, our kernel",
        "own pack, dense mask",
        "padded batch of 8",
    ]
    # Two packs, shared one after the other or at once or one on each rank, are the same tokens.
    tokens = [tokens for name, tokens in record["tokens"].items() if "padded" not in name]
    assert tokens == tokens[:1] * 4
    assert 512 < tokens[0][0] <= 1024
    assert record["loss_difference"] < 1e-5
    # As much as if the batches had been one: several on each rank, or one on each of several.
    assert 0 < record["gradient_difference"] < 1e-5


def test_every_plan_of_the_attention_table_is_timed_beside_the_rows_per_critical_shard(tmp_path, scripts):
    import attention

    out = tmp_path / "attention.jsonl"
    sizes = ("--rows", "96", "--workload", "magi", "--turns", "1")
    done = run_script(BENCHMARKS / "attention.py", 2, *sizes, "--out", str(out))
    assert done.code == 0, done.output
    record = json.loads(out.read_text())
    assert set(attention.PEERS) < record["seconds"].keys() == record["modelled_seconds"].keys()
    assert len(record["seconds"]) == len(attention.PLANS)
    for name, seconds in record["seconds"].items():
        assert f"  {name:<25} {seconds * 1e3:8.1f} ms" in done.output
    assert record["rows_per_critical"] > 0
    assert f"= {record['rows_per_critical']:.2g}\n" in done.output
    best = min(record["seconds"][name] for name in attention.PEERS)
    assert f"auto is {best / record['seconds']['auto auto']:.2f} x as fast as the best of" in done.output


def test_memory_is_what_plans_say_within_the_budget_and_flat_from_layer_to_layer(tmp_path):
    out = tmp_path / "memory.jsonl"
    sizes = ("--rows", "64", "--layers", "2", "--workload", "one", "--budget", "24")
    done = run_script(BENCHMARKS / "memory.py", 2, *sizes, "--out", str(out))
    assert done.code == 0, done.output
    record = json.loads(out.read_text())
    held = record["bytes"]
    for name, each in held.items():
        assert each["planned"] == each["layer"] < each["with_kernel"], name
        forward, backward = each["arena"][:2], each["arena"][2:]
        assert len(set(forward)) == len(set(backward)) == 1 and forward[0] <= backward[0], name
        assert each["step"] >= max(each["head"], *each["layers"]), name
    for name in ("auto, 24 remote rows", "sap, 24 remote rows"):
        assert held[name]["remote_rows"] <= 24
    # One document over two ranks: the second rank reads all that the first one has.
    assert held["sap contiguous"]["remote_rows"] == held["all_gather zigzag"]["remote_rows"] == 64
    assert held["sap, 24 remote rows"]["arena"][-1] < held["all_gather zigzag"]["arena"][-1]
    # The whole step stands in the table, for the baselines too.
    for name, each in held.items():
        line = next(line for line in done.output.splitlines() if line.startswith(f"  {name} "))
        assert f"most {each['step'] / 2**20:6.1f} " in line


def test_a_way_that_sees_other_documents_shows_in_the_loss(scripts):
    import step
    import ways

    torch.manual_seed(0)
    model = ways.build(layers=1, rows=64)
    lengths = np.array([20, 30, 14])
    batch = ways.packed(lengths, np.random.default_rng(0), torch.device("cpu"))
    leaking = {name: value for name, value in batch.items() if name != "position_ids"}
    tried = {name: ways.Way(None, [], [], data="same") for name in ("packed", "leaking", "alone")}
    losses = [model(**inputs).loss.item() for inputs in (batch, leaking)]
    pieces = {name: value.split(lengths.tolist(), dim=1) for name, value in batch.items()}
    alone = [model(**{name: parts[i] for name, parts in pieces.items()}).loss.item() for i in range(3)]
    losses.append(float(np.dot(alone, lengths - 1) / (lengths - 1).sum()))
    spent = {name: step.Spent(loss=[loss]) for name, loss in zip(tried, losses)}
    assert step.largest_difference(tried, spent) > 1e-4
    del tried["leaking"]
    assert step.largest_difference(tried, spent) < 1e-5


def test_a_padded_batch_trains_every_document_as_alone(scripts):
    import ways

    torch.manual_seed(0)
    model = ways.build(layers=1, rows=64)
    batch = ways.padded(np.array([9, 3, 17]), np.random.default_rng(0), torch.device("cpu"))
    assert (batch["labels"] != ways.IGNORED).sum() == 9 + 3 + 17 - 3
    alone = sum(
        model(input_ids=ids[:n][None], labels=ids[:n][None]).loss.item() * (n - 1)
        for ids, n in zip(batch["input_ids"], (9, 3, 17))
    )
    assert model(**batch).loss.item() == pytest.approx(alone / 26, abs=1e-5)


def test_gradients_are_averaged_whatever_the_bucket(scripts, monkeypatch):
    import step
    import ways

    monkeypatch.setattr(step, "BUCKET_BYTES", 1 << 20)
    monkeypatch.setattr(step.dist, "all_reduce", lambda joined: joined.mul_(3))
    monkeypatch.setattr(step.dist, "get_world_size", lambda: 2)
    model = ways.build(layers=1, rows=8)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(i))
    step.average(model)
    for i, parameter in enumerate(model.parameters()):
        assert (parameter.grad == i * 1.5).all()


def test_a_way_with_other_averaged_gradients_shows(scripts, monkeypatch):
    import step
    import ways

    replica = torch.nn.Module()
    replica.module = torch.nn.Linear(3, 2)

    def trained(replica, optimizer, way, turn, averages=True):
        for parameter in replica.module.parameters():
            # What is not averaged may be anything.
            parameter.grad = torch.full_like(parameter, way.batches[turn] if averages else 7.0)
        return 1.0, 0.0, None

    monkeypatch.setattr(step, "step", trained)
    tried = {
        name: ways.Way(None, [0.0, *values], [], data=data)
        for name, data, values in (
            ("first", "same", (2.0, 3.0)),
            ("off", "same", (2.5, 3.0)),
            ("right", "same", (2.0, 3.0)),
            ("other tokens", "other", (9.0, 3.0)),
        )
    }
    spent = step.measure(replica, None, tried, 2)
    assert [each.gradients for each in spent.values()] == pytest.approx([0, 0.25, 0, 0])
    assert all(each.averaged == each.alone == [1.0, 1.0] for each in spent.values())


def test_attention_across_documents_shows_as_an_error(scripts, monkeypatch):
    import attention

    monkeypatch.setattr(attention.dist, "all_reduce", lambda worst, op: None)
    lengths = np.array([5, 11])

    def alone(*parts: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [attention.alone(*piece) for piece in zip(*(x.split(lengths.tolist()) for x in parts))]
        )

    # Rows at or beyond the pack are padding, as in a plan.
    layers = {"alone": (np.arange(16), alone), "leaking": (np.arange(16), attention.alone)}
    layers["padded"] = (
        np.arange(18),
        lambda *parts: pad(alone(*(x[:16] for x in parts)), (0, 0, 0, 0, 0, 2)),
    )
    errors = attention.errors_of(layers, lengths, torch.device("cpu"), torch.float32)
    assert max(*errors["alone"].values(), *errors["padded"].values()) < 1e-5
    assert min(errors["leaking"].values()) > 0.1


def test_a_missing_peer_is_asked_for_by_name(scripts, monkeypatch):
    import peers

    monkeypatch.setitem(sys.modules, "ringmaster", None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps --target peers axolotl-ringmaster==0\.2\.7"):
        peers.Ringmaster("ringmaster ring", 8, 4, torch.device("cpu"))
