"""All-gather: every rank receives every row of the pack, whether its tiles read it or not.

Documents, Layout -> Schedule. As in Megatron's and Llama 3's all-gather context parallelism (arXiv:2407.21783). The
tiles are those of `sap`: what is computed does not depend on what else has moved.
"""

from __future__ import annotations

import numpy as np

from sap_hf.planning.documents import Documents, Int64
from sap_hf.planning.layout import Layout, cut
from sap_hf.planning.schedule import NO_TRANSFERS, Schedule, Step, columns
from sap_hf.strategies.sap import tiles


def all_gather(
    documents: Documents, layout: Layout, window: int | None = None, stages: int = 1, whole: bool = False
) -> Schedule:
    """Move every real row to every other rank, in one stage whatever `stages` says: a collective has no parts."""
    local, remote, _, _ = tiles(documents, cut(documents, layout), window, whole)
    steps = (Step(NO_TRANSFERS, local), Step(everything(documents, layout), remote))
    return Schedule(window, steps, whole=whole and window is None)


def everything(documents: Documents, layout: Layout) -> Int64:
    """(n, 4) transfers of every real row to every other rank."""
    source, start, stop = layout.segments.T
    stop = np.minimum(stop, documents.rows)
    ranks = np.arange(layout.cp_size)
    # A segment of padding alone is nobody's to read.
    segment, destination = np.nonzero((source[:, None] != ranks) & (start < stop)[:, None])
    return columns(source[segment], destination, start[segment], stop[segment])
