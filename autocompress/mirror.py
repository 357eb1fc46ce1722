"""The mirror: trials worth looking at, reported to an Optuna study that dashboards open."""

from __future__ import annotations

import math
import re
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from autocompress.core import Allocation, CostTable, Layer, SearchSpace, Trial
from autocompress.errors import OutputError, StudyError
from autocompress.levels import Level

if TYPE_CHECKING:
    import optuna

Attribute = str | float | None

JOURNAL = "optuna.journal"  # name of the default storage in a run folder
METRICS = ("loss (KL, nats/token)", "effective bits")
MOST_BITS = 64.0  # upper end of the parameters' range; no level stores more per weight
GRACE = 5  # seconds until a journal lock that a killed process left behind is taken over

_ATTENTION = re.compile(r"attn|attention|qkv|(^|[._])[qkvo]_(proj|lin)|c_attn")
_MLP = re.compile(r"mlp|ffn|feed_forward|expert|gate|up_proj|down_proj|(^|[._])fc\d?")


class Mirror:
    """Reports to one Optuna study. It is written to, never searched from: not the hot path.

    Each trial has at most 10 summary parameters, because the dashboard sends every parameter of
    every trial; the whole allocation stays in the study's own table under the key given here.

    | parameter | meaning |
    |---|---|
    | `bits_attention`, `bits_mlp`, `bits_other` | effective bits of these layers, by name |
    | `bits_first`, `bits_middle`, `bits_last` | effective bits of each third of the blocks |
    | `bits_spread` | standard deviation of the layers' effective bits |
    | `share_lowest`, `share_highest` | share of the free layers at their smallest, largest level |

    Parts without layers are left out. User attributes: allocation, number, origin, role,
    perplexity, split, tokens, seed, and every cost under its table's name.
    """

    def __init__(
        self, study: optuna.Study, space: SearchSpace, costs: Sequence[CostTable] = ()
    ) -> None:
        self._study, self._space, self._costs = study, space, tuple(costs)
        self._parts = _parts(space)
        self._mirrored = {
            _identity(trial.user_attrs)
            for trial in study.get_trials(deepcopy=False)
            if "allocation" in trial.user_attrs
        }

    @classmethod
    def open(
        cls, storage: str | Path, name: str, space: SearchSpace, costs: Sequence[CostTable] = ()
    ) -> Self:
        """Create the study `name`, or continue it.

        Args:
            storage: an Optuna storage URL (`sqlite:///…`), or the path of a journal file.
            costs: names the trials' costs.

        Raises:
            StudyError: Optuna cannot open the storage.
        """
        import optuna

        with quiet():
            try:
                study = optuna.create_study(
                    storage=open_storage(storage),
                    study_name=name,
                    directions=["minimize", "minimize"],
                    load_if_exists=True,
                )
                study.set_metric_names(list(METRICS))
                return cls(study, space, costs)
            except Exception as error:  # every storage brings exceptions of its own
                raise StudyError(
                    f"storage must be a journal file or an Optuna storage URL such as "
                    f"sqlite:///study.db. Got '{storage}': {error}."
                ) from error

    def report(self, trial: Trial, role: str) -> None:
        """Add a trial once; a second report of the same allocation and fidelity does nothing.

        A trial of infinite loss is added as failed, so that it has no place on the front.

        Args:
            role: 'baseline', 'candidate' or 'finalist'; the first report decides.

        Raises:
            OutputError: the disk refused.
        """
        attributes = self._attributes(trial, role)
        if _identity(attributes) in self._mirrored:
            return
        with quiet():
            try:
                self._study.add_trial(self._frozen(trial, attributes))
            except OSError as error:
                raise OutputError(
                    f"the Optuna storage must be writable. Got: {error}. Make room and run again."
                ) from error
        self._mirrored.add(_identity(attributes))

    def _frozen(self, trial: Trial, attributes: dict[str, Attribute]) -> optuna.trial.FrozenTrial:
        import optuna
        from optuna.distributions import FloatDistribution

        parameters = self._parameters(trial.allocation)
        finite = math.isfinite(trial.loss)
        bits = _bits(self._space.layers, trial.allocation.levels)
        return optuna.create_trial(
            state=optuna.trial.TrialState.COMPLETE if finite else optuna.trial.TrialState.FAIL,
            values=[trial.loss, bits] if finite else None,
            params=parameters,
            distributions={
                name: FloatDistribution(0.0, MOST_BITS if name.startswith("bits") else 1.0)
                for name in parameters
            },
            user_attrs=attributes,
        )

    def _attributes(self, trial: Trial, role: str) -> dict[str, Attribute]:
        costs = {table.name: cost for table, cost in zip(self._costs, trial.costs, strict=False)}
        return {
            "allocation": trial.allocation.key,
            "number": trial.number,
            "origin": trial.origin,
            "role": role,
            "perplexity": trial.perplexity if math.isfinite(trial.perplexity) else None,
            "split": trial.fidelity.split,
            "tokens": trial.fidelity.tokens,
            "seed": trial.fidelity.seed,
            "every": trial.fidelity.every,
            **costs,
        }

    def _parameters(self, allocation: Allocation) -> dict[str, float]:
        """The summary of an allocation: at most 10 numbers."""
        layers, levels = self._space.layers, allocation.levels
        each = [_bits([layer], [level]) for layer, level in zip(layers, levels, strict=True)]
        free = [
            (layer.storage_bits(level), [layer.storage_bits(other) for other in allowed])
            for layer, level, allowed in zip(layers, levels, self._space.levels, strict=True)
            if len(allowed) > 1
        ]
        parts = {
            f"bits_{part}": _bits([layers[i] for i in members], [levels[i] for i in members])
            for part, members in self._parts.items()
        }
        return {
            **parts,
            "bits_spread": statistics.pstdev(each),
            "share_lowest": statistics.fmean([bits == min(all_) for bits, all_ in free] or [0]),
            "share_highest": statistics.fmean([bits == max(all_) for bits, all_ in free] or [0]),
        }


