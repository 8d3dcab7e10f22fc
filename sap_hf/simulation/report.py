"""Report: the simulation as text, part after part. Chart, Placed, Compared, TrainingStep -> str."""

from __future__ import annotations

import collections
import dataclasses
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

from sap_hf.planning.hardware import Hardware, find_hardware
from sap_hf.planning.workloads import WORKLOADS
from sap_hf.simulation import chart, megatron, placement, step
from sap_hf.simulation.compare import OURS, PEERS, Compared, best_peer, compare, packs
from sap_hf.simulation.fit import BOUNDS, FITTED, HELD_OUT, SEEN, TOOLS, machine_of, modelled, workload
from sap_hf.simulation.step import COLUMNS, LLAMA_8B, Training, strategy_steps
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

# The parts of the report, in its order, and their headings.
PARTS = {
    "placement": "How even the work is, and the rows that move",
    "chart": "The model beside published times",
    "compare": "One attention layer under every tool's policy",
    "megatron": "Megatron-Core's dynamic context parallelism",
    "step": "A whole training step under every strategy",
}


def report(
    parts: Sequence[str],
    workloads: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    rows_per_rank: int = chart.ROWS_PER_RANK,
    count: int = chart.PACKS,
    hardware: Hardware | None = None,
) -> Iterator[str]:
    """Texts as they become ready; with more than one part, a heading before each and its run time after it.

    Args:
        parts: of PARTS. The chart and Megatron's example are what was published, whatever the other arguments say.
        workloads, ranks: None is each part's own choice.
        rows_per_rank: of the comparison and the step. count: packs of each workload, of these and the placement.
        hardware: None is as fitted to the chart for the comparison, and h100 for the step.
    """
    machine = machine_of(FITTED)
    if hardware is not None:
        machine = dataclasses.replace(machine, hardware=hardware)
    names = workloads or list(WORKLOADS)
    for part in parts:
        begun = time.perf_counter()
        if len(parts) > 1:
            yield f"== {PARTS[part]}\n"
        if part == "placement":
            yield from placement_lines(workloads or placement.WORKLOADS, ranks or placement.RANKS, count)
        elif part == "chart":
            yield chart_table(machine_of(FITTED))
        elif part == "compare":
            for size in ranks or chart.RANKS:
                rows = [compare(name, size, rows_per_rank, count, chart.SHAPE, machine) for name in names]
                yield compare_table(rows) + "\n"
        elif part == "megatron":
            yield megatron.report()
        elif part == "step":
            for size in ranks or (8,):
                yield from step_lines(names, size, rows_per_rank, count, find_hardware(hardware))
            yield step_legend(find_hardware(hardware))
        if len(parts) > 1:
            yield f"\n({time.perf_counter() - begun:.1f} s)\n"


def placement_lines(workloads: Sequence[str], ranks: Sequence[int], count: int) -> Iterator[str]:
    """One line for each workload and number of ranks: means over its packs."""
    yield "workload       ranks     rows  imbalance mean  worst  of all-gather  contiguous: imbalance  of all-gather"
    for placed in placement.placement_table(workloads, ranks, count):
        yield (
            f"{placed.workload:<14} {placed.ranks:>5} {placed.rows:>8}  {placed.mean_imbalance:14.3f}  "
            f"{placed.max_imbalance:5.3f}  {placed.moved:13.2%}  {placed.contiguous_imbalance:21.2f}  "
            f"{placed.contiguous_moved:13.2%}"
        )


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


