"""Renames: rules for the names of a side, and the changes of names that wrappers and torch itself make."""

from __future__ import annotations

import re
from collections.abc import Container

from registry.store.errors import Invalid
from registry.store.text import quoted

WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
)
"""Components that wrappers add to names; `base_layer` is that of PEFT."""

_PEFT = ["base_model", "model"]
"""What PEFT adds at the front of names. Each of the two alone is a usual name in networks."""

_PEFT_SAVED = ".modules_to_save.default."
"""What it adds to the names of layers that an adapter replaces. The replaced ones are called `original_module`."""

_WEIGHT_NORM = {"weight_g": "original0", "weight_v": "original1"}
"""Names of weight norm before it became a parametrization, and since."""

_PARAMETRIZED = "parametrizations.weight."


_SIDES = re.compile(r"((?:[^\\=]|\\.)*)=(.*)", re.DOTALL)
"""The two sides of a rule."""


class Rename:
    """A rule that renames names of side A: `old=new`.

    In a glob, `*` stands for one component of a name, and as the last component for all that are left; `**` for any
    number. A rule that begins with `re:` is a regular expression for the whole name, with `\\1` in the new one. An equals
    sign in the old name is written `\\=`.

    >>> Rename("backbone.*=*")("backbone.conv1.weight")
    'conv1.weight'
    >>> Rename("fc.weight=head.weight")("fc.bias") is None
    True

    Raises:
        Invalid: if the rule is malformed.
    """

    def __init__(self, rule: str) -> None:
        self.rule = rule
        parts = _SIDES.fullmatch(rule.removeprefix("re:"))
        old, new = parts.groups() if parts else ("", "")
        if not old or not new:
            raise Invalid(
                f"the rename {quoted(rule)} is malformed", "write it as old=new, such as backbone.*=*"
            )
        try:
            if rule.startswith("re:"):
                self._pattern, self._new = re.compile(old), new
                re.compile(old).sub(new, "")
            else:
                self._pattern, self._new = _glob(old, new, rule)
        except (re.error, IndexError) as error:
            raise Invalid(f"the rename {quoted(rule)} is malformed: {error}") from None

    def __call__(self, name: str) -> str | None:
        """The new name; None for a name that the rule does not fit."""
        match = self._pattern.fullmatch(name)
        return match.expand(self._new) if match else None


def escaped(name: str, *, back: bool = False) -> str:
    """A name as it stands on the left of a rule, or the other way `back`.

    >>> escaped("block=1.weight")
    'block\\\\=1.weight'
    """
    return name.replace(r"\=", "=") if back else name.replace("=", r"\=")


def torch_rename(name: str, names: Container[str]) -> str | None:
    """The other name, if it is among `names`, that torch gives to the same tensor before or after weight norm's change.

    >>> torch_rename("conv.weight_g", ["conv.parametrizations.weight.original0"])
    'conv.parametrizations.weight.original0'
    >>> torch_rename("conv.parametrizations.weight.original1", ["conv.weight_v"])
    'conv.weight_v'
    """
    parent, dot, leaf = name.rpartition(".")
    for old, new in _WEIGHT_NORM.items():
        end = f"{_PARAMETRIZED}{new}"
        if leaf == old:
            candidate = f"{parent}{dot}{end}"
        elif name == end or name.endswith(f".{end}"):
            candidate = f"{name.removesuffix(end)}{old}"
        else:
            continue
        return candidate if candidate in names else None
    return None


def without_wrappers(name: str) -> str:
    """A name without the components that wrappers add, at any depth, and those that PEFT adds at the front.

    >>> without_wrappers("module._orig_mod.layer.module.weight")
    'layer.weight'
    >>> without_wrappers("base_model.model.model.query.base_layer.weight")
    'model.query.weight'
    >>> without_wrappers("base_model.model.score.modules_to_save.default.weight")
    'score.weight'
    """
    kept = [part for part in name.split(".") if part not in WRAPPERS]
    if kept[:2] == _PEFT:
        return ".".join(kept[2:]).replace(_PEFT_SAVED, ".") or name
    return ".".join(kept) or name


def _glob(old: str, new: str, rule: str) -> tuple[re.Pattern[str], str]:
    """The regular expression of a glob, and what `re.Match.expand` makes the new name from."""
    parts = escaped(old, back=True).split(".")
    found = []
    for i, part in enumerate(parts):
        if part == "**" or (part == "*" and i == len(parts) - 1):
            found.append("(.+)")
        else:
            found.append(re.escape(part).replace(r"\*", r"([^.]*)" if part != "*" else r"([^.]+)"))
    stars = iter(range(1, 100))
    count = len(re.findall(r"\*+", new))
    if count > len(re.findall(r"\*+", old)):
        raise Invalid(f"the rename {quoted(rule)} has more stars on the right than on the left")
    text = re.sub(r"\*+", lambda _: rf"\{next(stars)}", new.replace("\\", r"\\"))
    return re.compile(r"\.".join(found)), text
