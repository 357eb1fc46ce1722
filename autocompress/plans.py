"""Plans: which layer is at which level, and how levels are solved, as JSON that people can edit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from autocompress.config import StudyConfig
from autocompress.core import Layer, SearchSpace
from autocompress.documents import SplitTokens
from autocompress.errors import ConfigError, LevelError
from autocompress.levels import WHOLE, Level, parse_level
from autocompress.spaces import SCOPES, SpaceConfig, build_space
from autocompress.sublayers import Tie
from autocompress.tables import check_keys, read_strings

FORMAT = "autocompress-plan"
VERSION = 1
PLAN = "plan.json"
# Fields of `StudyConfig` that what is built depends on.
SETTINGS = ("model", "runtime", "calibration", "window", "tokens", "method", "prefix", "dtype")
OTHERS = ("activations",)
KEYS = ("format", "version", "fingerprint", "settings", "scope", "levels", "prefixes")


@dataclass(frozen=True)
class BuildPlan:
    """A model to build.

    Args:
        fingerprint: of the dense model; None lets any of the right layers pass.
        settings: fields of `StudyConfig`.
        scope: parts of the model whose layers the patterns name.
        levels: (pattern, level); patterns as in search spaces, the first that matches wins.
        prefixes: the same, for the levels whose activations later layers are calibrated on.
    """

    fingerprint: str | None
    settings: Mapping[str, Any]
    scope: tuple[str, ...]
    levels: tuple[tuple[str, Level], ...]
    prefixes: tuple[tuple[str, Level], ...] = ()

    @property
    def removes(self) -> bool:
        """Whether sublayers are dropped: then each of them is one layer."""
        return any(isinstance(level, WHOLE) for _, level in self.levels)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The plan in a file, or in a folder that has one.

        Raises:
            ConfigError: not readable, not JSON, an unknown key or a wrong value.
        """
        path = path / PLAN if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_twins)
        except (OSError, ValueError) as error:
            raise ConfigError(f"a plan must be readable JSON. Got '{path}': {error}.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ConfigError(f"a plan must be of format '{FORMAT}'. Got '{path}', which is not.")
        where = f"plan '{path}': "
        check_keys(content, KEYS, ConfigError, where)
        if content.get("version") != VERSION:
            raise ConfigError(f"{where}version must be {VERSION}. Got {content.get('version')!r}.")
        scope = read_strings(content.get("scope", ["blocks"]), "scope", ConfigError)
        if set(scope) - set(SCOPES):
            raise ConfigError(f"{where}scope must list some of {', '.join(SCOPES)}. Got {scope}.")
        settings = content.get("settings", {})
        if not isinstance(settings, dict):
            raise ConfigError(f"{where}settings must be a table. Got {settings!r}.")
        check_keys(settings, (*SETTINGS, *OTHERS), ConfigError, f"{where}settings: ")
        return cls(
            content.get("fingerprint"),
            settings,
            scope,
            _levels(content.get("levels"), f"{where}levels"),
            _levels(content.get("prefixes", {}), f"{where}prefixes"),
        )

    def json(self) -> dict[str, Any]:
        """The content of a plan's file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
            "scope": list(self.scope),
            "levels": {pattern: str(level) for pattern, level in self.levels},
            "prefixes": {pattern: str(level) for pattern, level in self.prefixes},
        }

    def config(self, **changes: Any) -> StudyConfig:
        """The settings to build with.

        Raises:
            AutocompressError: one is out of range or of a wrong type.
        """
        values = dict(self.settings)
        if isinstance(values.get("tokens"), dict):
            check_keys(values["tokens"], SplitTokens.__dataclass_fields__, ConfigError, "tokens: ")
            values["tokens"] = SplitTokens(**values["tokens"])
        try:
            return StudyConfig(**{**values, **changes})
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"a plan's settings must be of their types. Got: {error}.") from error

    def space(self, layers: Sequence[Layer]) -> SearchSpace:
        """One level for each layer.

        Raises:
            SpaceError: a pattern matches no layer, or a layer's shape cannot have its level.
            ConfigError: a layer is named by no pattern.
        """
        return self._one_level(layers, self.levels)

    def build_space(self, layers: Sequence[Layer]) -> SearchSpace:
        """The levels that must be solved: the prefix's, then the layer's own."""
        own = self.space(layers)
        if not self.prefixes:
            return own
        before = self._one_level(layers, self.prefixes)
        both = tuple(
            tuple(dict.fromkeys((*first, *second)))
            for first, second in zip(before.levels, own.levels, strict=True)
        )
        return SearchSpace(own.name, own.layers, both)

    def _one_level(
        self, layers: Sequence[Layer], rules: Sequence[tuple[str, Level]]
    ) -> SearchSpace:
        tie: Tie = "sublayers" if self.removes else ()
        config = SpaceConfig("plan", (), self.scope, tie, pins=tuple(rules))
        space = build_space(config, layers)
        unnamed = [a.name for a, row in zip(space.layers, space.levels, strict=True) if not row]
        if unnamed:
            raise ConfigError(
                f"a plan must name every layer in its scope. Got none for {len(unnamed)}, such as "
                f"'{unnamed[0]}'. Add a pattern, '*' = a level for all others as the last."
            )
        return space


def _levels(value: Any, where: str) -> tuple[tuple[str, Level], ...]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise ConfigError(f"{where} must be a table of pattern: level. Got {value!r:.80}.")
    try:
        return tuple((pattern, parse_level(key)) for pattern, key in value.items())
    except LevelError as error:
        raise ConfigError(f"{where}: {error}") from error


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table, unless a key stands in it twice: the second would win silently."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice}' stands in one table twice")
    return table
