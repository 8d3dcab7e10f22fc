"""Megatron: the dynamic context parallelism that Megatron-Core publishes an example of, and our plans beside it.

GPUs -> step times: published, reproduced, and with plans of ours. The example is examples/dynamic_context_parallel of
github.com/NVIDIA/Megatron-LM (commit 192cbc3554, branch dev): 12 layers 2048 wide, 16 heads, context parallelism over
4 GPUs, 2048 rows per GPU, 8 documents per data-parallel rank and step. Static: packs in the order of the documents, all
of them shared by 4 GPUs. Dynamic: a document gets the fewest GPUs, a power of two, that hold it. Its table is measured,
once per row, on GPUs that it does not name. There is no cost formula, but documents and schedules can be computed.

At this size the host decides: 2,000 rows a GPU are some 20 ms of matrix products, a step takes 150 to 290 ms. So the
model is three constants, fitted to the ten published times: what a step costs, a document that a rank holds (before the
exchange of samples, for which all wait), and an attention call of a ring. What a GPU computes and what moves is not in
it: it says little of other sizes, and which work of the host the constants stand for, the times do not tell.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from sap_hf.planning.cost import Float64
from sap_hf.planning.documents import Int64
from sap_hf.planning.hardware import PRESETS
from sap_hf.planning.layout import cut
from sap_hf.planning.schedule import DESTINATION, SOURCE
from sap_hf.strategies.auto import plan

# GPUs -> 10 % trimmed mean of the step's milliseconds, static and dynamic: the README's table.
PUBLISHED = {
    4: (195.269, 151.906),
    8: (220.119, 155.850),
    16: (226.775, 187.125),
    32: (286.206, 208.088),
    64: (271.988, 181.912),
}
# The defaults of benchmark_dcp.sh; the first 10 of 30 steps are not counted.
CP, ROWS, DOCUMENTS, STEPS, WARMUP, HEADS, HEAD_DIM, GPUS_PER_NODE = 4, 2048, 8, 30, 10, 16, 128, 4
# Of the longest and of the shortest steps, each, that are not counted.
TRIMMED = 0.1
# A microbatch is complete once its ranks differ by less than this part of the busiest one's work.
BALANCED = 0.05


def lengths(gpus: int, step: int, multiple: int) -> Int64:
    """(8 gpus / 4,) rows of the documents of one step, data-parallel rank after rank, padded to `multiple`.

    MockSFTLowLevelDataset draws them, with numpy's first generator and seed 0; one token goes with the labels' shift.
    """
    ranks = gpus // CP
    count = DOCUMENTS * ranks
    draws = np.random.RandomState(0).lognormal(np.log(1024) - 1.5**2 / 2, 1.5, (step + 1) * count)
    drawn = np.clip(draws[step * count :], 128, 8192).astype(np.int64)
    padded: Int64 = -(-(drawn - 1) // multiple) * multiple
    # The sampler deals them out in turn.
    return padded.reshape(DOCUMENTS, ranks).T.reshape(-1)


def packs(rows: Int64, limit: int) -> list[list[int]]:
    """Documents by index in packs of at most `limit` rows, in their order."""
    made: list[list[int]] = [[]]
    full = 0
    for document, length in enumerate(rows.tolist()):
        if made[-1] and full + length > limit:
            made.append([])
            full = 0
        made[-1].append(document)
        full += length
    return made


# What each group of ranks gets in a microbatch: (ranks, documents by index), groups side by side.
Microbatch = list[tuple[int, list[int]]]


def static(rows: Int64, gpus: int) -> list[Microbatch]:
    """As DpBalancedScheduler: packs of 4 x 2048 rows, as many as the data-parallel ranks have microbatches."""
    ranks, made = gpus // CP, packs(rows, ROWS * CP)
    at = len(made) - 1
    while len(made) % ranks:
        if len(made[at]) > 1:
            made.append([made[at].pop()])
        else:
            at -= 1
    return [[(CP, documents) for documents in made[i : i + ranks]] for i in range(0, len(made), ranks)]


def dynamic(rows: Int64, gpus: int) -> list[Microbatch]:
    """As DefaultDynamicCPScheduler: from the longest document on, microbatch after microbatch."""
    left = np.argsort(-rows, kind="stable").tolist()
    made = []
    while left:
        microbatch, left = _microbatch(rows, left, gpus)
        made.append(microbatch)
    return made


def _ranks(length: int) -> int:
    """Fewest ranks, a power of two, that hold a document."""
    return 1 << max(0, int(-(-length // ROWS) - 1).bit_length())


def _microbatch(rows: Int64, left: list[int], gpus: int) -> tuple[Microbatch, list[int]]:
    """One microbatch for all ranks of the longest documents of `left`, and the documents that remain.

    A new group as long as ranks are free, then the least loaded group of the right size. It ends when the ranks are
    balanced, once a smaller group than the first is there, or when the next document finds no place. The scheduler
    deals documents into buckets of equal work before, and takes the first bucket whose next document finds a place:
    that is always the longest document left, since groups are powers of two and free ranks a multiple of the last.
    """
    groups: Microbatch = []
    load: list[float] = []
    free = gpus
    for position, document in enumerate(left):
        length = int(rows[document])
        need = _ranks(length)
        if need <= free:
            groups.append((need, []))
            load.append(0.0)
            free -= need
            chosen = len(groups) - 1
        else:
            room = [
                i
                for i, (size, held) in enumerate(groups)
                if size == need and int(rows[held].sum()) + length <= ROWS * need
            ]
            if not room:
                return _filled(groups, gpus), left[position:]
            chosen = min(room, key=lambda i: load[i])
        groups[chosen][1].append(document)
        load[chosen] += length**2 / need
        least = 0.0 if free else min(load)
        if need < groups[0][0] and max(load) - least <= BALANCED * max(load):
            return _filled(groups, gpus), left[position + 1 :]
    return _filled(groups, gpus), []


def _filled(groups: Microbatch, gpus: int) -> Microbatch:
    """No rank may stand idle: the first of the smallest groups doubles until none does."""
    sizes = [size for size, _ in groups]
    while sum(sizes) < gpus:
        at = sizes.index(min(sizes))
        sizes[at] = min(2 * sizes[at], gpus)
    return [(size, held) for size, (_, held) in zip(sizes, groups)]


def counts(microbatches: list[Microbatch]) -> Int64:
    """(W, 2): documents that each rank holds and attention calls of its rings, over all microbatches."""
    parts = [
        [[len(held), size if size > 1 else 0] for size, held in groups for _ in range(size)]
        for groups in microbatches
    ]
    total: Int64 = np.array(parts, np.int64).sum(axis=0)
    return total


def ours(rows: Int64, gpus: int) -> Int64:
    """As `counts`, for packs that all ranks share by a plan: a call for own rows and one for each stage of others'."""
    hardware = dataclasses.replace(PRESETS["h100"], ranks_per_node=GPUS_PER_NODE)
    total = np.zeros((gpus, 2), np.int64)
    for documents in packs(rows, ROWS * gpus):
        made = plan(
            rows[documents],
            cp_size=gpus,
            num_heads=HEADS,
            num_kv_heads=HEADS,
            head_dim=HEAD_DIM,
            hardware=hardware,
        )
        pieces = cut(made.documents, made.placement)
        held = np.unique(np.stack([pieces.rank, pieces.document]), axis=1)[0]
        total[:, 0] += np.bincount(held, minlength=gpus)
        calls = np.zeros(gpus, np.int64)
        for step in made.widest.steps:
            calls[np.unique(step.transfers[:, [SOURCE, DESTINATION]])] += 1
        total[:, 1] += np.where(calls, calls + 1, 0)
    return total


