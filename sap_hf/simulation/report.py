"""Report: the simulation as text. Chart, Compared -> str."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from sap_hf.simulation import chart
from sap_hf.simulation.compare import OURS, PEERS, Compared, best_peer
from sap_hf.simulation.fit import BOUNDS, HELD_OUT, SEEN, TOOLS, modelled, workload
from sap_hf.simulation.timing import Machine

# A held-out point that is further off than this part is explained.
FAR = 0.15
# What the model does not have, where that is known.
REASONS = {
    "hybrid_dcp": "each step of its small rings is given the cost that the steps of the large ring have; the points "
    "that the fit sees are too slow as well.",
    "magi_a2av": "the chart falls off steeply from 8 to 16 GPUs and hardly from 16 to 32, where each rank sends more "
    "rows to other nodes; the model follows the rows. The benchmark's page says that experimental features were on.",
}


def chart_table(machine: Machine) -> str:
    """Every point of the chart, modelled / published TFLOP/s per GPU, with its error."""
    timed = workload(chart.RANKS)
    width = 18
    lines = [
        f"MagiAttention's chart, H100, varlen causal, {chart.ROWS_PER_RANK} rows per rank, {chart.PACKS} packs: "
        "TFLOP/s per GPU, modelled / published",
        f"fitted on {_ranks(SEEN)} GPUs; {_ranks(HELD_OUT)} were not looked at (*)",
    ]
    far: dict[str, list[str]] = {}
    errors: dict[bool, list[float]] = {True: [], False: []}
    for way, title in enumerate(("forward", "backward")):
        heads = (f"{ranks}{'*' if ranks in HELD_OUT else ''}" for ranks in chart.RANKS)
        lines += ["", f"{title:15}" + "".join(f"{head:>{width}}" for head in heads)]
        for name in TOOLS:
            cells = []
            for ranks, published in zip(chart.RANKS, chart.PUBLISHED[name][way]):
                rate = modelled(timed[name][ranks], machine)[way]
                error = rate / published - 1
                held_out = ranks in HELD_OUT
                errors[held_out].append(abs(error))
                if held_out and abs(error) > FAR:
                    far.setdefault(name, []).append(f"{title} {ranks}: {error:+.0%}")
                cells.append(f"{rate:.0f} / {published} {error:+4.0%}")
            lines.append(f"{name:15}" + "".join(f"{cell:>{width}}" for cell in cells))
    lines.append("")
    for held_out, title in ((False, "fitted"), (True, "held out")):
        values = errors[held_out]
        near = sum(value <= FAR for value in values)
        lines.append(
            f"{title:9} mean error {sum(values) / len(values):.1%}, largest {max(values):.1%}, "
            f"{near} of {len(values)} within {FAR:.0%}"
        )
    for name, points in far.items():
        lines.append(f"{name}: {', '.join(points)}: {REASONS.get(name, 'no reason is known.')}")
    return "\n".join(lines)


def constants_table(constants: dict[str, float], fresh: dict[str, float] | None = None) -> str:
    """The fitted constants, those at a bound marked, and what a new search found beside them."""
    lines = []
    for name, value in constants.items():
        _, least, most = BOUNDS[name]
        at = " at its least" if value <= least else " at its most" if value >= most else ""
        again = "" if fresh is None else f"   found again: {fresh[name]:.4g}"
        lines.append(f"{name:24} {value:10.4g}{again}{at}")
    return "\n".join(lines)


def compare_table(rows: Sequence[Compared]) -> str:
    """Our milliseconds and TFLOP/s, and every policy's time over ours, for workloads on the same number of ranks."""
    lines = [
        f"{rows[0].ranks} ranks: time of each policy over ours (forward and backward), above 1 we are faster"
    ]
    names = [name for name in PEERS if any(name in row.tools for row in rows)]
    for bare, title in ((False, "as the tools are"), (True, "bare policies")):
        head = f"{title:17}{'ours ms':>9}{'TFLOP/s':>8}"
        lines += ["", head + "".join(f"{name[:11]:>12}" for name in names) + "  auto chose"]
        for row in rows:
            seconds = sum((row.bare if bare else row.tools)[OURS])
            rate = row.rate(OURS) * sum(row.tools[OURS]) / seconds
            cells = (
                f"{row.ratio(name, bare):12.2f}" if name in row.tools else f"{'-':>12}" for name in names
            )
            chosen = ", ".join(f"{layout} x{times}" for layout, times in row.layouts.items())
            lines.append(f"{row.workload:17}{seconds * 1e3:9.2f}{rate:8.0f}" + "".join(cells) + f"  {chosen}")
        if len(rows) > 1:
            lines.append(f"{'mean':34}" + "".join(_cell(rows, name, bare, fmean) for name in names))
            lines.append(f"{'least':34}" + "".join(_cell(rows, name, bare, min) for name in names))
        lines += summary(rows, bare)
    return "\n".join(lines)


def summary(rows: Sequence[Compared], bare: bool) -> list[str]:
    """Ours against the single best policy, and the workloads where some policy beats ours."""
    name, mean, least = best_peer(rows, bare)
    lines = [f"best single peer policy: {name}; its time over ours: mean {mean:.2f}, least {least:.2f}"]
    for row in rows:
        lost = {n: row.ratio(n, bare) for n in PEERS if n in row.tools and row.ratio(n, bare) < 1}
        if lost:
            worst = sorted(lost, key=lambda n: lost[n])
            lines.append(f"  {row.workload}: slower than " + ", ".join(f"{n} ({lost[n]:.2f})" for n in worst))
    return lines


def _cell(rows: Sequence[Compared], name: str, bare: bool, of: Callable[[list[float]], float]) -> str:
    """A policy's ratios over all workloads as one number."""
    if not all(name in row.tools for row in rows):
        return f"{'-':>12}"
    return f"{of([row.ratio(name, bare) for row in rows]):12.2f}"


def _ranks(ranks: Sequence[int]) -> str:
    return " and ".join(map(str, ranks))
