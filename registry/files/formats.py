"""The formats of files that are read and written: one row each, from which everything else is computed.

A format is one module with two functions:

- `read(path: Path) -> Imported` gives what a file holds.
- `write(checkpoint, component, file: Outgoing, *, verify: bool)` writes a checkpoint, or the named component of it.

The command line reads this table for its help, so nothing here loads torch. A row loads its module on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry.checkpoints.checkpoint import Checkpoint
    from registry.files.imported import Imported
    from registry.files.outgoing import Outgoing


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format of files.

    Attributes:
        module: the module that has `read` and `write`.
        suffixes: what names of its files end in, in lower case; the usual one first.
        holds_all: whether a file holds a whole checkpoint; otherwise it holds one component, by default `model`.
        about: what a user should know about files that are written, a sentence or two.
        reading: what a user should know about files that are read; a few words.
    """

    module: str
    suffixes: tuple[str, ...]
    holds_all: bool
    about: str
    reading: str = ""

    def read(self, path: Path) -> Imported:
        """What a file holds.

        Raises:
            NotFound: if there is no such file.
            Invalid: if it is malformed, empty, holds no tensors, or is no regular file.
            Unsupported: if it holds what cannot be stored, or needs code to run.
            StorageError: if the system refuses.
        """
        return self._function("read")(path)  # type: ignore[no-any-return]

    def write(
        self, checkpoint: Checkpoint, component: str | None, file: Outgoing, *, verify: bool = True
    ) -> None:
        """Write a checkpoint, or one component of it, to a file.

        Args:
            component: the name of the component; None for what the format holds by default.
            verify: check the digests of what is read.

        Raises:
            NotFound: if the checkpoint has no such component.
            Unsupported: if the format cannot hold a value, naming its path; no file is made.
            Corrupt: if a stored byte is not what was saved.
            Conflict, StorageError: as `Outgoing.opened`.
        """
        self._function("write")(checkpoint, component, file, verify=verify)

    def _function(self, name: str) -> Callable[..., Any]:
        # Lazy: loads torch.
        function: Callable[..., Any] = getattr(import_module(self.module), name)
        return function


FORMATS = (
    Format(
        module="registry.files.torch_files",
        suffixes=(".pt", ".pth", ".ckpt", ".bin", ".pth.tar"),
        holds_all=True,
        about="An imported .pt file comes back in its own layout.",
        reading="without running code that they hold",
    ),
    Format(
        module="registry.files.safetensors_files",
        suffixes=(".safetensors",),
        holds_all=False,
        about="A .safetensors file holds the tensors of one component, by default the model.",
    ),
)

SUFFIXES = tuple(suffix for row in FORMATS for suffix in row.suffixes)
"""What the names of files end in that are read and written."""

INDEX = ".index.json"
"""What the name of an index of shards ends in."""

FORMS = f"{', '.join(SUFFIXES)}, a folder of shards or its *{INDEX}"
"""All that can be read, for an error."""


def format_of(name: str) -> Format | None:
    """The format of a file, by the end of its name; None if no format has such names."""
    return next((row for row in FORMATS if name.lower().endswith(row.suffixes)), None)


def listed(words: Iterable[str], last: str = "or") -> str:
    """Words as a sentence lists them.

    >>> listed([".pt", ".pth", ".bin"])
    '.pt, .pth or .bin'
    """
    *first, end = words
    return f"{', '.join(first)} {last} {end}" if first else end
