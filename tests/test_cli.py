"""sap-hf plan: what it prints for lengths, workloads, datasets and bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml

import sap_hf
from sap_hf.cli import main
from sap_hf.cli.picture import PIXELS, pairs_by_document
from sap_hf.planning.hardware import PRESETS
from sap_hf.planning.workloads import pack
from sap_hf.simulation.report import PARTS
from tests.dist import run_ranks

LENGTHS = ["--lengths", "5,3,8", "--cp", "4"]
# Ranks wait for rows here, so that every option changes what is planned.
ROWS = [1900, 310, 2750, 480, 1200, 95, 860, 597]
# plan() exchanges no heads where it is not asked to; sap-hf plan weighs every degree.
LONG = ["--lengths", ",".join(map(str, ROWS)), "--cp", "4", "--ulysses", "1"]


def figures_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_holds_the_figures_of_the_plan(capsys):
    figures = figures_of(capsys, *LENGTHS)
    plan = sap_hf.plan([5, 3, 8], cp_size=4)
    assert figures["digest"] == plan.digest
    assert figures["rows_moved"] == plan.rows_moved.tolist()
    assert figures["imbalance"] == plan.imbalance
    assert figures["seconds_per_rank"]["forward_exposed"] == plan.layer_seconds.forward_exposed.tolist()


def test_a_program_names_every_message_of_its_rank(capsys):
    assert main(["plan", *LENGTHS, "--layout", "contiguous", "--program", "3"]) == 0
    printed = capsys.readouterr().out
    assert "receive rows [0, 4) from rank 2" in printed
    assert "forward:  post 0, wait 0, attend 0" in printed


def test_a_workload_is_the_pack_of_its_generator(capsys):
    figures = figures_of(capsys, "--workload", "short", "--rows", "4096", "--seed", "3", "--cp", "2")
    assert figures["digest"] == sap_hf.plan(pack("short", 4096, np.random.default_rng(3)), cp_size=2).digest


def test_the_chosen_member_is_the_one_with_the_least_modelled_seconds(capsys):
    figures = figures_of(capsys, *LONG)
    (chosen,) = [member for member in figures["members"] if member["chosen"]]
    assert len(figures["members"]) > 3
    assert chosen["modelled_seconds"] == min(member["modelled_seconds"] for member in figures["members"])
    assert chosen["digest"] == figures["digest"] == sap_hf.plan(ROWS, cp_size=4).digest


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "balanced"])
@pytest.mark.parametrize("strategy", ["sap", "all_gather", "ring"])
def test_members_are_the_plans_of_their_strategy_and_layout(capsys, strategy, layout):
    plan = sap_hf.plan(ROWS, cp_size=4, strategy=strategy, layout=layout)
    asked = figures_of(capsys, *LONG, "--strategy", strategy, "--layout", layout)
    same = [member for member in asked["members"] if member["digest"] == plan.digest]
    if strategy == "sap":
        same += [m for m in figures_of(capsys, *LONG)["members"] if m["digest"] == plan.digest]
        assert len(same) >= 2
    assert same
    for member in [asked, *same]:
        assert (member["strategy"], member["layout"]) == (strategy, layout)
        assert member["modelled_seconds"] == plan.seconds
        assert member["imbalance"] == plan.imbalance
        assert member["rows_moved_total"] == plan.rows_moved.sum()
        assert member["deliveries"] == list(plan.deliveries)


OPTIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "window": (["--window", "300"], {"window": 300}),
    "delivery": (["--delivery", "all_to_all"], {"delivery": "all_to_all"}),
    "max_remote_rows": (["--max-remote-rows", "400"], {"max_remote_rows": 400}),
    "ulysses_size": (["--ulysses", "2"], {"ulysses_size": 2}),
    "heads": (["--heads", "16:2"], {"num_heads": 16, "num_kv_heads": 2}),
    "head_dim": (["--head-dim", "64"], {"head_dim": 64}),
    "hardware": (["--hardware", "pcie"], {"hardware": "pcie"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_the_argument_of_the_same_name(capsys, option):
    arguments, named = OPTIONS[option]
    plan, without = sap_hf.plan(ROWS, cp_size=4, **named), sap_hf.plan(ROWS, cp_size=4)
    figures = figures_of(capsys, *LONG, *arguments)
    found = figures["digest"], figures["modelled_seconds"]
    assert found == (plan.digest, plan.seconds) != (without.digest, without.seconds)


def test_hardware_may_be_a_file(capsys, tmp_path):
    values = dataclasses.asdict(PRESETS["a100"]) | {"name": "mine", "network_bytes_per_s": 1e9}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    figures = figures_of(capsys, *LONG, "--hardware", str(tmp_path / "mine.yaml"))
    assert figures["critical_rows"]["between_nodes"] == 45_000  # 1.8e14 flop/s / (4 * 1e9 B/s)
    assert figures["modelled_seconds"] == sap_hf.plan(ROWS, cp_size=4, hardware="a100").seconds


def test_the_text_ends_with_what_was_weighed_and_the_critical_rows(capsys):
    assert main(["plan", *LONG]) == 0
    printed = capsys.readouterr().out
    picture = str(sap_hf.plan(ROWS, cp_size=4))
    assert printed.startswith(f"{picture}\n")
    head, chosen, *others, critical = printed.removeprefix(f"{picture}\n").splitlines()
    assert head.split()[:2] == ["layout", "strategy"]
    assert chosen.startswith("*") and not any(line.startswith("*") for line in others)
    layouts = {line.split()[0] for line in (chosen.removeprefix("*"), *others)}
    assert layouts >= {"contiguous", "zigzag", "balanced"}
    assert critical.startswith("c*: ")


# Dataset tests: documents of so many tokens, in packs of at most 100.
TOKENS = [61, 1, 30, 7, 97, 44, 19, 80, 5, 23]


def documents() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"input_ids": list(range(n))} for n in TOKENS])


def write(dataset: datasets.Dataset, path: Path) -> str:
    if path.suffix == ".jsonl":
        dataset.to_json(path)
    elif path.suffix == ".parquet":
        dataset.to_parquet(path)
    else:
        dataset.save_to_disk(path)
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What `datasets` makes of files stays with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", ["folder", "file.jsonl", "file.parquet"])
@pytest.mark.parametrize("column", ["input_ids", "length", "seq_lengths"])
def test_a_dataset_gives_the_packs_of_pack(capsys, tmp_path, name, column):
    packs = sap_hf.pack(documents(), max_length=100)["seq_lengths"]
    dataset = {
        "input_ids": documents(),
        "length": datasets.Dataset.from_dict({"length": TOKENS}),
        # As another packing has left them: two documents in each pack, and their tokens beside the lengths.
        "seq_lengths": datasets.Dataset.from_list(
            [
                {"input_ids": [0] * (a + b), "seq_lengths": [a, b]}
                for a, b in zip(TOKENS[::2], TOKENS[1::2], strict=True)
            ]
        ),
    }[column]
    path = write(dataset, tmp_path / name)
    digests = [sap_hf.plan(lengths, cp_size=2).digest for lengths in packs]
    assert len(set(digests)) == len(packs) > 2
    for number, digest in enumerate(digests):
        options = ("--dataset", path, "--rows", "100", "--seed", str(number), "--cp", "2")
        assert figures_of(capsys, *options)["digest"] == digest


def test_documents_without_tokens_are_left_out(capsys, tmp_path):
    path = write(datasets.Dataset.from_dict({"length": [0, 5, 0, 3]}), tmp_path / "file.parquet")
    figures = figures_of(capsys, "--dataset", path, "--rows", "8", "--cp", "2")
    assert figures["digest"] == sap_hf.plan([5, 3], cp_size=2).digest


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    message = capsys.readouterr().err
    assert "sap-hf: " in message
    return message


def test_datasets_that_cannot_be_packed_are_refused_by_what_is_wrong(capsys, tmp_path):
    def refusal(path: str | Path, *options: str) -> str:
        return refused(capsys, "--dataset", str(path), "--cp", "2", *options)

    tokens = write(documents(), tmp_path / "tokens")
    assert "the longest of 10 documents has 97 rows. Use --rows 97." in refusal(tokens, "--rows", "96")
    assert "--seed 4: the packs of at most 100 rows are 0 to 3." in refusal(
        tokens, "--rows", "100", "--seed", "4"
    )
    for missing in ("nowhere", "nowhere.jsonl", "nowhere.parquet"):
        assert "neither a .jsonl or .parquet file nor a folder" in refusal(tmp_path / missing)
    splits = datasets.DatasetDict({"train": documents(), "test": documents()})
    splits.save_to_disk(tmp_path / "splits")
    assert "holds the splits train, test" in refusal(tmp_path / "splits")
    for name, rows, message in (
        ("text", {"text": ["a"]}, "no column seq_lengths, input_ids, length among text"),
        ("words", {"length": ["a"]}, "'length' holds string"),
        ("halves", {"length": [0.5]}, "'length' holds double"),
        ("minus", {"length": [-1, 4]}, "whole numbers from 0 on"),
        ("gap", {"length": [None, 4]}, "whole numbers from 0 on"),
        ("empty", {"length": [0, 0]}, "no document has a token"),
        ("padded", {"input_ids": [[1, 2]], "attention_mask": [[1, 0]]}, "documents are padded"),
    ):
        assert message in refusal(write(datasets.Dataset.from_dict(rows), tmp_path / name))
    (tmp_path / "broken.jsonl").write_text('{"length": \n')
    assert "broken.jsonl: not read: " in refusal(tmp_path / "broken.jsonl")
    (tmp_path / "broken.parquet").write_text("no parquet")
    assert "broken.parquet: not read: " in refusal(tmp_path / "broken.parquet")


def test_a_png_shows_each_document_as_large_as_its_work_and_what_moves(capsys, tmp_path):
    import matplotlib
    import matplotlib.image

    path, plan = tmp_path / "plan.png", sap_hf.plan(ROWS, cp_size=4)
    assert main(["plan", *LONG, "--png", str(path)]) == 0
    assert capsys.readouterr().out.startswith(str(plan))
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == PIXELS
    pixels = np.rint(matplotlib.image.imread(path)[..., :3] * 255)

    def area(colour: tuple[float, ...]) -> int:
        return int((pixels == np.rint(np.array(colour[:3]) * 255)).all(axis=-1).sum())

    areas = np.array([area(colour) for colour in matplotlib.colormaps["tab20"].colors[: len(ROWS)]])
    pairs = np.array([n * (n + 1) / 2 for n in ROWS])
    # Letters, the line of the mean and blurred edges take some pixels.
    np.testing.assert_allclose(areas / areas.sum(), pairs / pairs.sum(), atol=0.01)
    # The cell of the matrix where most rows move has the darkest blue.
    assert area(matplotlib.colormaps["Blues"](1.0)) > 5000


@pytest.mark.parametrize("lengths", [[1, 1], [100_000], [3] * 500])
def test_every_pack_can_be_drawn(tmp_path, lengths):
    path = tmp_path / "plan.png"
    named = ",".join(map(str, lengths))
    assert main(["plan", "--lengths", named, "--cp", "16", "--window", "50", "--png", str(path)]) == 0
    assert struct.unpack(">II", path.read_bytes()[16:24]) == PIXELS


def test_the_work_drawn_is_every_query_key_pair_of_every_document():
    plan = sap_hf.plan(ROWS, cp_size=4, window={None: 2, 300: 1})
    pairs = pairs_by_document(plan)
    assert (pairs.sum(axis=1) == plan.pairs).all()
    rows = [np.arange(1, n + 1) for n in ROWS]
    assert pairs.sum(axis=0).tolist() == [(2 * seen + np.minimum(seen, 300)).sum() for seen in rows]


def test_a_png_that_cannot_be_drawn_or_written_is_refused(capsys, tmp_path, monkeypatch):
    assert "Name a file in a folder" in refused(capsys, *LONG, "--png", str(tmp_path / "no" / "plan.png"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused(capsys, *LONG, "--png", str(tmp_path / "plan.png"))


def test_plans_of_lengths_need_neither_torch_nor_datasets_nor_matplotlib():
    script = """
