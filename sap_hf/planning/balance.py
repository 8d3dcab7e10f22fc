"""Balanced: documents placed so that every rank has the same rows and almost the same work, and little moves.

Documents, ranks -> Layout. A portfolio of starts: whole documents where possible, long ones cut over the fewest ranks
that rows and work require. `balance_search` makes each of them even in work and exact in rows.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

import numpy as np

from sap_hf.planning.balance_search import improve
from sap_hf.planning.balance_swap import SHARE, Problem
from sap_hf.planning.documents import Documents, Int64
from sap_hf.planning.layout import Layout, joined
from sap_hf.planning.schedule import columns, sum_by

# A balanced layout's busiest rank has at most this much of the mean work, in thousandths.
LIMIT = 1050
# With at most this many documents per rank starts differ. With at most this many documents times ranks besides, there
# is time to improve several, the one that should move least first. Elsewhere the first start does.
FEW_PER_RANK = 8
FEW = 4096
# Documents with less than this part of a rank's work are placed by a heap, all of them at once.
SMALL = SHARE * 5 // 8

# runs (n, 3) document, start, stop; the item that each belongs to (n,); the rank of each item (m,).
Start = tuple[Int64, Int64, Int64]
# (work, rows) negative and in SHARE, document or item, stop: the order of a heap of documents.
Waiting = tuple[int, int, int, int]


def balanced(documents: Documents, p: Problem) -> Layout:
    """The least rows moved subject to an imbalance of at most 1.05; the least imbalance where none reaches that."""
    small = _is_small(p)
    starts = {name: make(p) for name, make in MEMBERS.items()} if small else {}
    names = sorted(starts, key=lambda name: expected_rows(p, starts[name])) or list(MEMBERS)
    tries = len(ALWAYS) if small else 1
    best: tuple[tuple[int, int], Int64, str] | None = None
    for number, name in enumerate(names):
        if best is not None and best[0][0] == 0 and number >= tries:
            break
        start = starts[name] if small else MEMBERS[name](p)
        # Improving a start makes it even; it seldom makes it move less.
        if best is not None and best[0][0] == 0 and rows_moved(p, start) >= best[0][1]:
            continue
        runs = improve(p, *start, LIMIT)
        uneven = _above_limit(p, runs)
        if best is None and uneven == 0 and tries == 1:
            return lay_out(documents, p, runs, name)
        score = uneven, rows_moved(p, (runs[:, 1:], np.arange(len(runs)), runs[:, 0]))
        if best is None or score < best[0]:
            best = (score, runs, name)
    assert best is not None
    return lay_out(documents, p, *best[1:])


def portfolio(documents: Documents, p: Problem) -> list[Layout]:
    """What "auto" weighs beside the layouts of neighbours: `balanced`, and some that move less, or move otherwise.

    In small packs these are less even: where links are slow, what makes work even can cost more than waiting. In others
    each takes as long again, and one is weighed where documents are few: ZIGZAG shares long ones so that no link is
    much busier than the others.
    """
    more = LESS_EVEN if _is_small(p) else [(ZIGZAG, LIMIT)] if _has_few(p) else []
    others = [
        lay_out(documents, p, improve(p, *MEMBERS[name](p), most), start_of(name, most))
        for name, most in more
    ]
    return [balanced(documents, p), *others]


def start_of(name: str, limit: int) -> str:
    """What a layout calls the member that it was improved from, up to this limit."""
    return name if limit == LIMIT else f"{name} to {limit}"


def _has_few(p: Problem) -> bool:
    return len(p.lengths) <= FEW_PER_RANK * p.cp_size


def _is_small(p: Problem) -> bool:
    return _has_few(p) and len(p.lengths) * p.cp_size <= FEW


def _above_limit(p: Problem, runs: Int64) -> int:
    """Work of the busiest rank above the limit, in thousandths of the mean."""
    work = sum_by(runs[:, 0], p.upto(runs[:, 3]) - p.upto(runs[:, 2]), p.cp_size)
    return max(int(work.max()) * 1000 * p.cp_size - int(p.work.sum()) * LIMIT, 0)


def document_aware(p: Problem, limit: int = LIMIT - 20, kept: int = 4) -> Start:
    """Largest first. A document that fits no rank gives its tail to the rank with most budget; its head waits its turn.

    A reader of a tail needs all rows before it, so that few and short heads are cheap.

    Args:
        limit: work that no rank should exceed, in thousandths of the mean.
        kept: of the work that filling a rank's rows will probably take, the quarters that tails leave free.
    """
    u, v = p.scaled
    large = int((u > SMALL).sum())
    most, nearly, filled = SHARE * limit // 1000, SHARE - SHARE // 50, SHARE + SHARE // 50
    spare = _spare(p) * kept // 4
    ranks, load, full = range(p.cp_size), [0] * p.cp_size, [0] * p.cp_size
    # What a tail may take from a rank whose rows are not nearly all taken.
    budget = [most - spare] * p.cp_size
    runs: list[tuple[int, int, int]] = []
    rank: list[int] = []
    some = p.by_work[:large]
    large_ones = (-u[some], v[some], some, p.lengths[some])
    waiting: list[Waiting] = list(zip(*(column.tolist() for column in large_ones)))
    heapq.heapify(waiting)
    while waiting and -waiting[0][0] > SMALL:
        minus_work, rows, document, stop = heapq.heappop(waiting)
        work, start, to = -minus_work, 0, -1
        if min(load) <= most - work:
            fits = [r for r in ranks if load[r] <= most - work and full[r] <= filled - rows]
            to = min(fits, key=lambda r: work * load[r] + rows * full[r], default=-1)
        if to < 0:
            amount = min(max(budget), work)
            if amount < SHARE // 20:
                score = [
                    work * load[r] + rows * full[r] + 16 * SHARE * max(full[r] + rows - SHARE, 0)
                    for r in ranks
                ]
                to = score.index(min(score))
            else:
                to = budget.index(max(budget))
                room = p.rows_per_rank * (SHARE - full[to]) // SHARE
                start = p.rows_with((work - amount) * p.share // SHARE) if amount < work else 0
                start = min(max(start, stop - room), stop - 1)
                rest = p.upto_one(start) * SHARE // p.share
                if start:
                    heapq.heappush(waiting, (-rest, start * SHARE // p.rows_per_rank, document, start))
                work, rows = work - rest, (stop - start) * SHARE // p.rows_per_rank
        runs.append((document, start, stop))
        rank.append(to)
        load[to] += work
        full[to] += rows
        budget[to] = most - load[to] - spare * (SHARE - full[to]) // SHARE if full[to] < nearly else -SHARE
    # Heads are left over beside the small documents.
    small = p.by_work[large:]
    heads = np.array(waiting, np.int64).reshape(-1, 4)
    left = np.concatenate([columns(-u[small], v[small], small, p.lengths[small]), heads])
    minus_work, rows_of, document_of, stop_of = left[np.lexsort(left.T[2::-1])].T
    poured = columns(document_of, np.zeros(len(left), np.int64), stop_of)
    rank += _pour(-minus_work, rows_of, load, full)
    placed = np.concatenate([np.array(runs, np.int64).reshape(-1, 3), poured])
    return placed, np.arange(len(placed)), np.array(rank, np.int64)


def _pour(work: Int64, rows: Int64, load: list[int], full: list[int]) -> list[int]:
    """Small documents in their order, each to the rank with the least of what such documents weigh in.

    Args:
        work, rows: of each document. load, full: of each rank; added to.

    Returns:
        The ranks.
    """
    if not len(work):
        return []
    ranks, block = len(load), 2 * len(load)
    first = np.arange(0, len(work), block)
    work_weight, row_weight = (np.maximum(np.add.reduceat(of, first) >> 10, 1) for of in (work, rows))
    # The rank is the last digit of a key, so that the first of equal ones is taken.
    of_block = np.arange(len(work)) // block
    amounts = (work_weight[of_block] * work + row_weight[of_block] * rows) * ranks
    documents = list(zip(amounts.tolist(), work.tolist(), rows.tolist()))
    taken: list[int] = []
    for at, w, r in zip(first.tolist(), work_weight.tolist(), row_weight.tolist()):
        heap = [(w * load[to] + r * full[to]) * ranks + to for to in range(ranks)]
        heapq.heapify(heap)
        for amount, its_work, its_rows in documents[at : at + block]:
            to = heap[0] % ranks
            heapq.heapreplace(heap, heap[0] + amount)
            taken.append(to)
            load[to] += its_work
            full[to] += its_rows
    return taken


def _spare(p: Problem) -> int:
    """Work to keep free on a rank for filling all of its rows, in SHARE: what the shortest documents weigh."""
    u, _ = p.scaled
    long = u > SHARE * 6 // 10
    need = int((np.maximum(u[long], SHARE) * p.rows_per_rank // SHARE).sum() - p.lengths[long].sum())
    rest = p.by_work[int(long.sum()) :][::-1]
    if need <= 0 or not len(rest):
        return 0
    taken = rest[: int(np.searchsorted(np.cumsum(p.lengths[rest]), need)) + 1]
    return int(u[taken].sum() * p.rows_per_rank // p.lengths[taken].sum())


def zigzag_parts(p: Problem, part: int = 1000) -> Start:
    """Documents with more than `part` thousandths of a rank's work, or rows, are cut zigzag; then largest first."""
    u, _ = p.scaled
    parts = np.maximum(-(-p.lengths // p.rows_per_rank), -(-u * 1000 // (SHARE * part)))
    parts = np.maximum(np.minimum(np.minimum(parts, p.cp_size), p.lengths // 2), 1)
    chunks = np.where(parts > 1, 2 * parts, 1)
    document = np.repeat(np.arange(len(parts)), chunks)
    i = np.arange(len(document)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    n = chunks[document]
    runs = np.stack([document, p.lengths[document] * i // n, p.lengths[document] * (i + 1) // n], axis=1)
    item = np.repeat(np.cumsum(parts) - parts, chunks) + np.minimum(i, n - 1 - i)
    items = int(parts.sum())
    work = sum_by(item, p.upto(runs[:, 2]) - p.upto(runs[:, 1]), items)
    rows = sum_by(item, runs[:, 2] - runs[:, 1], items)
    return runs, item, _largest_first(p, *p.shares(work, rows))


def _largest_first(p: Problem, work: Int64, rows: Int64) -> Int64:
    load, full = np.zeros(p.cp_size, np.int64), np.zeros(p.cp_size, np.int64)
    order = np.argsort(-work, kind="stable")
    rank = np.zeros(len(order), np.int64)
    large = int((work > SMALL).sum())
    some = order[:large]
    for i, weight, held in zip(some.tolist(), work[some].tolist(), rows[some].tolist()):
        score = weight * load + held * full + 16 * SHARE * np.maximum(full + (held - SHARE), 0)
        to = score.argmin()
        rank[i] = to
        load[to] += weight
        full[to] += held
    rest = order[large:]
    rank[rest] = _pour(work[rest], rows[rest], load.tolist(), full.tolist())
    return rank


def chunks(p: Problem, per_rank: int = 4) -> Start:
    """The pack in equal chunks, whatever documents they cut: each, busiest first, to the rank with least work."""
    ends = np.cumsum(p.lengths)
    rows = int(ends[-1])
    edges = np.arange(1, per_rank * p.cp_size) * rows // (per_rank * p.cp_size)
    borders = np.union1d(np.concatenate([[0], ends]), edges)
    first, last = borders[:-1], borders[1:]
    document = np.searchsorted(ends, first, side="right")
    begin = (ends - p.lengths)[document]
    runs = np.stack([document, first - begin, last - begin], axis=1)
    chunk = np.searchsorted(np.unique(edges[edges > 0]), first, side="right")
    work = sum_by(chunk, p.upto(runs[:, 2]) - p.upto(runs[:, 1]), int(chunk[-1]) + 1)
    heap = [(0, rank) for rank in range(p.cp_size)]
    taken, rank = [0] * p.cp_size, np.zeros(len(work), np.int64)
    for i in np.argsort(-work, kind="stable").tolist():
        load, to = heapq.heappop(heap)
        rank[i] = to
        taken[to] += 1
        if taken[to] < per_rank:
            heapq.heappush(heap, (load + int(work[i]), to))
    return runs, chunk, rank


def rows_moved(p: Problem, start: Start) -> int:
    """Rows that a start moves: every gap before a run in its document that its rank does not hold."""
    runs, item, rank = start
    owner = rank[item]
    group = owner * len(p.lengths) + runs[:, 0]
    order = np.argsort(group * (int(p.lengths.max()) + 1) + runs[:, 1], kind="stable")
    group, runs = group[order], runs[order]
    same = np.zeros(len(runs), bool)
    same[1:] = group[1:] == group[:-1]
    gaps = runs[:, 1] - np.where(same, np.roll(runs[:, 2], 1), 0)
    return int((gaps if p.reach is None else np.minimum(gaps, p.reach)).sum())


def expected_rows(p: Problem, start: Start) -> int:
    """Rows that a start moves, and about as many as making it even and exact will add."""
    runs, item, rank = start
    owner = rank[item]
    work = sum_by(owner, p.upto(runs[:, 2]) - p.upto(runs[:, 1]), p.cp_size)
    rows = sum_by(owner, runs[:, 2] - runs[:, 1], p.cp_size)
    excess = np.maximum(work - p.share * (LIMIT - 10) // 1000, 0)
    heads = sum(p.rows_with(w) for w in excess.tolist() if w)
    too_many = int(np.maximum(rows - p.rows_per_rank, 0).sum())
    whole = int((runs[:, 2] - runs[:, 1])[runs[:, 2] - runs[:, 1] == p.lengths[runs[:, 0]]].sum())
    if too_many * 4 > whole:
        # Only cut documents can fill the ranks: each reader then needs about half of one.
        missing = int((rows < p.rows_per_rank - p.rows_per_rank // 50).sum())
        heads += missing * int(p.lengths.max()) // 2
    return rows_moved(p, start) + heads + too_many


def lay_out(documents: Documents, p: Problem, runs: Int64, start: str) -> Layout:
    """Runs (rank, document, start, stop) as a Layout; padding fills what is left of C. start: what they come from."""
    cp_size, share = p.cp_size, p.rows_per_rank
    rank, first = runs[:, 0], documents.cu_seqlens[runs[:, 1]]
    if p.node >= cp_size:
        # Ranks that share the longest documents become neighbours: they are the likeliest to be in one node.
        longest = np.full(cp_size, len(documents), np.int64)
        place = np.empty(len(documents), np.int64)
        place[p.by_work] = np.arange(len(documents))
        np.minimum.at(longest, runs[:, 0], place[runs[:, 1]])
        name = np.empty(cp_size, np.int64)
        name[np.argsort(longest, kind="stable")] = np.arange(cp_size)
        rank = name[rank]
    # What reads rows of other ranks comes last, so that its queries lie together, and so do all others.
    missing = share - sum_by(rank, runs[:, 3] - runs[:, 2], cp_size)
    stop = documents.rows + missing.cumsum()
    padded = missing.nonzero()[0]
    rank = np.concatenate([rank, padded])
    reads = np.concatenate([runs[:, 2] > 0, np.ones(len(padded), bool)])
    begin = np.concatenate([first + runs[:, 2], (stop - missing)[padded]])
    end = np.concatenate([first + runs[:, 3], stop[padded]])
    order = np.argsort((2 * rank + reads) * (share * cp_size) + begin, kind="stable")
    return Layout("balanced", cp_size, share, joined(rank[order], begin[order], end[order]), start)


ZIGZAG = "zigzag_parts 900"
# The first ones are worth improving side by side; the others where those stay uneven. A name is the function and its
# arguments.
ALWAYS: Mapping[str, Callable[[Problem], Start]] = {
    "document_aware": document_aware,
    "zigzag_parts": zigzag_parts,
    "document_aware 1000": lambda p: document_aware(p, 1000),
    "document_aware 1030 3": lambda p: document_aware(p, 1030, 3),
}
MEMBERS: Mapping[str, Callable[[Problem], Start]] = {
    **ALWAYS,
    ZIGZAG: lambda p: zigzag_parts(p, 900),
    "chunks": chunks,
}
# Members, and limits in place of LIMIT. On 200 packs, 4 to 16 ranks, fast links and slow ones, the fastest of these and
# of `balanced` takes 0.3 % more than the fastest of all members up to 1050, 1120 and 1200.
LESS_EVEN = (
    ("zigzag_parts", 1200),
    ("document_aware 1030 3", 1200),
    ("document_aware", 1200),
    ("document_aware 1000", 1120),
)
