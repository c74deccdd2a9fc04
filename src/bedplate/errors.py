"""Every error that bedplate raises on purpose.

    BedplateError
    ├── CheckpointError     the model folder or file cannot be read as a checkpoint
    ├── UnsupportedError    a config asks for something that bedplate does not do (the error names it)
    ├── CalibrationError    the calibration text is missing, empty or not text
    ├── RecipeError         a quantization recipe cannot be applied to the model
    ├── AdapterError        an adapter does not fit the foundation, or its files are wrong
    ├── LoweringError       a compiled program is not what it should be (an operator is outside of the delegates)
    ├── BundleError         a bundle is damaged, incomplete, or of another version
    ├── NameTakenError      the name is already in use
    ├── NotFoundError       there is no such bundle, adapter or file
    └── RunError            a program cannot be loaded or run, or a request does not fit it
        ├── ArgumentError    an argument of a call has a wrong value (the error names it)
        ├── ReplacedError    an adapter was replaced while a request began
        ├── ContextFullError a text is longer than the context
        └── MemoryFullError an engine has no room for more keys, values or adapters

Each error says what is wrong, where, and what to do. The command line prints it on stderr and exits with code 2.
"""

from __future__ import annotations

from pathlib import Path


class BedplateError(Exception):
    """Base of all errors: `what` is wrong, `where` (a path, key or module name), and a `hint` that says what to do."""

    def __init__(self, what: str, *, where: str | Path | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        return text if self.hint is None else f"{text}\nhint: {self.hint}"


class CheckpointError(BedplateError):
    """The model folder or file cannot be read as a checkpoint."""


class UnsupportedError(BedplateError):
    """A config asks for something that bedplate does not do."""


class CalibrationError(BedplateError):
    """A calibration text is empty or not text."""


class RecipeError(BedplateError):
    """A quantization recipe cannot be applied to the model."""


class AdapterError(BedplateError):
    """An adapter does not fit the foundation, or its files are wrong."""


class LoweringError(BedplateError):
    """A compiled program is not what it should be. The error names the operators that are outside of the delegates."""


class BundleError(BedplateError):
    """A bundle is damaged, incomplete, or of another version."""


class NameTakenError(BedplateError):
    """The name is already in use."""


class NotFoundError(BedplateError):
    """There is no such bundle, adapter or file."""


class RunError(BedplateError):
    """A program cannot be loaded or run, or a request does not fit it."""


class ArgumentError(RunError):
    """An argument of a call has a wrong value. name: of the argument."""

    def __init__(self, name: str, what: str, *, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.name = name


class ReplacedError(RunError):
    """An adapter was replaced while a request began. The next try finds the other one."""


class ContextFullError(RunError):
    """A text has more tokens than the context."""


class MemoryFullError(RunError):
    """An engine has no room for more keys, values or adapters. When others end, there can be."""