import sys
for name in ("torch", "datasets", "pyarrow", "matplotlib"):
    sys.modules[name] = None
from sap_hf.cli import main
sys.exit(main(["plan", "--lengths", "5,3,8", "--cp", "4"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rows moved" in done.stdout


def test_bad_input_ends_with_a_message_and_code_2(capsys):
    for arguments in (
        ["--workload", "chort", "--cp", "2"],
        ["--lengths", "5,0", "--cp", "2"],
        [*LENGTHS, "--layout", "zigzak"],
        [*LENGTHS, "--program", "4"],
        [*LENGTHS, "--delivery", "p3p"],
        [*LENGTHS, "--max-remote-rows", "1"],
        [*LENGTHS, "--heads", "8:3"],
        [*LENGTHS, "--head-dim", "0"],
        [*LENGTHS, "--hardware", "h1000"],
    ):
        assert refused(capsys, *arguments).startswith("sap-hf: ")


def test_heads_that_are_not_two_numbers_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *LENGTHS, "--heads", "32"])
    assert "'32' is not QUERY:KV, as in 32:8" in capsys.readouterr().err


def test_simulate_prints_placements_and_writes_the_committed_predictions(capsys, tmp_path):
    written = tmp_path / "predicted.json"
    assert main(["simulate", "--placement", "--predict", str(written)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 5 * 5
    assert lines[-1].split() == ["one", "64", "524288", "1.000", "1.000", "75.00%", "1.98", "50.00%"]
    committed = Path(__file__).parent.parent / "benchmarks" / "predictions" / "h100x8.json"
    assert json.loads(written.read_text()) == json.loads(committed.read_text())


def test_simulate_reports_on_the_ranks_packs_and_workload_that_are_asked_for(capsys):
    asked = ["--packs", "1", "--ranks", "8", "--rows-per-rank", "512", "--workload", "short"]
    assert main(["simulate", "--report", *asked]) == 0
    printed = capsys.readouterr().out
    headings = [line.removeprefix("== ") for line in printed.splitlines() if line.startswith("== ")]
    assert headings == list(PARTS.values())
    assert printed.count("8 ranks: time of each policy over ours") == printed.count(" ranks: time of") == 1
    assert printed.count("8 ranks, 512 rows on each: seconds") == printed.count(" rows on each: seconds") == 1
    assert main(["simulate", "--step", *asked]) == 0
    alone = capsys.readouterr().out
    assert alone.startswith("8 ranks, 512 rows") and alone in printed
    assert main(["simulate", *asked]) == 0
    assert capsys.readouterr().out in printed


def test_a_step_is_that_of_eight_ranks_where_none_are_named(capsys):
    assert main(["simulate", "--step", "--packs", "1", "--workload", "short"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("8 ranks, 8192 rows on each") and printed.count("rows on each:") == 1


@pytest.mark.parametrize(
    "option, value",
    [("--ranks", text) for text in ("1", "8,x", "8,,16", "", "8;16", "-8", "8.5")]
    + [("--packs", "0"), ("--rows-per-rank", "0"), ("--workload", "chort"), ("--hardware", "h1000")],
)
def test_simulate_refuses_what_it_cannot_simulate_before_it_prints(capsys, option, value):
    assert main(["simulate", "--report", f"{option}={value}"]) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.startswith("sap-hf: ") and value in found.err


def bench_step(rank: int, world: int, arguments: list[str]) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["bench", "step", *arguments])
    return code, out.getvalue()


def test_bench_step_prints_what_each_strategy_moved_and_took():
    rows, width, layers = 2048, 64, 3
    model = ["--heads", "1:1", "--head-dim", str(width), "--layers", str(layers)]
    size = ["--rows", str(rows), "--steps", "2", "--workload", "short"]
    names = "sap,ulysses,all_gather"
    (code, printed), other = run_ranks(
        bench_step, 2, [*model, *size, "--strategies", names], init=False, env={"LOCAL_WORLD_SIZE": "1"}
    )
    assert (code, other) == (0, (0, ""))
    first, head, sap, ulysses, gathered, last = printed.splitlines()
    assert re.fullmatch(r"planned for cpu: C/c\* = 1,024/[\d,]+ = [\d.]+", last)
    assert (
        first.startswith("2 ranks") and "3 layers with 1:1 heads of 64, packs of 2,048 rows (short)" in first
    )
    assert "at most 1 ranks" in ulysses
    columns = re.split(r"  +", head)
    found = {
        line.split()[0]: dict(zip(columns, re.split(r"  +", line), strict=True)) for line in (sap, gathered)
    }
    # Every row of K and V, once there, once again, once home, in float32, to the one other rank on the other node.
    megabytes = rows * 2 * width * 4 * 3 * layers / 1e6
    assert found["all_gather"]["MB between"] == f"{megabytes:.2f}"
    assert 0 <= float(found["sap"]["MB between"]) < megabytes
    for row in found.values():
        assert row["MB in node"] == "0.00"
        milliseconds, tokens = float(row["step ms"]), float(row["tokens/s"].replace(",", ""))
        assert 0 <= float(row["wait ms"]) < milliseconds
        assert tokens * milliseconds / 1e3 == pytest.approx(rows, rel=0.01)
        assert float(row["imbalance"]) >= 1 and float(row["plan ms"]) > 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "bench --calibrate FILE.yaml, or sap-hf bench step"),
        (["step"], "torchrun --nproc-per-node N -m sap_hf.cli bench step"),
        (["step", "--strategies", "sap,rng"], "Did you mean 'ring'?"),
        (["step", "--workload", "chort"], "Did you mean 'short'?"),
        (["step", "--heads", "3:2"], "multiple"),
        (["step", "--steps", "0"], "at least 1"),
    ],
)
def test_a_bench_that_cannot_be_is_refused(arguments, reason, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["bench", *arguments]) == 2
    assert reason in capsys.readouterr().err
