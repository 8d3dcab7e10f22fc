"""Every fenced block of the README runs and prints what stands below it.

```python     run, all in one namespace; a ```text block right after it is what it prints (nothing without one)
              a block that begins with `# NAME.py` is a file instead, for the commands
```console    `$ COMMAND` and the lines it prints, where `...` stands for any number of lines:
              `sap-hf` runs in this process, `torchrun` really starts its processes, `make`, `pip` and
              `accelerate launch` are checked to name targets, extras and files that exist: CI runs those
```yaml       a SapConfig
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import sap_hf
from sap_hf import cli
from sap_hf.models.families import EXACT_FAMILIES
from tests.dist import run_script

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [
    (kind, body) for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]
ROWS, RANKS = 131_072, 8


def blocks(kind: str) -> list[str]:
    return [body for found, body in BLOCKS if found == kind]


def commands() -> list[tuple[str, str]]:
    """(command, what it prints) of all console blocks, in order."""
    found = []
    for body in blocks("console"):
        for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


def commands_of(program: str) -> list[tuple[str, str]]:
    return [(command, output) for command, output in commands() if shlex.split(command)[0] == program]


def matches(printed: str, shown: str) -> bool:
    """Whether `printed` is `shown`, line by line; a line `...` of `shown` stands for any lines."""
    lines = [
        ".*(?:\n|$)" if line == "..." else re.escape(line) + r"[ ]*(?:\n|$)" for line in shown.splitlines()
    ]
    pattern = "".join(f"(?:{line})*" if line.startswith(".*") else line for line in lines)
    return re.fullmatch(pattern, "\n".join(line.rstrip() for line in printed.splitlines()) + "\n") is not None


def test_matching_a_shown_output_can_fail() -> None:
    assert matches("a\nb\nc\n", "a\n...\nc\n")
    assert matches("a\nc\n", "a\n...\nc\n")
    assert matches("a \nb\nc", "a\n...")
    for other in ("b\nc\n", "a\n...\nd\n", "a\nc\n", "", "..\n", "a\nb\n"):
        assert not matches("a\nb\nc\n", other)


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert {kind for kind, _ in BLOCKS} <= {"python", "text", "console", "yaml"}
    for (before, _), (kind, _) in itertools.pairwise(BLOCKS):
        assert kind != "text" or before == "python", (
            "a text block shows what the python block above it prints"
        )
    programs = {shlex.split(command)[0] for command, _ in commands()}
    assert programs <= {"sap-hf", "torchrun", "make", "pip", "accelerate"}


def test_python_blocks_print_what_is_shown() -> None:
    namespace: dict[str, Any] = {}
    for (kind, body), (following, shown) in zip(BLOCKS, [*BLOCKS[1:], ("", "")]):
        if kind != "python" or re.match(r"# \w+\.py\n", body):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(body, "README.md", "exec"), namespace)
        assert printed.getvalue() == (shown if following == "text" else "")


@pytest.mark.parametrize(("command", "shown"), commands_of("sap-hf"))
def test_sap_hf_prints_what_is_shown(command: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(shlex.split(command)[1:]) == 0
    assert matches(capsys.readouterr().out, shown)


@pytest.mark.parametrize(("command", "shown"), commands_of("torchrun"))
def test_scripts_print_what_is_shown(command: str, shown: str, tmp_path: Path) -> None:
    for body in blocks("python"):
        named = re.match(r"# (\w+\.py)\n", body)
        if named:
            (tmp_path / named[1]).write_text(body)
    _, option, processes, script = shlex.split(command)
    assert option == "--nproc-per-node"
    # What the script itself prints: progress bars and warnings would stand in the middle of it.
    (tmp_path / "quiet.py").write_text(
        "import os, runpy\n"
        "os.dup2(os.open('stderr.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = run_script(tmp_path / "quiet.py", int(processes), cwd=tmp_path, env={"PYTHONPATH": path})
    assert run.code == 0, run.output + (tmp_path / "stderr.txt").read_text()
    assert matches(run.output, shown), run.output


@pytest.mark.parametrize("command", [c for p in ("make", "pip", "accelerate") for c, _ in commands_of(p)])
def test_commands_name_targets_extras_and_files_that_exist(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words) <= set(targets)
    elif program == "pip":
        table = (
            (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
        )
        assert words[:2] == ["install", "-e"]
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[2])
        assert extras, words[2]
        assert set((extras[1] or "").split(",")) - {""} <= set(
            re.findall(r"^(\w+) = \[", table, re.MULTILINE)
        )
    else:
        assert words[:2] == ["launch", "--config_file"]
        assert len(words) > 3
        assert all((ROOT / word).is_file() for word in words[2:])


@pytest.mark.parametrize("body", blocks("yaml"))
def test_yaml_blocks_are_configs(body: str, tmp_path: Path) -> None:
    (tmp_path / "sap.yaml").write_text(body)
    config = sap_hf.SapConfig.from_yaml(tmp_path / "sap.yaml")
    assert {name: getattr(config, name) for name in yaml.safe_load(body)} == yaml.safe_load(body)


def test_make_targets_in_the_text_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    mentioned = re.findall(r"`make (\w+)`", README)
    assert mentioned
    assert set(mentioned) <= set(targets)


def test_files_in_the_text_exist() -> None:
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`([\w.]+(?:/[\w.]+)+)`", text)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_supported_models_are_those_that_are_exact() -> None:
    row = re.search(r"^\| models \| (.*) \|$", README, re.MULTILINE)
    assert row
    page = (ROOT / "docs" / "models.md").read_text().split("## Refused")[0]
    assert f"\n{row[1].split(' ', 1)[0]} of the" in page
    shown = set(re.findall(r"^\| ([\w.-]+) \|", page, flags=re.MULTILINE))
    # emu3 is the type whose text model this is.
    assert set(EXACT_FAMILIES) - shown == {"emu3_text_model"}
    named = row[1].split("among them ")[1].split(", ")
    assert named == sorted(named) and set(named) <= shown & set(EXACT_FAMILIES)


@pytest.mark.parametrize("documents", [131, 33, 7, 1])
def test_the_counts_in_the_table_are_those_of_the_plans(documents: int) -> None:
    borders = np.random.default_rng(1).choice(np.arange(1, ROWS), size=documents - 1, replace=False)
    cu_seqlens = [0, *np.sort(borders).tolist(), ROWS]
    plan = sap_hf.plan(cu_seqlens=cu_seqlens, cp_size=RANKS)
    everything = sap_hf.plan(cu_seqlens=cu_seqlens, cp_size=RANKS, strategy="all_gather").rows_moved.sum()
    moved = plan.rows_moved.sum()
    what = (
        f"{documents}, mean {round(ROWS / documents, -3 if documents == 131 else None):,.0f} rows"
        if documents > 1
        else "**1 as long as the pack: exchange heads instead**"
    )
    row = f"| {what} | {plan.layout} | {moved:,} | {moved / everything:.1%} | {plan.imbalance:.2f} |"
    assert row in README.splitlines()
