"""Changes: what may be added from a page, where that is allowed. Nothing can be removed from one."""

from __future__ import annotations

from collections.abc import Mapping

from registry.registry import Registry
from registry.store.errors import Invalid
from registry.ui.page import Moved, address_of


def change(registry: Registry, form: Mapping[str, str]) -> Moved:
    """Add an alias, a tag or a note to a version, and go back to its page.

    Raises:
        Invalid: if the form asks for something else, or the text is none that may be added.
        NotFound: if there is no such version.
    """
    reference, text = form.get("reference", ""), form.get("text", "").strip()
    ways = {"alias": registry.set_alias, "tag": registry.set_tag, "note": registry.add_note}
    way = ways.get(form.get("kind", ""))
    if way is None:
        raise Invalid("kind is neither alias nor tag nor note")
    if not text:
        raise Invalid("the text is empty", "write one")
    return Moved(address_of(way(reference, text).row))
