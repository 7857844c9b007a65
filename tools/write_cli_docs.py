"""Print docs/cli.md: the help of every command, as a terminal of 100 columns shows it."""

import click
from click.testing import CliRunner

from surgery.cli.main import main

HEAD = """# Command line

Data goes to stdout, everything else to stderr. Exit codes: 0 all well, 1 an error with its reason, 2 wrong usage, 3 a check
that failed, 129, 130 and 143 interrupted. With `--json`, stdout holds one object with a `schema_version`: [json.md](json.md)
has its entries.

Written by `make docs`; a test holds it to what `--help` prints.

## Progress and width

On a terminal progress is a bar. Elsewhere, as in the log of a job, it is a line on stderr at each tenth, or each minute if
that is sooner; nothing is said of what is over within seconds. `-q` silences both. `TERM=dumb` counts as no terminal.

```text
factorizing: 40%, 6.4 GB of 16.1 GB, 85.2 MB/s, 2 min left, model.layers.12.mlp.gate_proj.weight
```

Tables and closing lines fit the terminal: names are shortened in the middle, and where that would not do, a row takes several
lines. Paths and commands are never broken, and names are never shortened where stdout is no terminal. `COLUMNS` sets the width
in either case.

## Shell completion

Commands, options and paths, in about a tenth of a second. For bash (4.4 or newer), in `~/.bashrc`:

```sh
eval "$(_SURGERY_COMPLETE=bash_source surgery)"
```

For zsh, in `~/.zshrc`, after `compinit`:

```sh
eval "$(_SURGERY_COMPLETE=zsh_source surgery)"
```

For fish:

```sh
_SURGERY_COMPLETE=fish_source surgery > ~/.config/fish/completions/surgery.fish
```
"""


def names() -> list[str]:
    """The names of all commands, such as ``scales`` and ``scales show``; those in a group come after the group."""
    found = []
    for name, command in sorted(main.commands.items()):
        found.append(name)
        if isinstance(command, click.Group):
            found += [f"{name} {inner}" for inner in sorted(command.commands)]
    return found


def page() -> str:
    parts = [HEAD]
    for name in names():
        shown = CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=100, prog_name="surgery").stdout.strip()
        parts.append(f"## surgery {name}\n\n```text\n{shown}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
