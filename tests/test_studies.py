"""Study scripts keep up with what they import and with the settings of strategies they name."""

import importlib.util
import sys
from pathlib import Path

import pytest

APART = ("matplotlib",)  # what a script draws with is not installed for tests
STUDIES = Path(__file__).parents[1] / "studies"
SCRIPTS = sorted(STUDIES.rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(STUDIES)))
def test_a_study_can_be_imported(path, monkeypatch):
    """Beside its neighbours, whose names other folders have, too."""
    monkeypatch.syspath_prepend(path.parent)
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location(f"study_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        if error.name not in APART:
            raise
        pytest.skip(f"needs {error.name}")
    finally:
        for name in set(sys.modules) - before:
            if str(STUDIES) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
