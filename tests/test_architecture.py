"""Decisions worth keeping, as tests: imports point one way, files stay small, public names are documented."""

import ast
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qtemper

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there, too

SOURCE = Path(qtemper.__file__).parent

# Each module may import from its own row and from the rows above it.
LAYERS = [
    {"errors", "functional", "leaf", "loops", "counter", "schedules", "environment"},
    {"files", "quantizer"},
    {"fast"},
    {"methods", "layers", "progress", "modes", "weights"},
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

LIMIT = 350
"""Lines of a file. Most have less than 300; what is one idea may have more."""


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
    assert len(path.read_text().splitlines()) <= LIMIT, "more than one idea? Then in a file each"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 50, f"{node.name} has {lines} lines"


def optional_packages():
    """Import names of all that pyproject.toml asks for beyond torch and numpy, where it is installed."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    wanted = {canonical(re.match(r"[\w.-]+", word)[0]) for words in extras.values() for word in words} - {"qtemper"}
    found = importlib.metadata.packages_distributions().items()
    return {name for name, providers in found if wanted & set(map(canonical, providers))}


def canonical(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_the_library_imports_with_torch_and_numpy_alone():
    blocked = optional_packages()
    assert {"lightning_fabric", "safetensors", "PIL", "sklearn", "onnx", "ml_dtypes", "optuna", "submitit"} <= blocked
    program = f"import sys; sys.modules.update(dict.fromkeys({sorted(blocked)})); import qtemper"
    subprocess.run([sys.executable, "-c", program], check=True)


def public(module):
    """Public classes and functions that a module defines."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        value = inspect.unwrap(value)  # of functools.cache
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value


def methods(cls):
    """`__init__`, and the public methods and properties, that a class's own body defines."""
    for name, value in vars(cls).items():
        if name.startswith("_") and name != "__init__":
            continue
        value = getattr(value, "fget", getattr(value, "__func__", value))  # properties; class and static methods
        if inspect.isfunction(value) and value.__module__ == cls.__module__:
            yield name, value


def untyped(function):
    signature = inspect.signature(function)
    missing = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.annotation is parameter.empty and parameter.name not in ("self", "cls")
    ]
    return missing + ["return"] * (signature.return_annotation is signature.empty)


def test_every_public_name_is_documented_and_typed():
    modules = [qtemper] + [
        importlib.import_module(m.name)
        for m in pkgutil.walk_packages(qtemper.__path__, "qtemper.")
        if not m.name.endswith("__main__")
    ]
    problems = []
    for module in modules:
        assert module.__doc__, module.__name__
        for name, value in public(module):
            path = f"{module.__name__}.{name}"
            # A dataclass without a docstring gets its signature for one.
            if not value.__doc__ or value.__doc__.startswith(f"{name}("):
                problems.append(f"{path} has no docstring")
            functions = methods(value) if inspect.isclass(value) else [("", value)]
            for method, function in functions:
                # An override may leave its description to the class above.
                if not inspect.getdoc(function):
                    problems.append(f"{path}.{method} has no docstring")
                problems += [f"{path} {method}: {what} has no type" for what in untyped(function)]
    assert not problems, "\n".join(problems)
    for name in qtemper.__all__:
        assert hasattr(qtemper, name)
