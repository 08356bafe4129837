"""The shell: completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from registry.cli.options import command


@command("completion", 'eval "$(registry completion bash)"')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script for completion in your shell.

    It completes commands, options, references, metrics, tags, runs, components and networks.

    \b
    in ~/.bashrc:  eval "$(registry completion bash)"
    in ~/.zshrc:   eval "$(registry completion zsh)"
    in fish's configuration:  registry completion fish | source
    """
    app = click.get_current_context().find_root().command
    found = get_completion_class(shell)
    assert found is not None
    # Without this, Bash splits lenet5:v3 and lenet5@best into several words.
    if shell == "bash":
        click.echo("COMP_WORDBREAKS=${COMP_WORDBREAKS//[:@]/}")
    click.echo(found(app, ctx_args={}, prog_name="registry", complete_var="_REGISTRY_COMPLETE").source())
