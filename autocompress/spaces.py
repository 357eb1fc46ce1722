"""Search-space files: TOML -> `SpaceConfig`, and with a model's layers -> `SearchSpace`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

from autocompress.core import Layer, SearchSpace
from autocompress.errors import LevelError, SpaceError
from autocompress.levels import IMPLIED, WHOLE, Level, parse_level
from autocompress.patterns import at_least, check_matches, matches
from autocompress.sublayers import TIES, Tie, Whole, keeps_some, tie_layers
from autocompress.tables import check_keys, did_you_mean, read_strings, read_toml

SCOPES = ("blocks", "embedding", "head")
KEYS = ("name", "levels", "scope", "tie", "pins", "override", "minimum")

Levels = tuple[Level, ...]
Pin = tuple[str, Level]  # (pattern, level)


@dataclass(frozen=True)
class SpaceConfig:
    """A search space before it meets a model.

    Patterns are `fnmatch` patterns (`*`, `?`, `[...]`; case counts) on the dotted name of a module
    or of its layer (tied modules: `model.layers.0.self_attn.q_proj+k_proj+v_proj`).

    Args:
        name: shown in reports; the file's stem for built-in spaces.
        levels: what every layer may take, in file order.
        scope: which parts of the model hold the layers: 'blocks', 'embedding', 'head'.
        tie: groups of last name components; modules of one parent in one group share a level. Or
            'sublayers': what writes into the residual stream and all that feeds it is one layer;
            or 'blocks': each transformer block is.
        pins: (pattern, level): the only level of the matching layers, in `levels` or not. Pins win
            over overrides; the first matching pin wins.
        overrides: (pattern, levels) instead of `levels`; the first matching override wins.
        minimums: (pattern, level): matching layers keep the levels that store no less than this.
        description: the comment at the top of the file, "When to use: ...".
    """

    name: str
    levels: Levels
    scope: tuple[str, ...] = ("blocks",)
    tie: Tie = ()
    pins: tuple[Pin, ...] = ()
    overrides: tuple[tuple[str, Levels], ...] = ()
    minimums: tuple[Pin, ...] = ()
    description: str = ""

    @property
    def removes(self) -> bool:
        """Whether layers must know their roles."""
        rows = [self.levels, *(levels for _, levels in self.overrides)]
        listed = [level for levels in rows for level in levels] + [level for _, level in self.pins]
        return isinstance(self.tie, str) or any(isinstance(level, WHOLE) for level in listed)

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """The search space in a file.

        Raises:
            SpaceError: not readable, not TOML, or an unknown key, level or value; says where.
        """
        table, text = read_toml(path, SpaceError)
        try:
            return cls._from_table(table, _leading_comment(text))
        except (SpaceError, LevelError) as error:
            raise SpaceError(f"search space '{path}': {error}") from error

    @classmethod
    def _from_table(cls, table: Mapping[str, Any], description: str) -> Self:
        check_keys(table, KEYS, SpaceError)
        return cls(
            name=_read_name(table),
            levels=_read_levels(table, "levels"),
            scope=_read_scope(table.get("scope", ["blocks"])),
            tie=_read_tie(table.get("tie", [])),
            pins=_read_pins(table.get("pins", {}), "pins"),
            overrides=_read_overrides(table.get("override", [])),
            minimums=_read_pins(table.get("minimum", {}), "minimum"),
            description=description,
        )


def space_folder() -> Path:
    """Where the built-in spaces are: beside the installed package's code, or in the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "search_spaces"
    return installed if installed.is_dir() else package.parent / "search_spaces"


def list_spaces() -> list[SpaceConfig]:
    """The built-in spaces, by name."""
    return [SpaceConfig.from_toml(path) for path in sorted(space_folder().glob("*.toml"))]


