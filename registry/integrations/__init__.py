"""Integrations: the trainers and trackers of other projects, which work with a registry. One file for each.

Each imports its framework at the top. Nothing else imports it but a command that needs it, so a program loads what it uses.
Where the framework is missing, or is a release that is not supported, one line says what to install. `merging` belongs to
PEFT. `options`, `pointers`, `scrubbing`, `storing` and `tracked` load no framework; they are for all.

It imports everything below it but `registry.cli` and `registry.models`. To add a framework: one file here, an extra in
pyproject.toml, a section of docs/integrations.md, and a file in tests/integrations.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_SUPPORTED = {
    "accelerate": ("1.10", "2"),
    "lightning": ("2.6.4", "2.7"),
    "mlflow": ("3.17", "4"),
    "peft": ("0.21", "0.22"),
    "timm": ("1.0.20", "1.1"),
    "transformers": ("5.23", "6"),
    "wandb": ("0.31", "1"),
}
"""The first release of each framework that is supported, and the first that is not."""

_PACKAGES = {"mlflow": "mlflow-skinny"}
"""Frameworks whose package has another name. The package `mlflow` brings `mlflow-skinny` of its release."""


class NotInstalled(ImportError):
    """A framework is not installed, or in a release that is not supported.

    Attributes:
        message: what is missing.
        advice: what to install.
    """

    def __init__(self, message: str, advice: str) -> None:
        super().__init__(f"{message}; {advice}")
        self.message, self.advice = message, advice


def check_release(framework: str) -> None:
    """See that a framework is installed in a release that is supported.

    Raises:
        NotInstalled: saying what to install.
    """
    first, behind = _SUPPORTED[framework]
    advice = f"run: pip install 'torch-registry[{framework}]'"
    try:
        found = version(_PACKAGES.get(framework, framework))
    except PackageNotFoundError:
        raise NotInstalled(f"{framework} is not installed", advice) from None
    if not _numbers(first) <= _numbers(found) < _numbers(behind):
        what = f"{framework} {found} is not supported, {framework}>={first},<{behind} is"
        raise NotInstalled(what, advice)


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version, such as (2, 6) for 2.6.0rc1."""
    found = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
    return tuple(found)
