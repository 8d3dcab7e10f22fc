"""The picture of a plan as a PNG: each rank's work by document, and the rows that travel between ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sap_hf.errors import ConfigError
from sap_hf.planning.documents import Int64
from sap_hf.planning.plan import Plan
from sap_hf.planning.render import LETTERS, share
from sap_hf.planning.schedule import Q_START, RANK, tile_pairs

# Width and height of the picture in pixels.
PIXELS = (1600, 800)
DPI = 100
# Parts of the widest bar that have room for a letter.
LETTER_SHARE = 0.02
# Ranks whose matrix has room for a number in every cell.
NUMBERED_RANKS = 8


def draw(plan: Plan, path: str) -> None:
    """Write a PNG of PIXELS: stacked bars of pairs per rank, a colour for each document, and the matrix `rows_moved`.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--png draws with matplotlib, which is not installed.\n  pip install matplotlib"
        ) from error
    figure = Figure(figsize=(PIXELS[0] / DPI, PIXELS[1] / DPI), dpi=DPI, layout="constrained")
    bars, matrix = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_work(plan, bars)
    _draw_rows(plan, matrix)
    figure.suptitle(
        f"{plan.documents.rows:,} rows on {plan.cp_size} ranks: {plan.strategy} on {plan.layout}, modelled "
        f"{plan.seconds * 1e3:.3g} ms forward and backward on {plan.hardware.name}"
    )
    try:
        figure.savefig(Path(path), format="png")
    except OSError as error:
        raise ConfigError(f"--png {path}: {error.strerror}. Name a file in a folder that exists.") from error


def pairs_by_document(plan: Plan) -> Int64:
    """(W, N) int64 query-key pairs of each document on each rank, over the layers in `windows`."""
    pairs = np.zeros((plan.cp_size, len(plan.documents)), np.int64)
    for window, layers in plan.windows.items():
        tiles = plan.schedule(window).tiles
        document = plan.documents.index_of(tiles[:, Q_START])
        np.add.at(pairs, (tiles[:, RANK], document), layers * tile_pairs(tiles, window))
    return pairs


def _draw_work(plan: Plan, axes) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab20"].colors
    pairs = pairs_by_document(plan)
    for rank, of_rank in enumerate(pairs):
        documents = np.flatnonzero(of_rank)
        width = of_rank[documents]
        left = np.cumsum(width) - width
        axes.broken_barh(
            list(zip(left.tolist(), width.tolist())),
            (rank - 0.4, 0.8),
            facecolors=[colours[i % len(colours)] for i in documents],
        )
        for i in np.flatnonzero(width > LETTER_SHARE * plan.pairs.max()):
            axes.text(
                left[i] + width[i] / 2, rank, LETTERS[documents[i] % len(LETTERS)], ha="center", va="center"
            )
    axes.axvline(plan.pairs.mean(), color="black", linestyle=":")
    axes.set(
        title=f"work: busiest rank {plan.imbalance:.2f} x the mean (dotted)",
        xlabel="query-key pairs, coloured by document",
        ylabel="rank",
        xlim=(0, plan.pairs.max() * 1.02),
        ylim=(plan.cp_size - 0.5, -0.5),
    )
    axes.yaxis.get_major_locator().set_params(integer=True)


def _draw_rows(plan: Plan, axes) -> None:
    moved = plan.rows_moved
    image = axes.imshow(moved, cmap="Blues", vmin=0, vmax=max(int(moved.max()), 1))
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    if plan.cp_size <= NUMBERED_RANKS:
        for source, destination in np.argwhere(moved):
            rows = moved[source, destination]
            colour = "white" if rows > moved.max() / 2 else "black"
            axes.text(destination, source, f"{rows:,}", ha="center", va="center", color=colour)
    axes.set(
        title=f"rows moved: {moved.sum():,}, {share(plan):.1%} of an all-gather",
        xlabel="to rank",
        ylabel="from rank",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