def _static(gpus: int, step: int) -> Int64:
    return counts(static(lengths(gpus, step, 2 * CP), gpus))


def _dynamic(gpus: int, step: int) -> Int64:
    return counts(dynamic(lengths(gpus, step, 2 * gpus), gpus))


def _ours(gpus: int, step: int) -> Int64:
    return ours(lengths(gpus, step, 1), gpus)


SCHEMES: dict[str, Callable[[int, int], Int64]] = {"static": _static, "dynamic": _dynamic, "ours": _ours}


@functools.cache
def _steps(scheme: str, gpus: int) -> Float64:
    """(20, 3): of every counted step 1, documents of the fullest rank, and calls of the rank with most."""
    found = [SCHEMES[scheme](gpus, step).max(axis=0) for step in range(WARMUP, STEPS)]
    return np.array([[1, *most] for most in found], np.float64)


def _mean(scheme: str, gpus: int, constants: Float64) -> Float64:
    """(3,): mean of `_steps`, the longest and the shortest steps left out."""
    found = _steps(scheme, gpus)
    trim = int(len(found) * TRIMMED)
    mean: Float64 = found[np.argsort(found @ constants, kind="stable")[trim : len(found) - trim]].mean(axis=0)
    return mean


def milliseconds(scheme: str, gpus: int, constants: Float64) -> float:
    """Trimmed mean of the steps of `scheme`, one of SCHEMES.

    Args:
        constants: (3,) milliseconds of a step, of a document on a rank, of an attention call of a ring, all layers.
    """
    return float(_mean(scheme, gpus, constants) @ constants)