def step_lines(
    workloads: Sequence[str], ranks: int, rows_per_rank: int, count: int, hardware: Hardware
) -> Iterator[str]:
    """A line for each workload and strategy: means over its packs, and the step's time over ours."""
    yield f"{ranks} ranks, {rows_per_rank} rows on each: seconds of one optimizer step, mean of {count} packs"
    titles = "".join(f"{column:>11}" for column in COLUMNS)
    yield f"{'workload':15}{'strategy':18}{titles}{'total':>9}{'tokens/s GPU':>14}{'over ours':>11}  plans"
    ratios: dict[str, list[float]] = {}
    for name in workloads:
        seconds: dict[str, list[dict[str, float]]] = {}
        plans: dict[str, collections.Counter[str]] = {}
        for documents in packs(name, ranks * rows_per_rank, count):
            for strategy, made in strategy_steps(documents, ranks, hardware):
                seconds.setdefault(strategy, []).append(made.columns)
                size = made.plan.ulysses_size
                chosen = f"{made.plan.layout} {made.plan.strategy}" + f" u{size}" * (size > 1)
                plans.setdefault(strategy, collections.Counter())[chosen] += 1
        means = {
            strategy: [fmean(one[column] for one in each) for column in COLUMNS]
            for strategy, each in seconds.items()
        }
        for strategy, columns in means.items():
            total = sum(columns)
            ratio = total / sum(means[OURS])
            ratios.setdefault(strategy, []).append(ratio)
            cells = "".join(f"{column:11.4f}" for column in columns)
            cells += f"{total:9.4f}{rows_per_rank / total:14.0f}{ratio:11.3f}  "
            cells += ", ".join(f"{plan} x{times}" for plan, times in plans[strategy].items())
            yield f"{name:15}{strategy:18}{cells}"
    others = (
        f"{strategy} {fmean(each):.3f} ({min(each):.3f})"
        for strategy, each in ratios.items()
        if strategy != OURS
    )
    yield f"over ours, mean (least) of the workloads: {', '.join(others)}\n"


def step_legend(hardware: Hardware) -> str:
    """All that the seconds of `step_lines` assume, from the constants that they are computed with."""
    model, training = LLAMA_8B, Training()
    traffic, rate = training.traffic, training.linear_flops_per_s
    again = 1 + training.checkpointing / (1 + step.BACKWARD_PRODUCTS)
    meaning = {
        "model": f"Llama-3.1-8B without its norms' weights: {model.parameters / 1e9:.2f}e9 parameters, "
        f"{model.layers} layers of {model.layer_parameters / 1e6:.0f}e6, embedding and head of "
        f"{model.head_parameters / 1e6:.0f}e6 each; {model.num_heads} heads, {model.num_kv_heads} kv heads of "
        f"{model.head_dim}. bfloat16, with float32 masters.",
        "attention": "of the slowest rank, with the waiting for rows of others that no kernel hides: the plan's own "
        f"model on {hardware.name}: {hardware.flops_per_s:.3g} flop/s forward, {hardware.backward_flops_per_s:.3g} "
        f"backward, {hardware.node_bytes_per_s:.3g} bytes/s inside a node of {hardware.ranks_per_node} ranks, "
        f"{hardware.network_bytes_per_s:.3g} between nodes. out and lse are kept: attention is not computed again.",
        "linear": f"matrix products at {rate:.3g} flop/s whatever the machine (MFU {rate / step.H100_FLOPS_PER_S:.0%} "
        f"of an H100's {step.H100_FLOPS_PER_S:.3g}), {2 * (1 + step.BACKWARD_PRODUCTS)} operations per parameter and "
        f"row; with checkpointing the layers' forward is computed again, {again:.2f} times their products. What is "
        f"between them moves at {hardware.copy_bytes_per_s:.3g} bytes/s: two norms of {traffic.norm:g} bytes per "
        f"element, two residuals of {traffic.residual:g}, rotary {traffic.rotary:g}, gate {traffic.gate:g}, "
        f"{step.BACKWARD_TRAFFIC} times that in the backward, and the loss, {traffic.loss:g} per logit.",
        "optimizer": f"AdamW and clipping: {step.OPTIMIZER_BYTES} bytes read or written for each parameter of the "
        "rank's share, in float32: parameter, gradient and two moments.",
        "fsdp": "what nothing hides of FSDP2 over all ranks, 2 bytes per parameter each time: gathered for the "
        "forward and, but for embedding and head, again for the backward; gradients reduced once. A layer's traffic "
        "is prefetched beside another layer's compute; embedding, head, and one layer each way have none to hide "
        "behind. It and attention's exchanges do not slow each other here.",
        "total": "the sum of the columns: none counts what other work hides. Not in it: loading data, kernel starts "
        "outside attention, the embedding's look-up.",
        "over ours": f"total over that of {OURS}, which takes the plan of least attention time in this same model: "
        "only the comparison of policies has other tools' own placements. all_gather, ring and ulysses have the "
        "placement that is best for them, or the one in their name; needed moves only rows that are read; u8: 8 "
        "ranks exchange heads.",
    }
    return "\n".join(
        textwrap.fill(text, 118, initial_indent=f"{name:12}", subsequent_indent=" " * 12)
        for name, text in meaning.items()
    )


def _ranks(ranks: Sequence[int]) -> str:
    return " and ".join(map(str, ranks))
