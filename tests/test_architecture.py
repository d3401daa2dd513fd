"""Decisions worth keeping, as tests: imports point one way, files stay small, public names are documented."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import qtemper

SOURCE = Path(qtemper.__file__).parent

# Each module may import from its own row and from the rows above it.
LAYERS = [
    {"errors", "functional", "counter", "schedules", "environment"},
    {"quantizer"},
    {"fast"},
    {"methods", "layers", "progress", "modes"},
    {"policy", "stages", "prepare", "calibrate", "requantize", "curvature", "models", "data"},
    {"train"},
    {"export"},
    {"config"},
    {"run"},
    {"pipeline", "evaluation", "recipes"},
    {"deploy"},
    {"compare"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def files():
    return sorted(SOURCE.rglob("*.py"))


def part(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_parts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qtemper":
            names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            yield from names
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("qtemper."))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    if path == SOURCE / "__init__.py":
        return
    assert part(path) in RANK, "a new part: give it its place in LAYERS and in docs/architecture.md"
    for imported in imported_parts(path):
        assert RANK[imported] <= RANK[part(path)], f"{part(path)} must not import {imported}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_stay_small(path):
    tree = ast.parse(path.read_text())
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 50, f"{node.name} has {lines} lines"


def test_the_library_imports_with_torch_and_numpy_alone():
    blocked = ["safetensors", "tyro", "rich", "PIL", "sklearn", "datasets", "scipy"]
    program = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import qtemper"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_is_documented_and_typed():
    modules = [qtemper] + [
        importlib.import_module(m.name)
        for m in pkgutil.walk_packages(qtemper.__path__, "qtemper.")
        if not m.name.endswith("__main__")
    ]
    for module in modules:
        assert module.__doc__, module.__name__
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                assert value.__doc__, f"{module.__name__}.{name}"
    for name in qtemper.__all__:
        assert hasattr(qtemper, name)
