"""Ring: W - 1 stages, in each of which every rank receives the rows of one more neighbour.

Documents, Layout -> Schedule. After Liu et al. 2023 (arXiv:2310.01889). Every rank receives all rows of all others,
whether a tile reads them or not, but holds no more than two neighbours' at a time. Rows come straight from their owner
instead of being passed on: the same bytes on every link, and one wait less.
"""

from __future__ import annotations

from sap_hf.planning.documents import Documents
from sap_hf.planning.layout import Layout, cut
from sap_hf.planning.schedule import DESTINATION, NO_TRANSFERS, SOURCE, Schedule, Step
from sap_hf.strategies.all_gather import all_gather, everything
from sap_hf.strategies.sap import split, tiles


def ring(
    documents: Documents, layout: Layout, window: int | None = None, stages: int = 1, whole: bool = False
) -> Schedule:
    """Move every real row to every other rank, nearer sources first; `stages` is always W - 1, and nothing is `whole`.

    Under a window a query's keys may lie with several neighbours, and it reads them in one call: one stage then.
    """
    if window is not None:
        return all_gather(documents, layout, window)
    local, remote, _, _ = tiles(documents, cut(documents, layout), window)
    sent = everything(documents, layout)
    distance = (sent[:, DESTINATION] - sent[:, SOURCE]) % layout.cp_size - 1
    steps = split(sent, distance, remote, layout.cp_size - 1)
    steps = [step for step in steps if len(step.transfers)]
    return Schedule(window, (Step(NO_TRANSFERS, local), *steps), min(2, len(steps)) or None)
