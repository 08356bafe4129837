"""The shell: completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from registry.cli.options import command


@command("completion", 'eval "$(registry completion bash)"')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script for completion in your shell.

    It completes commands, options and references.

    \b
    bash: eval "$(registry completion bash)"            in ~/.bashrc
    zsh:  eval "$(registry completion zsh)"             in ~/.zshrc
    fish: registry completion fish | source             in ~/.config/fish/config.fish
    """
    from registry.cli.app import app

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(app, {}, "registry", "_REGISTRY_COMPLETE").source())
