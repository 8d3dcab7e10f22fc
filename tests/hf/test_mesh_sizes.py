"""The sizes of a mesh: what is left open is filled in, and what does not fit is refused with sizes that do."""

from __future__ import annotations

import re
from typing import Any

import pytest

import sap_hf
from sap_hf.errors import LayoutError

# Sizes asked for, processes, under FSDP, what the message must show.
MISFITS: list[tuple[dict[str, Any], int, bool, str]] = [
    ({"cp_size": 8}, 12, False, "cp_size=8 does not divide the 12 processes"),
    ({"cp_size": 8}, 4, False, "cp_size=8 does not divide the 4 processes"),
    ({"cp_size": 2}, 1, False, "cp_size=2 does not divide the 1 process of"),
    ({"cp_size": 5}, 8, True, "cp_size=5 does not divide the 8 processes"),
    ({"cp_size": 8, "ulysses_size": 8}, 12, False, "cp_size=8 does not divide the 12 processes"),
    ({"dp_replicate_size": 3}, 8, False, "dp_replicate_size=3 does not divide the 8 processes"),
    ({"dp_shard_size": 16}, 8, True, "dp_shard_size=16 does not divide the 8 processes"),
    (
        {"dp_shard_size": 3, "dp_replicate_size": 2, "ulysses_size": 4},
        8,
        True,
        "dp_shard_size=3 x dp_replicate_size=2 = 6 ranks do not divide the 8 processes",
    ),
    (
        {"cp_size": 4, "dp_shard_size": 3},
        8,
        False,
        "cp_size=4 x dp_shard_size=3 = 12 ranks do not divide the 8 processes",
    ),
    (
        {"cp_size": 4, "dp_replicate_size": 3},
        16,
        False,
        "cp_size=4 x dp_replicate_size=3 = 12 ranks do not divide the 16 processes",
    ),
    (
        {"cp_size": 2, "dp_replicate_size": 2},
        8,
        False,
        "cp_size=2 x dp_replicate_size=2 = 4 ranks are too few for the 8 processes",
    ),
    (
        {"cp_size": 2, "dp_shard_size": 2},
        8,
        True,
        "cp_size=2 x dp_shard_size=2 = 4 ranks are too few for the 8 processes",
    ),
    (
        {"cp_size": 2, "dp_shard_size": 2, "dp_replicate_size": 1},
        6,
        True,
        "cp_size=2 x dp_shard_size=2 x dp_replicate_size=1 = 4 ranks do not divide the 6 processes",
    ),
]
DEGREES = [(4, 3, 8), (4, 8, 8), (None, 4, 6), (6, 4, 12)]


@pytest.mark.parametrize("fsdp", [False, True])
def test_sizes_left_open_are_what_is_left_over(fsdp: bool) -> None:
    left = "dp_shard_size" if fsdp else "dp_replicate_size"
    for asked, processes, name, size in (
        ({}, 6, "cp_size", 6),
        ({left: 2}, 6, "cp_size", 3),
        ({"cp_size": 2}, 6, left, 3),
        ({"cp_size": 2, left: 3}, 6, left, 3),
    ):
        plugin = sap_hf.SapPlugin(**asked)
        plugin.resolve(processes, fsdp)
        assert getattr(plugin, name) == size
        assert plugin.total_size == processes


@pytest.mark.parametrize(
    ("asked", "processes", "fsdp", "shown"), MISFITS, ids=[f"{m[3][:40]}-{m[1]}" for m in MISFITS]
)
def test_a_misfit_shows_the_arithmetic_and_every_size_it_names_works(
    asked: dict[str, Any], processes: int, fsdp: bool, shown: str
) -> None:
    with pytest.raises(LayoutError) as caught:
        sap_hf.SapPlugin(**asked).resolve(processes, fsdp)
    message = str(caught.value)
    assert message.startswith(shown)
    # "Use cp_size=4, ulysses_size=4 (x 3 data-parallel groups) or start 16 processes."
    advice, start = re.fullmatch(
        r"  Use (.*) or start (\d+) process(?:es)?\.", message.split("\n")[1]
    ).groups()  # type: ignore[union-attr]
    sizes = {name: int(size) for name, size in re.findall(r"(\w+_size)=(\d+)", advice)}
    kept = {name: size for name, size in asked.items() if name == "ulysses_size"}
    fitting = sap_hf.SapPlugin(**{**kept, **sizes})
    fitting.resolve(processes, fsdp)
    assert fitting.data_parallel_size == int(re.search(r"x (\d+) data-parallel", advice)[1])  # type: ignore[index]
    assert fitting.total_size == processes
    started = sap_hf.SapPlugin(**asked)
    started.resolve(int(start), fsdp)
    assert started.total_size == int(start) != processes


@pytest.mark.parametrize(("cp_size", "ulysses_size", "processes"), DEGREES)
def test_a_degree_that_does_not_divide_cp_names_all_that_do(
    cp_size: int | None, ulysses_size: int, processes: int
) -> None:
    with pytest.raises(LayoutError, match=f"ulysses_size={ulysses_size} does not divide cp_size=") as caught:
        sap_hf.SapPlugin(cp_size, ulysses_size).resolve(processes, False)
    fits = [int(n) for n in re.findall(r"\d+", str(caught.value).split("Use one of")[1])]
    shared = cp_size or processes
    assert fits == [n for n in range(1, shared + 1) if shared % n == 0]
    for size in fits:
        sap_hf.SapPlugin(cp_size, size).resolve(processes, False)


@pytest.mark.parametrize("name", ["cp_size", "dp_shard_size", "dp_replicate_size"])
def test_a_size_below_one_is_refused(name: str) -> None:
    with pytest.raises(LayoutError, match=f"{name}=0"):
        sap_hf.SapPlugin(**{name: 0})
