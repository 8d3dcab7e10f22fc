"""sap-hf plan: show how ranks share a pack of documents, and what else was weighed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sap_hf.cli.picture import draw
from sap_hf.config import DELIVERIES, LAYOUTS, STRATEGIES
from sap_hf.errors import ConfigError, DataError
from sap_hf.planning import compile_program
from sap_hf.planning.cost import Shape
from sap_hf.planning.documents import Documents, Int64
from sap_hf.planning.hardware import PRESETS, find_hardware
from sap_hf.planning.render import as_json, table
from sap_hf.planning.workloads import WORKLOADS
from sap_hf.planning.workloads import pack as workload
from sap_hf.strategies.auto import Request, candidates

if TYPE_CHECKING:
    import pyarrow as pa

# Where a dataset says how long its documents are. First the one of packs: their input_ids are many documents.
LENGTH_COLUMNS = ("seq_lengths", "input_ids", "length")


def add(commands: Any) -> None:
    """Add this command and its options to the parser's."""
    show = commands.add_parser("plan", help="show how ranks share a pack of documents")
    pack = show.add_mutually_exclusive_group(required=True)
    pack.add_argument("--lengths", type=_numbers, metavar="5,3,8", help="rows of each document")
    pack.add_argument("--workload", metavar="NAME", help=" | ".join(WORKLOADS))
    pack.add_argument(
        "--dataset",
        metavar="PATH",
        help="tokenised documents to pack into --rows: a folder of save_to_disk, .jsonl or .parquet, with a column "
        "seq_lengths, input_ids or length",
    )
    show.add_argument("--rows", type=int, default=131_072, help="most rows of a pack (default 131072)")
    show.add_argument("--seed", type=int, default=0, help="which pack of the workload or the dataset")
    show.add_argument("--cp", type=int, required=True, metavar="W", help="ranks that share the pack")
    show.add_argument("--strategy", default="auto", help=" | ".join(STRATEGIES))
    show.add_argument("--layout", default="auto", help=" | ".join(LAYOUTS))
    show.add_argument("--delivery", default="auto", help=" | ".join(DELIVERIES))
    show.add_argument(
        "--max-remote-rows", type=int, metavar="N", help="rows of others that a rank holds at once"
    )
    show.add_argument("--window", type=int, help="keys a query sees, itself included")
    show.add_argument(
        "--heads", type=heads_option, default=(32, 8), metavar="H:K", help="query and kv heads (default 32:8)"
    )
    show.add_argument("--head-dim", type=int, default=128, help="their width (default 128)")
    show.add_argument(
        "--hardware", help=f"for the modelled seconds: {' | '.join(PRESETS)} | YAML file (default h100)"
    )
    show.add_argument("--json", action="store_true", help="the figures as JSON")
    show.add_argument(
        "--ulysses",
        type=_degree,
        default="auto",
        metavar="U",
        help="neighbouring ranks that exchange heads (default auto: the fastest degree)",
    )
    show.add_argument("--png", metavar="FILE", help="draw work by document, and who sends to whom")
    show.add_argument(
        "--program", type=int, metavar="RANK", help="what that rank posts, waits for and computes"
    )
    show.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    request = Request(
        Documents.from_lengths(_lengths(options)),
        options.cp,
        strategy=options.strategy,
        layout=options.layout,
        windows={options.window: 1},
        delivery=options.delivery,
        shape=Shape(*options.heads, options.head_dim),
        hardware=find_hardware(options.hardware),
        max_remote_rows=options.max_remote_rows,
        ulysses_size=options.ulysses,
    )
    members = list(candidates(request))
    made = min(members, key=lambda member: member.seconds)
    if options.png is not None:
        draw(made, options.png)
    if options.program is not None:
        if not 0 <= options.program < options.cp:
            raise ConfigError(f"--program {options.program}: ranks are 0 to {options.cp - 1}.")
        print(compile_program(made, options.program, options.window))
    elif options.json:
        print(as_json(made, members))
    else:
        print(made, table(made, members), sep="\n")


def _lengths(options: argparse.Namespace) -> list[int] | Int64:
    """Rows of each document of the pack that was asked for."""
    if options.lengths is not None:
        given: list[int] = options.lengths
        return given
    if options.workload is not None:
        return workload(options.workload, options.rows, np.random.default_rng(options.seed))
    return _pack_of_dataset(options.dataset, options.rows, options.seed)


def _pack_of_dataset(path: str, rows: int, number: int) -> Int64:
    """Lengths of one pack, as `sap_hf.pack` groups the documents of the dataset."""
    from sap_hf.data.packing import best_fit_decreasing

    lengths = _document_lengths(path)
    lengths = lengths[lengths > 0]
    if not len(lengths):
        raise DataError(f"--dataset {path}: no document has a token.")
    longest = lengths.max()
    if longest > rows:
        raise DataError(
            f"--rows {rows}: the longest of {len(lengths)} documents has {longest} rows. Use --rows {longest}."
        )
    pack_of = best_fit_decreasing(lengths, rows)
    if not 0 <= number <= pack_of.max():
        raise DataError(f"--seed {number}: the packs of at most {rows} rows are 0 to {pack_of.max()}.")
    return lengths[pack_of == number]


def _document_lengths(path: str) -> Int64:
    """Rows of every document of a dataset on disk."""
    import pyarrow as pa
    from datasets import Dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    from sap_hf.data.packing import document_lengths, read_columns

    readers = {".jsonl": Dataset.from_json, ".parquet": Dataset.from_parquet}
    try:
        dataset = readers.get(Path(path).suffix, load_from_disk)(path)
    except FileNotFoundError as error:
        raise DataError(
            f"--dataset {path}: neither a .jsonl or .parquet file nor a folder of save_to_disk."
        ) from error
    except (DatasetGenerationError, pa.ArrowInvalid) as error:
        raise DataError(f"--dataset {path}: not read: {error.__cause__ or error}") from error
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"--dataset {path}: holds the splits {', '.join(dataset)}. Name the folder of one of them."
        )
    found = [name for name in LENGTH_COLUMNS if name in dataset.column_names]
    if not found:
        raise DataError(
            f"--dataset {path}: no column {', '.join(LENGTH_COLUMNS)} among {', '.join(dataset.column_names)}: "
            "tokenise it first."
        )
    if found[0] == "input_ids":
        return document_lengths(read_columns(dataset, "input_ids"), "input_ids")
    return _whole_numbers(path, found[0], dataset.with_format("arrow")[:][found[0]])


def _whole_numbers(path: str, name: str, column: pa.ChunkedArray) -> Int64:
    """The values of a column of lengths, or of lists of lengths, one after the other."""
    import pyarrow.compute as pc
    from pyarrow import types

    while types.is_list(column.type) or types.is_large_list(column.type):
        column = pc.list_flatten(column)
    if not types.is_integer(column.type) or column.null_count or (pc.min(column).as_py() or 0) < 0:
        raise DataError(
            f"--dataset {path}: {name!r} holds {column.type}, whole numbers from 0 on are needed."
        )
    return np.asarray(column, np.int64)


def _degree(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.replace(" ", "").split(",") if part]


def heads_option(text: str) -> tuple[int, int]:
    query, _, kv = text.partition(":")
    if not query.isdecimal() or not kv.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not QUERY:KV, as in 32:8")
    return int(query), int(kv)
