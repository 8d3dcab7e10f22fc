"""The report: each part once, the step's table recomputed from its columns, the legend from the model."""

import dataclasses
from statistics import fmean

import numpy as np
import pytest

import sap_hf
from sap_hf.planning.hardware import PRESETS
from sap_hf.planning.workloads import pack
from sap_hf.simulation import chart, megatron
from sap_hf.simulation.compare import compare
from sap_hf.simulation.fit import FITTED, machine_of
from sap_hf.simulation.placement import placement_table
from sap_hf.simulation.report import PARTS, chart_table, compare_table, report, step_legend, step_lines
from sap_hf.simulation.step import COLUMNS, LLAMA_8B, STRATEGIES, Training, step_seconds

H100 = PRESETS["h100"]


def step_table(workloads, rows_per_rank=4096, count=2):
    """{(workload, strategy): the numbers of its line}, and the last line."""
    _, head, *lines, means = step_lines(workloads, 8, rows_per_rank, count, H100)
    assert head.split()[2 : 2 + len(COLUMNS)] == list(COLUMNS)
    found = {}
    for line in lines:
        numbers = [float(cell) for cell in line[33:].split()[: len(COLUMNS) + 3]]
        found[line[:15].strip(), line[15:33].strip()] = numbers
    return found, means


def test_totals_rates_and_ratios_are_those_of_the_columns():
    found, means = step_table(["short", "half"])
    assert list(found) == [(name, strategy) for name in ("short", "half") for strategy in STRATEGIES]
    over: dict[str, list[float]] = {}
    for (name, strategy), numbers in found.items():
        *columns, total, rate, ratio = numbers
        # Printed to four decimals, each off by up to half of the last one.
        assert total == pytest.approx(sum(columns), abs=5.1e-5 * (1 + len(columns)))
        assert rate == pytest.approx(4096 / total, rel=1e-3)
        assert ratio == pytest.approx(total / found[name, "sap_hf"][len(COLUMNS)], abs=1.5e-3)
        over.setdefault(strategy, []).append(ratio)
    assert any(ratio > 1.05 for ratios in over.values() for ratio in ratios)
    for strategy in set(STRATEGIES) - {"sap_hf"}:
        mean, least = means.split(f" {strategy} ")[1].split(",")[0].split()
        assert float(mean) == pytest.approx(fmean(over[strategy]), abs=1.1e-3)
        assert float(least.strip("()")) == min(over[strategy])


def test_a_line_is_the_mean_of_the_packs_steps():
    found, _ = step_table(["short"], count=3)
    plans = [
        sap_hf.plan(
            pack("short", 8 * 4096, np.random.default_rng(seed)), cp_size=8, strategy="ring", layout="zigzag"
        )
        for seed in range(3)
    ]
    steps = [step_seconds(plan) for plan in plans]
    assert len({step.seconds for step in steps}) == 3
    *columns, total, _, _ = found["short", "ring zigzag"]
    assert total == pytest.approx(fmean(step.seconds for step in steps), abs=1e-4)
    assert columns[0] == pytest.approx(fmean(32 * plan.seconds for plan in plans), abs=1e-4)


def test_the_legend_says_what_the_steps_are_computed_with():
    machine = dataclasses.replace(H100, name="mine", flops_per_s=1.23e14, node_bytes_per_s=4.56e11)
    legend = " ".join(step_legend(machine).split())
    assert (
        "model on mine: 1.23e+14 flop/s forward" in legend and "4.56e+11 bytes/s inside a node of 8" in legend
    )
    plan = sap_hf.plan([8192], cp_size=1, hardware=machine)
    training = Training()
    quiet = dataclasses.replace(training, traffic=dataclasses.replace(training.traffic, norm=0, residual=0))
    quiet = dataclasses.replace(quiet, traffic=dataclasses.replace(quiet.traffic, rotary=0, gate=0, loss=0))
    parts = {name: float(seconds[0]) for name, seconds in step_seconds(plan, LLAMA_8B, quiet).parts.items()}
    assert f", {1 + parts['recompute'] / parts['products']:.2f} times their products" in legend
    products = (parts["products"] + parts["head"]) * training.linear_flops_per_s
    per_parameter = products / 8192 / (LLAMA_8B.parameters - LLAMA_8B.head_parameters)
    assert f", {per_parameter:.0f} operations per parameter and row" in legend
    held = parts["optimizer"] * machine.copy_bytes_per_s / LLAMA_8B.parameters
    assert f"{held:.0f} bytes read or written for each parameter" in legend
    assert f"(MFU {training.linear_flops_per_s / 9.89e14:.0%} of" in legend
    assert "8.03e9 parameters" in legend


def test_the_report_is_every_part_once_and_in_order(monkeypatch):
    # It takes as long as all the rest, and the command's own test prints it.
    monkeypatch.setattr(megatron, "report", lambda: "the example")
    texts = list(report(list(PARTS), ["short"], [8], rows_per_rank=256, count=1))
    everything = "\n".join(texts)
    machine = machine_of(FITTED)
    published = chart_table(machine)
    (placed,) = placement_table(["short"], [8], 1)
    marks = [
        f"== {PARTS['placement']}\n",
        f"{placed.mean_imbalance:14.3f}",
        f"== {PARTS['chart']}\n",
        published,
        f"== {PARTS['compare']}\n",
        compare_table([compare("short", 8, 256, 1, chart.SHAPE, machine)]),
        f"== {PARTS['megatron']}\n",
        "the example",
        f"== {PARTS['step']}\n",
        "\n".join(step_lines(["short"], 8, 256, 1, H100)),
        step_legend(H100),
    ]
    assert [everything.count(mark) for mark in marks if "== " in mark] == [1] * len(PARTS)
    at = [everything.index(mark) for mark in marks]
    assert at == sorted(at)
    for mark in (published, "the example", "as the tools are", "bare policies", step_legend(H100)):
        assert everything.count(mark) == 1
    assert sum(text.endswith(" s)\n") for text in texts) == len(PARTS)


def test_a_part_alone_has_no_heading():
    lines = list(report(["placement"], ["short"], [8], count=1))
    assert len(lines) == 2 and "==" not in lines[0]


def test_the_number_of_packs_reaches_placement_comparison_and_step():
    one, many = (
        {
            part: "\n".join(report([part], ["short"], [8], 512, count))
            for part in ("placement", "compare", "step")
        }
        for count in (1, 3)
    )
    for part in one:
        assert one[part] != many[part]
    assert many["compare"].count(" x3") == 2 and " x3" not in one["compare"]


def test_hardware_that_is_named_is_that_of_comparison_and_step():
    slow = dataclasses.replace(H100, flops_per_s=1e13)
    for part in ("compare", "step"):
        usual, named = (
            "\n".join(report([part], ["short"], [8], 512, 1, machine)) for machine in (None, slow)
        )
        assert usual != named
    assert "1e+13 flop/s forward" in named
