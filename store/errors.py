"""The errors that this project raises.

Every one of them says what was wrong, where, and what to do next, in one line. The command line prints
exactly that line. They live in the lowest layer so that every other layer can raise them.
"""

from __future__ import annotations


class RegistryError(Exception):
    """Base of every error that the registry raises on purpose."""


class NotFound(RegistryError):
    """A model, version, alias, name or file that does not exist."""


class Conflict(RegistryError):
    """What was asked for contradicts what is there, such as a file that would be overwritten."""


class Corrupt(RegistryError):
    """Stored bytes are not what was written: a flipped byte, a missing pack, an edited manifest."""

    pack: str | None = None
    """The pack that is damaged, where it is one."""


class Missing(Corrupt):
    """A file of the store that should be there is not."""


class Incompatible(RegistryError):
    """Two things that should fit do not: names, shapes or dtypes differ."""


class Unsupported(RegistryError):
    """Something that cannot be represented or read here, such as a sparse tensor or a newer format."""


class Invalid(RegistryError):
    """Input that breaks a rule: a malformed file, a bad name, a configuration with a wrong value."""


class StorageError(RegistryError):
    """The operating system refused to read or write: no space, no permission, an I/O error."""
