"""Non-uniform compression of language models.

    import autocompress
    result = autocompress.search(budget="3.5bits", out="results/demo")
    model, tokenizer = autocompress.load("results/demo")

Names are imported on first use (PEP 562), so `import autocompress` loads neither torch nor
transformers and `autocompress --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from autocompress.config import StudyConfig
    from autocompress.core import Allocation, Budget, CostTable, Problem, SearchSpace, Trial
    from autocompress.cost import parse_budget
    from autocompress.errors import AutocompressError
    from autocompress.exporters.native import load
    from autocompress.exporting import export
    from autocompress.levels import Level, parse_level
    from autocompress.operators import operator
    from autocompress.pipeline import build_database, search, search_front
    from autocompress.profiling import profile
    from autocompress.result import FrontResult, Result
    from autocompress.runs import Front, Study, open_run
    from autocompress.scoring import evaluate
    from autocompress.strategies import register_strategy
    from autocompress.targets import Target, register_target

__version__ = "0.1.0"

__all__ = [
    "Allocation",
    "AutocompressError",
    "Budget",
    "CostTable",
    "Front",
    "FrontResult",
    "Level",
    "Problem",
    "Result",
    "SearchSpace",
    "Study",
    "StudyConfig",
    "Target",
    "Trial",
    "build_database",
    "evaluate",
    "export",
    "load",
    "open_run",
    "operator",
    "parse_budget",
    "parse_level",
    "profile",
    "register_strategy",
    "register_target",
    "search",
    "search_front",
]

_HOMES = {
    "Allocation": "autocompress.core",
    "AutocompressError": "autocompress.errors",
    "Budget": "autocompress.core",
    "CostTable": "autocompress.core",
    "Front": "autocompress.runs",
    "FrontResult": "autocompress.result",
    "Level": "autocompress.levels",
    "Problem": "autocompress.core",
    "Result": "autocompress.result",
    "SearchSpace": "autocompress.core",
    "Study": "autocompress.runs",
    "StudyConfig": "autocompress.config",
    "Target": "autocompress.targets",
    "Trial": "autocompress.core",
    "build_database": "autocompress.pipeline",
    "evaluate": "autocompress.scoring",
    "export": "autocompress.exporting",
    "load": "autocompress.exporters.native",
    "open_run": "autocompress.runs",
    "operator": "autocompress.operators",
    "parse_budget": "autocompress.cost",
    "parse_level": "autocompress.levels",
    "profile": "autocompress.profiling",
    "register_strategy": "autocompress.strategies",
    "register_target": "autocompress.targets",
    "search": "autocompress.pipeline",
    "search_front": "autocompress.pipeline",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use.

    Raises:
        AttributeError: `name` is not public.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'autocompress' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Public names, whether imported yet or not."""
    return sorted({*globals(), *__all__})


class _RegisterQuantizer(MetaPathFinder):
    """Registers our quantizer when transformers' registry is imported, and not before.

    `import autocompress` must stay fast, and yet make `from_pretrained` understand our folders.
    """

    registry = "transformers.quantizers.auto"

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.registry:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_and_register(module: ModuleType) -> None:
            execute(module)
            import_module("autocompress.integration")

        spec.loader.exec_module = exec_and_register  # type: ignore[method-assign]
        return spec


if _RegisterQuantizer.registry in sys.modules:
    import_module("autocompress.integration")
else:
    sys.meta_path.insert(0, _RegisterQuantizer())
