"""The errors a user can meet. Each message says what must hold, what was got, and what to do."""

from __future__ import annotations


class AutocompressError(Exception):
    """Base of every error caused by input; the command line prints it and exits with code 2."""


class LevelError(AutocompressError, ValueError):
    """A level key that no registered level understands, or a level with impossible settings."""


class SpaceError(AutocompressError, ValueError):
    """A search space with unknown keys, layers or levels, or an allocation outside its space."""


class BudgetError(AutocompressError, ValueError):
    """A budget that cannot be read or that no allocation of the space meets."""


class ModelError(AutocompressError, ValueError):
    """A model that is missing, damaged, not a causal LM, or holds NaN or infinite weights."""


class ConfigError(AutocompressError, ValueError):
    """A study setting that is unknown, of the wrong type or out of range."""


class CalibrationError(AutocompressError, ValueError):
    """Calibration text that is missing, too short, or shared between splits."""


class DatabaseError(AutocompressError, ValueError):
    """A level database that is damaged or was built from another model or other data."""


class StudyError(AutocompressError, ValueError):
    """A run folder that is locked, foreign, or recorded under other settings."""


class GenerationError(AutocompressError, ValueError):
    """A prompt or a setting that text cannot be generated from, or that cannot be timed."""


class BackendError(AutocompressError, ValueError):
    """A backend that does not exist, or cannot run a packed layer here."""


class LatencyError(AutocompressError, ValueError):
    """A target, a latency store or a measurement that cannot price what a search needs."""


class WorkerError(AutocompressError, RuntimeError):
    """Workers that cannot be started, cannot be reached, or die again and again."""


class OutputError(AutocompressError, OSError):
    """An output folder that is not ours, or a disk that refused a write."""