def load_space(name_or_path: str) -> SpaceConfig:
    """A built-in space by name, or the space in a TOML file.

    Args:
        name_or_path: taken as a path if it ends in `.toml` or names a folder on the way.

    Raises:
        SpaceError: no such space or file, or the file is wrong.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix == ".toml" or len(path.parts) > 1:
        return SpaceConfig.from_toml(path)
    known = [path.stem for path in sorted(space_folder().glob("*.toml"))]
    if name_or_path not in known:
        raise SpaceError(
            f"a search space must be a .toml file or one of {', '.join(known)}. "
            f"Got '{name_or_path}'.{did_you_mean(name_or_path, known)}"
        )
    return SpaceConfig.from_toml(space_folder() / f"{name_or_path}.toml")


def parse_pin(text: str) -> Pin:
    """`pattern=level` as written on the command line.

    Raises:
        SpaceError: no '=', an empty pattern or an unknown level.
    """
    pattern, equals, key = (part.strip() for part in text.rpartition("="))
    if not equals or not pattern:
        raise SpaceError(f"a pin must be written 'pattern=level', '*.down_proj=w8'. Got '{text}'.")
    try:
        return pattern, parse_level(key)
    except LevelError as error:
        raise SpaceError(f"pin '{text}': {error}") from error


def build_space(
    config: SpaceConfig,
    layers: Sequence[Layer],
    pins: Sequence[Pin] = (),
    together: Whole | None = None,
    shapes: bool = True,
) -> SearchSpace:
    """The search space of a model: ties, then overrides, then pins, then minimums.

    A tie group applies to those of its modules that exist; a model without any of them, or with
    one, is left as it is.

    Args:
        layers: one module each, in forward order.
        pins: more pins, which win over those of `config`.
        together: module -> name of the one layer that it belongs to, or None; wins over ties.
        shapes: whether to check that every layer's shape can have its levels.

    Raises:
        SpaceError: no layers, a pattern that matches nothing, tied modules that would get
            different levels, or a level that a layer's shape cannot have.
    """
    if not layers:
        raise SpaceError(
            f"a search space must hold at least one layer. '{config.name}' with scope "
            f"{', '.join(config.scope)} holds none. Widen the scope."
        )
    tied = tie_layers(layers, config.tie, together or (lambda name: None))
    pinned = tuple((pattern, (level,)) for pattern, level in (*pins, *config.pins))
    rules = (*pinned, *config.overrides)
    for pattern, _ in (*rules, *config.minimums):
        check_matches(pattern, tied)
    allowed = tuple(
        at_least(layer, _allowed(layer, rules, config.levels), config.minimums) for layer in tied
    )
    if shapes:
        _check_shapes(tied, allowed)
    if not keeps_some(allowed):
        raise SpaceError(
            f"a search space must leave something of the model. Got '{config.name}', which drops "
            "all that is in scope. Give a layer another level."
        )
    return SearchSpace(config.name, tied, allowed)


def _allowed(layer: Layer, rules: Sequence[tuple[str, Levels]], default: Levels) -> Levels:
    """The levels of a layer: those of the first rule that matches, for all its modules alike."""
    per_module = {
        module: next((lv for pattern, lv in rules if matches(pattern, module, layer)), default)
        for module in layer.modules
    }
    if len(set(per_module.values())) > 1:
        got = "; ".join(f"{module}: {_keys(levels)}" for module, levels in per_module.items())
        raise SpaceError(
            f"the modules of tied layer '{layer.name}' must share their levels. Got {got}. "
            "Let the pin or override match all of them, or take them out of 'tie'."
        )
    return next(iter(per_module.values()))


def _check_shapes(layers: Sequence[Layer], allowed: Sequence[Levels]) -> None:
    for layer, level in ((a, b) for a, row in zip(layers, allowed, strict=True) for b in row):
        try:
            layer.storage_bits(level)
        except LevelError as error:
            raise SpaceError(f"layer '{layer.name}' cannot take {level}: {error}") from error


def _keys(levels: Levels) -> str:
    return ", ".join(map(str, levels))


def _leading_comment(text: str) -> str:
    lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(" ".join(line.lstrip("#") for line in lines).split())


def _read_name(table: Mapping[str, Any]) -> str:
    name = table.get("name")
    if not isinstance(name, str) or not name.strip():
        raise SpaceError(f"'name' must be a non-empty string. Got {name!r}.")
    return name


def _read_levels(table: Mapping[str, Any], key: str, where: str = "") -> Levels:
    keys = read_strings(table.get(key), f"{where}{key}", SpaceError)
    levels = tuple(parse_level(text) for text in keys)
    for level in (level for level in levels if isinstance(level, IMPLIED)):
        raise SpaceError(
            f"'{where}{key}' must be choices. Got '{level}', which 'drop' and 'width' imply."
        )
    if len(set(levels)) < len(levels):  # two spellings of one level
        raise SpaceError(f"'{where}{key}' must not repeat a level. Got {', '.join(keys)}.")
    return levels


def _read_scope(value: Any) -> tuple[str, ...]:
    scope = read_strings(value, "scope", SpaceError)
    for part in scope:
        if part not in SCOPES:
            raise SpaceError(
                f"'scope' must list some of {', '.join(SCOPES)}. "
                f"Got '{part}'.{did_you_mean(part, SCOPES)}"
            )
    return scope


def _read_tie(value: Any) -> Tie:
    if isinstance(value, str) and value in TIES:
        return value
    if not isinstance(value, list):
        raise SpaceError(
            f"'tie' must be a list of lists of module names, or {' or '.join(map(repr, TIES))}. "
            f"Got {value!r}."
        )
    groups = tuple(read_strings(group, "tie", SpaceError) for group in value)
    counts = Counter(name for group in groups for name in group)
    for name, count in counts.items():
        if count > 1:
            raise SpaceError(f"a module may be in one group of 'tie' only. Got '{name}' in two.")
        if "." in name:
            raise SpaceError(f"'tie' must list last name components, like 'q_proj'. Got '{name}'.")
    return groups


def _read_pins(value: Any, where: str) -> tuple[Pin, ...]:
    if not isinstance(value, Mapping):
        raise SpaceError(f"'{where}' must be a table of pattern = level. Got {value!r}.")
    for pattern, key in value.items():
        if not isinstance(key, str):
            raise SpaceError(
                f"'{where}' must hold levels in quotes, "
                f'"*.layers.0.*" = "dense". Got {pattern} = {key!r}. '
                "Quote the pattern: dots outside quotes start a new table."
            )
    return tuple((pattern, parse_level(key)) for pattern, key in value.items())


def _read_overrides(value: Any) -> tuple[tuple[str, Levels], ...]:
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise SpaceError(f"'override' must be written as [[override]] tables. Got {value!r}.")
    overrides = []
    for number, entry in enumerate(value, start=1):
        where = f"override {number}: "
        check_keys(entry, ("layers", "levels"), SpaceError, where)
        pattern = entry.get("layers")
        if not isinstance(pattern, str) or not pattern:
            raise SpaceError(f"{where}'layers' must be a pattern in quotes. Got {pattern!r}.")
        overrides.append((pattern, _read_levels(entry, "levels", where)))
    return tuple(overrides)
