# SPDX-License-Identifier: Apache-2.0
"""What tvmmoe raises. Every message is one line: the argument, what it is, what was expected."""


class TvmMoeError(Exception):
    """Any error of this package."""


class ShapeError(TvmMoeError, ValueError):
    """A tensor has the wrong shape, layout or alignment."""


class DtypeError(TvmMoeError, TypeError):
    """An argument has the wrong Python type or dtype."""


class ArgumentError(TvmMoeError, ValueError):
    """A value is out of range or contradicts another argument."""


class UnsupportedError(TvmMoeError, RuntimeError):
    """A mode, method or device that this package has no kernel for."""


class ArtifactError(TvmMoeError, RuntimeError):
    """An artifact or the manifest is missing, damaged or of another version."""


class UnverifiedWarning(UserWarning):
    """An artifact serves a call that has never run on a GPU of its kind."""
