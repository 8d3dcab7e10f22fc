"""Imports go downward only, and the numpy layers stay free of torch: read from the source.

cli -> hf -> models -> {runtime | simulation} -> {kernels | strategies | data: blind to each other}
    -> planning -> errors, config
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sap_hf"
HEIGHT = {
    "errors": 0,
    "config": 0,
    "planning": 1,
    "kernels": 2,
    "strategies": 2,
    "simulation": 3,
    "data": 2,
    "runtime": 3,
    "models": 4,
    "hf": 5,
    "cli": 6,
}
# errors is below config, though they share a line in the picture.
SIDEWAYS = {("config", "errors")}
HUGGING_FACE = {"transformers", "accelerate", "trl"}
MAY_IMPORT_HUGGING_FACE = {"models", "hf"}
WITHOUT_TORCH = {"errors", "config", "planning", "strategies", "simulation"}
MOST_LINES = 400

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]


def imported_modules(source: str, package: list[str]) -> list[str]:
    """Every dotted name that `source`, a module of `package`, imports at any depth."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            # `from sap_hf import hf` imports sap_hf.hf: keep the imported names as well.
            found += [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return found


def imports_of(path: Path) -> list[str]:
    return imported_modules(path.read_text(), ["sap_hf", *path.relative_to(PACKAGE).parts[:-1]])


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def allowed(importer: str, imported: str) -> bool:
    if importer == imported or (importer, imported) in SIDEWAYS:
        return True
    return HEIGHT[imported] < HEIGHT[importer]


def test_the_walk_sees_every_way_to_import():
    source = (
        "import sap_hf.hf\nfrom sap_hf import models\nfrom . import plan\nfrom ..runtime.mesh import Mesh\n"
    )
    source += "def f():\n    import torch\n    importlib.import_module('trl.trainer')\n"
    assert imported_modules(source, ["sap_hf", "planning"]) == [
        "sap_hf.hf",
        "sap_hf.models",
        "sap_hf.planning.plan",
        "sap_hf.runtime.mesh.Mesh",
        "torch",
        "trl.trainer",
    ]
    assert (
        not allowed("kernels", "strategies")
        and not allowed("planning", "runtime")
        and allowed("hf", "models")
    )


def test_there_are_files_to_judge():
    assert {layer_of(path) for path in FILES} <= set(HEIGHT)
    assert {"planning", "strategies", "runtime", "kernels"} <= {layer_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_go_downward(path):
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "sap_hf":
            assert len(parts) > 1, f"{path.name} imports the whole of sap_hf"
            # cli is the top: it may use the public names, which __init__ gathers from everywhere.
            if parts[1] not in HEIGHT:
                assert layer_of(path) == "cli", f"{path.name} imports {name} through the package's __init__"
                continue
            assert allowed(layer_of(path), parts[1]), f"{layer_of(path)} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_outside_libraries_stay_in_their_layers(path):
    roots = {name.split(".")[0] for name in imports_of(path)}
    if layer_of(path) in WITHOUT_TORCH:
        assert "torch" not in roots
    if layer_of(path) not in MAY_IMPORT_HUGGING_FACE:
        assert not roots & HUGGING_FACE


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_planning_runs_where_torch_is_not_installed():
    script = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "accelerate", "trl"}:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
import sap_hf

print(sap_hf.plan(lengths=[5, 3, 8], cp_size=4).rows(0).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[")
