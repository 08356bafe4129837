"""`.pt` files: the only module that touches pickle, and only through `torch.load(weights_only=True)`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from registry.store import durable
from registry.store.errors import Invalid, NotFound, Unsupported
from registry.store.text import printable, quoted


def read_torch_file(path: Path) -> Any:
    """What a `.pt` or `.pth` file holds, on the CPU; tensors are mapped from the file where it allows that.

    Raises:
        NotFound: if there is no such file.
        Unsupported: if it needs code to run, naming what; nothing falls back to unsafe pickle.
        Invalid: if it is not a file of `torch.save`.
    """
    if not path.is_file():
        raise NotFound(f"{path}: there is no such file")
    with durable.storage_errors(path):
        zipped = path.read_bytes()[:2] == b"PK" if path.stat().st_size < 2 else _starts_with_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        blocked = _blocked(path) if zipped else ()
        if blocked:
            names = ", ".join(printable(name) for name in sorted(blocked)[:5])
            raise Unsupported(
                f"{path}: loading it would run code ({names}); save it again from its own program as a plain "
                "state dict: torch.save(model.state_dict(), ...)"
            ) from error
        text = printable(str(error).partition("\n")[0])
        if "Unsupported" in text or "Weights only" in text or "weights_only" in text:
            raise Unsupported(
                f"{path}: not a plain state dict, so loading it could run code ({_reason(error)}); save it again "
                "from its own program with: torch.save(model.state_dict(), ...)"
            ) from error
        raise Invalid(f"{path}: not a readable file of torch.save ({text[:160]})") from error


def _starts_with_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _blocked(path: Path) -> set[str]:
    try:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return set()


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line]
    return printable(lines[0][:160]) if lines else printable(type(error).__name__)


def render_torch_file(tree: Any) -> bytes:
    """The bytes of a `.pt` file that holds the tree.

    Raises:
        Unsupported: if torch cannot write it.
    """
    buffer = io.BytesIO()
    try:
        torch.save(tree, buffer)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise Unsupported(f"torch cannot write this as a .pt file: {quoted(str(error))}") from error
    return buffer.getvalue()