def fit(gpus: Sequence[int] = tuple(PUBLISHED)) -> Float64:
    """(3,) constants with the least squared relative error of the published times of these runs."""
    constants = np.ones(3)
    times = np.array([PUBLISHED[count] for count in gpus]).reshape(-1)
    # Which steps are the longest depends on the constants; it settles after a few turns.
    for _ in range(20):
        rows = np.array(
            [_mean(scheme, count, constants) for count in gpus for scheme in ("static", "dynamic")]
        )
        constants = np.linalg.lstsq(rows / times[:, None], np.ones(len(times)), rcond=None)[0]
    return constants


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the published table: milliseconds, and how many times faster than static.

    Attributes:
        reproduced, milliseconds: with the constants fitted to all rows: the dynamic ratio; static, dynamic, ours.
        held_out: the dynamic ratio with constants fitted to the other rows alone.
        ours: the ratio of plans of ours.
    """

    gpus: int
    published: float
    reproduced: float
    held_out: float
    ours: float
    milliseconds: tuple[float, float, float]


def reproduce() -> list[Row]:
    """The published table, reproduced."""
    constants, table = fit(), []
    for gpus, (before, after) in PUBLISHED.items():
        others = fit([count for count in PUBLISHED if count != gpus])
        slow, fast, own = (milliseconds(scheme, gpus, constants) for scheme in SCHEMES)
        held = milliseconds("static", gpus, others) / milliseconds("dynamic", gpus, others)
        table.append(Row(gpus, before / after, slow / fast, held, slow / own, (slow, fast, own)))
    return table


def report() -> str:
    """The table as text, errors beside the ratios."""
    step, document, call = fit()
    lines = [
        f"A step {step:.1f} ms, a document on a rank {document:.2f} ms, an attention call of a ring {call:.2f} ms",
        "GPUs  published  reproduced         from the other rows     ours   ms static/dynamic/ours (published)",
    ]
    for row in reproduce():
        error, held = row.reproduced / row.published - 1, row.held_out / row.published - 1
        before, after = PUBLISHED[row.gpus]
        lines.append(
            f"{row.gpus:4}  {row.published:9.3f}  {row.reproduced:10.3f} {error:+7.1%}"
            f"  {row.held_out:10.3f} {held:+7.1%}  {row.ours:10.3f}"
            f"   {'/'.join(f'{ms:.0f}' for ms in row.milliseconds)} ({before:.0f}/{after:.0f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
