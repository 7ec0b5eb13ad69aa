"""Every error that this package raises on purpose.

Each message says what was wrong, which value was met, what is allowed and how to mend it::

    ContextPruneError
    ├── ConfigError (ValueError)         an option, criterion name or combination that is not allowed
    │   ├── BudgetError                  a size that can't be reached with the asked targets
    │   └── VocabularyError              a tokenizer that can't be pruned, or tokens that must stay
    ├── UnsupportedArchitectureError     a model type without an entry in the ArchSpec table
    ├── DataError (ValueError)           a text source that is missing, empty, or lacks a column
    ├── NumericsError (ArithmeticError)  NaN or Inf in weights, activations or statistics
    ├── PlanError (ValueError)           a plan that is damaged or was made for another model
    ├── SaveError (OSError)              nothing was put in place; an older folder is as it was
    ├── LoadError (OSError)              a model folder or file that must not be loaded
    ├── ExportError                      a format that can't hold the model, or an artefact that failed its check
    ├── DownloadError (OSError)          a package of the demo that could not be fetched or verified
    └── PublishError (OSError)           a folder that could not or must not go to the Hub; the repository stays whole
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ContextPruneError(Exception):
    """Base class of all errors raised on purpose by this package."""


class ConfigError(ContextPruneError, ValueError):
    """An option has a value that is not allowed, or two options contradict each other."""


class BudgetError(ConfigError):
    """The asked size can't be reached; the message names what can."""


class VocabularyError(ConfigError):
    """The tokenizer is of a kind that can't be pruned, does not belong to the model, or must keep a token."""


class UnsupportedArchitectureError(ContextPruneError):
    """The model type has no entry in the ArchSpec table."""


class DataError(ContextPruneError, ValueError):
    """A text source is missing, empty, unreadable or lacks the asked column."""


class NumericsError(ContextPruneError, ArithmeticError):
    """NaN or Inf was met where a finite number is needed."""


class PlanError(ContextPruneError, ValueError):
    """A pruning plan is damaged or does not belong to this model."""


class SaveError(ContextPruneError, OSError):
    """A folder could not be written; the target is absent or as it was before."""


class LoadError(ContextPruneError, OSError):
    """A model folder or file is damaged, unsafe or not a model."""


class ExportError(ContextPruneError):
    """A format can't hold the model, or what was written failed its check in the runtime; nothing was put in place."""


class DownloadError(ContextPruneError, OSError):
    """A package needed by the demo could not be fetched or failed its checksum."""


class PublishError(ContextPruneError, OSError):
    """A folder could not or must not go to the Hub; the repository is as it was, or holds the whole new commit."""


class PruningWarning(UserWarning):
    """A run does less than intended: an option changes nothing, training pruned less, a run can't be resumed, ..."""


def unknown_name(what: str, value: object, allowed: Iterable[str]) -> str:
    """Return the message about an unknown name, with the allowed names and the nearest of them."""
    names = list(allowed)
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {what} {value!r}; allowed are {', '.join(names)}.{hint}"


@contextmanager
def error_context(where: str) -> Iterator[None]:
    """Name the place in the message of a numerical error, which tensor functions raise without knowing it.

    Raises:
        NumericsError: The same error, with the place named.
    """
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"In {where}: {error}") from error


class LaunchWarning(UserWarning):
    """A launcher was asked for several processes and started only one."""


class CalibrationWarning(UserWarning):
    """The text is shorter than asked for; the message names both numbers."""


class LoadWarning(UserWarning):
    """A model was loaded without everything that its files hold."""
