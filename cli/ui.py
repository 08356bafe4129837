"""The pages in the browser: ui."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

import click

from registry.catalog.resolving import resolve
from registry.cli.options import ReferenceType, command, open_registry
from registry.cli.output import print_json, say, warn
from registry.cli.runs import tunnel
from registry.cli.suggestions import WrongUse
from registry.store.errors import Invalid

if TYPE_CHECKING:
    from registry.registry import Registry


@command("ui", "registry ui\nregistry ui lenet5@best\nregistry ui lenet5:v1 lenet5:v6 --no-open")
@click.argument("names", nargs=-1, type=ReferenceType(), metavar="[REFERENCE|RUN]...")
@click.option(
    "--port", type=click.IntRange(0, 65_535), help="The port. [default: the first free one from 6007 on]"
)
@click.option("--host", help="The address to listen on. [default: this machine alone]")
@click.option("--no-open", is_flag=True, help="Do not open the browser.")
@click.option("--no-token", is_flag=True, help="Let every user of this machine look.")
@click.option("--allow-changes", is_flag=True, help="Let pages add aliases, tags and notes.")
@click.option(
    "--allowed-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="Another name by which a browser may call it.",
)
@click.option("--base-path", default="", metavar="PATH", help="What addresses begin with behind a proxy.")
@click.option("--api-only", is_flag=True, help="Answer programs alone.")
def ui(
    names: tuple[str, ...],
    port: int | None,
    host: str | None,
    no_open: bool,
    no_token: bool,
    allow_changes: bool,
    hosts: tuple[str, ...],
    base_path: str,
    api_only: bool,
    root: str | None,
    as_json: bool,
) -> None:
    """Open the registry in the browser, until Ctrl-C.

    Without arguments the pages begin with the models. A reference or a run opens its page, and two references open
    their diff. The server listens on this machine alone, asks for the token that its address holds, and changes
    nothing.
    """
    # Lazy: loads werkzeug.
    from registry.ui.server import Server

    path = _path(open_registry(root), names)
    if host is not None and host not in ("127.0.0.1", "::1", "localhost") and no_token:
        raise Invalid(
            "--no-token would show the registry to every machine that can reach this one", "leave it out"
        )
    if base_path and not base_path.startswith("/"):
        raise Invalid("--base-path begins with a slash, such as /proxy/6007")
    server = Server(
        root,
        host=host,
        port=port,
        allowed_hosts=hosts,
        has_token=not no_token,
        base=base_path,
        is_api_only=api_only,
        allows_changes=allow_changes,
    )
    with contextlib.closing(server), contextlib.suppress(KeyboardInterrupt):
        address = server.address(path)
        forward = tunnel(server.port)
        if as_json:
            print_json({"address": address, "tunnel": forward})
        else:
            say(f"the registry is at {address}")
            if forward:
                say(f"you are on a remote host; on your own machine run: {forward}")
            say("Ctrl-C ends it")
        sys.stdout.flush()
        if not (no_open or as_json or api_only or forward) and _has_display():
            # Lazy: start-up.
            import webbrowser

            if not webbrowser.open(address):
                warn("no browser could be opened; open the address yourself")
        server.wait()


def _has_display() -> bool:
    """Whether a browser that is opened here would be seen."""
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )


def _path(registry: Registry, names: tuple[str, ...]) -> str:
    """The address of the page of what is named.

    Raises:
        NotFound: if there is nothing of such a name.
        click.UsageError: for more than two names.
    """
    # Lazy: start-up.
    from registry.ui.page import address, address_of

    if len(names) > 2:
        raise WrongUse("one name opens its page, two open their diff", "leave the others out")
    if len(names) == 2:
        for name in names:
            resolve(registry.catalog, name)
        return address("diff", a=names[0], b=names[1])
    for name in names:
        if "/" in name:
            return address("r", *registry.runs[name].name.split("/"))
        version = resolve(registry.catalog, name)
        return address("m", name) if name == version.model else address_of(version)
    return "/"