def open_storage(storage: str | Path) -> optuna.storages.BaseStorage | str:
    """What `optuna.load_study(storage=…)` takes, from a URL or the path of a journal file."""
    if "://" in str(storage):
        return str(storage)
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    # The lock is a symbolic link to the file: with a relative path it would dangle, and waiting
    # for a lock that a killed process left behind would never end.
    path = Path(storage).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    _cut_torn_line(path)
    lock = JournalFileSymlinkLock(str(path), grace_period=GRACE)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _cut_torn_line(path: Path) -> None:
    """Drop a last line that a kill tore: Optuna would append to it and never read past it."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def _identity(attributes: Mapping[str, object]) -> tuple[object, ...]:
    """What makes a trial itself; numbers differ between runs that share a storage."""
    same = tuple(attributes[name] for name in ("allocation", "tokens", "seed", "split"))
    return (*same, attributes.get("every", 1))


def _bits(layers: Sequence[Layer], levels: Sequence[Level]) -> float:
    """Effective bits of some layers."""
    stored = sum(layer.storage_bits(level) for layer, level in zip(layers, levels, strict=True))
    return stored / sum(layer.weights for layer in layers)


def _parts(space: SearchSpace) -> dict[str, list[int]]:
    """The layers of each part, by index; empty parts are left out."""
    parts: dict[str, list[int]] = {}
    blocks = [_block(layer) for layer in space.layers]
    count = 1 + max((block for block in blocks if block is not None), default=0)
    for index, (layer, block) in enumerate(zip(space.layers, blocks, strict=True)):
        parts.setdefault(_kind(layer), []).append(index)
        if block is not None:
            third = ("first", "middle", "last")[block * 3 // count]
            parts.setdefault(third, []).append(index)
    return parts


def _block(layer: Layer) -> int | None:
    """Number of the transformer block: the first number in the module's dotted name."""
    return next((int(part) for part in layer.modules[0].split(".") if part.isdecimal()), None)


def _kind(layer: Layer) -> str:
    name = layer.modules[0].lower()
    if _ATTENTION.search(name):
        return "attention"
    return "mlp" if _MLP.search(name) else "other"


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna without its messages and experimental warnings, here and nowhere else."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
