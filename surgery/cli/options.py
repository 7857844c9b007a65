"""Options that several commands have in common. No torch here: --help must not wait for it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from surgery.cli.report import say
from surgery.errors import SurgeryWarning

quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress, no notes; errors only.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of text.")
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an earlier result in the output folder.")
overlay_base_option = click.option(
    "--base", metavar="MODEL", help="For an overlay: the model it was made from, if not the one the manifest names."
)


def notes_and_quiet(command: Callable[..., None]) -> Callable[..., None]:
    """Show the library's warnings as notes, in one line each; with --quiet neither them nor the hub client's bars."""

    @wraps(command)
    def wrapper(*args: Any, quiet: bool, **kwargs: Any) -> None:
        if quiet:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read by the hub client when it is imported
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SurgeryWarning)
            try:
                command(*args, quiet=quiet, **kwargs)
            finally:
                for message in dict.fromkeys(str(warning.message) for warning in caught):
                    say(f"note: {message}", quiet=quiet)

    return wrapper
