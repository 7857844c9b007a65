"""Print docs/cli.md: the help of every command, as a terminal of 100 columns shows it."""

import click
from click.testing import CliRunner

from surgery.cli.main import main

HEAD = """# Command line

Data goes to stdout, everything else to stderr. Progress is shown on a terminal only. Exit codes: 0 all well, 1 an error
with its reason, 2 wrong usage, 3 a check that failed, 130 and 143 interrupted. With `--json`, stdout holds one object with a
`schema_version`: [json.md](json.md) has its entries.

Written by `make docs`; a test holds it to what `--help` prints.
"""


def names() -> list[str]:
    """Of all commands, those of a group after it."""
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
