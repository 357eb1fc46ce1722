"""Imports point down, strategies see numbers only, and files stay small enough to read."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "autocompress"

# Lowest first. A module may import from its own tier (without cycles) and from the tiers above it
# in this table; `operators` stands for the package and everything in it.
TIERS = (
    ("errors",),
    ("levels", "files", "jsonl", "tables"),
    ("predictions", "layers", "scores"),
    ("core",),
    (
        *(
            "packed",
            "cost",
            "parameters",
            "gguf_mixes",
            "knapsack",
            "highs",
            "beam",
            "dual",
            "pareto",
            "spaces",
            "runtimes",
            "plans",
            "sublayers",
            "folders",
            "documents",
            "windows",
            "calibration",
        ),
        *(
            "config",
            "effort",
            "evaluations",
            "ranges",
            "study",
            "run_facts",
            "run_record",
            "mirror",
            "optuna_storage",
            "summary",
            "targets",
            "latency_store",
            "latency",
            "domination",
            "patterns",
            "workers",
            "prefix_levels",
        ),
    ),
    (
        *("models", "parts", "gguf_files", "experts", "tracing", "structure", "operators"),
        "narrowing",
        *("machine", "memory", "backends", "architectures"),
    ),
    (
        "database",
        "build",
        "solving",
        "stitch",
        "quality",
        "gradients",
        "sensitivity",
        "prefix",
        "linearization",
        *("influence", "narrowing"),
        "comparison",
    ),
    ("strategies", "smallest", "runs", "run_comparison"),
    (
        *(
            "runtime",
            "packing",
            "removal",
            "fusion",
            "integration",
            "sampling",
            "text",
            "lean",
            "generation",
        ),
        "runtime_facts",
    ),
    ("progress", "interrupt"),
    ("profiler", "latency_cases", "latency_timing", "latency_model"),
    ("exporters", "report", "loading"),
    ("output", "result", "evaluator", "session", "scoring", "benchmark", "tasks"),
    ("verification", "card", "foreign_scoring"),
    ("estimates", "latency_local", "latency_setup", "outlier_scores", "worker_scoring"),
    ("latency_search",),
    ("opening",),
    ("finalists", "manifest", "writing", "front_search", "front_writing", "quality_search"),
    ("pipeline", "points", "doctor", "exporting", "planning", "profiling"),
    (
        *("show", "run_commands", "profile_command", "eval_command", "export_commands"),
        "worker_options",
    ),
    ("dashboard", "dashboard_answers", "dashboard_pages", "dashboard_plots"),
    ("front_commands",),
    ("cli", "__main__", "__init__"),  # `__init__` is the facade: it names the public API
)
SEES_TORCH = {
    *("packed", "models", "experts", "tracing", "operators", "database", "stitch", "quality"),
    *("sensitivity", "exporters", "pipeline", "cli", "__main__", "__init__", "machine", "build"),
    *("runtime", "fusion", "integration", "evaluator", "session", "scoring", "output", "result"),
    *("latency_cases", "latency_model", "latency_local", "latency_setup", "latency_search"),
    *("latency_timing", "profile_command"),
    *("manifest", "sampling", "text", "generation", "benchmark", "run_commands"),
    *(
        "runtime_facts",
        "lean",
        "backends",
        "prefix",
        "gradients",
        "linearization",
        *("influence", "narrowing"),
        "estimates",
    ),
    *("finalists", "parts", "verification", "exporting", "export_commands", "card"),
    *("outlier_scores", "planning", "comparison", "eval_command", "quality_search", "profiling"),
    *("foreign_scoring", "doctor", "loading", "removal", "structure", "packing"),
    *("opening", "writing", "front_search", "front_writing", "points", "worker_scoring", "solving"),
}
TORCH_FREE = {place for places in TIERS for place in places} - SEES_TORCH
FILE_LINES = 300
FUNCTION_LINES = 40

FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """Dotted name below the package: 'operators.quantize', 'operators', '__init__'."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def tier(module: str) -> int | None:
    place = module.split(".")[0]
    return next((i for i, places in enumerate(TIERS) if place in places), None)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """Every dotted name imported anywhere in the module, functions and TYPE_CHECKING included."""
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"imports must be absolute. Got a relative one in '{module}'."
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


@cache
def edges(module: str) -> frozenset[str]:
    """Modules of the package that `module` imports."""
    found = set()
    for name in imports(module):
        if name.startswith("autocompress.") and name != "autocompress.__version__":
            inner = name.removeprefix("autocompress.")
            while inner not in MODULES and "." in inner:
                inner = inner.rpartition(".")[0]
            found.add(inner if inner in MODULES else "__init__")
        elif name == "autocompress":
            found.add("__init__")
    return frozenset(found - {module})


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_tier(module: str) -> None:
    assert tier(module) is not None, (
        f"every module must have a place in TIERS of {Path(__file__).name}. Got '{module}'. "
        "Add it to the lowest tier that can see what it imports."
    )


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    rank = tier(module)
    if rank is None:
        pytest.fail(f"'{module}' has no tier")
    upward = sorted(other for other in edges(module) if (tier(other) or 0) > rank)
    assert not upward, f"'{module}' imports from a higher tier: {', '.join(upward)}"


def test_no_import_cycles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path, module))}"
        if module not in done:
            for other in sorted(edges(module)):
                # A plugin registers with its package, which finds its plugins: no real cycle.
                if not module.startswith(f"{other}."):
                    visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def reached(module: str) -> set[str]:
    """The module and everything of the package it imports, directly or not."""
    seen, todo = set(), [module]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo.extend(edges(current))
    return seen


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] in TORCH_FREE])
def test_no_torch_behind_what_searches_and_reports(module: str) -> None:
    guilty = {
        other: sorted(name for name in imports(other) if "torch" in name.split("."))
        for other in reached(module)
    }
    guilty = {other: names for other, names in guilty.items() if names}
    assert not guilty, f"'{module}' must not see torch, not even lazily. Got {guilty}."


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short(module: str) -> None:
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LINES, f"'{module}' must have at most {FILE_LINES} lines. Got {lines}."


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module: str) -> None:
    long = {
        node.name: code_lines(node)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and code_lines(node) > FUNCTION_LINES
    }
    assert not long, f"functions of '{module}' must have at most {FUNCTION_LINES} lines. Got {long}"


def test_importing_the_package_is_light() -> None:
    heavy = ("torch", "transformers", "optuna", "numpy", "datasets")
    code = f"import sys, autocompress; print(*[m for m in {heavy} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [], f"`import autocompress` must not load {run.stdout}"


def test_public_names_have_homes() -> None:
    import autocompress

    assert set(autocompress._HOMES) == set(autocompress.__all__)
    for name, home in autocompress._HOMES.items():
        inner = home.removeprefix("autocompress.")
        assert inner in MODULES, f"'{name}' must live in a module that exists. Got '{home}'."
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = autocompress.nonsense


def test_kernels_is_a_folder_not_a_package() -> None:
    # transformers imports a PyPI package of that name; ours would shadow it.
    assert not (ROOT / "kernels" / "__init__.py").exists()
