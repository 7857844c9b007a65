"""The ``surgery`` command. Exit codes: 0 ok, 1 a SurgeryError, 2 usage, 3 a check that failed, 130 and 143 interrupted."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from surgery.cli.check import inspect, verify
from surgery.cli.demo import demo
from surgery.cli.factorize import factorize, plan, recipes
from surgery.cli.fold import export, fold
from surgery.cli.scaling import blend, project, scales
from surgery.cli.study import recommend, spectra
from surgery.cli.text import guarded, tell, tell_error
from surgery.errors import SurgeryError, naming_system_errors
from surgery.escapes import escaped
from surgery.installation import check_installation
from surgery.version import __version__


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a run as Ctrl-C does."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _hold_standard_streams() -> None:
    """Where one is closed, the next file that is opened would take its place, and get what libraries print."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


@contextmanager
def _usage_in_one_line() -> Iterator[None]:
    """What click says of an argument that it does not take names it as it is."""
    try:
        yield
    except click.UsageError as error:
        text = error.format_message()
        if text.isprintable() or (error.ctx is not None and text == error.ctx.get_help()):
            raise
        raise click.UsageError(escaped(text), error.ctx) from None


class _Group(click.Group):
    """Turns a SurgeryError into a message and exit code 1; anything unforeseen keeps its traceback.

    Whatever is written meanwhile is made safe for a terminal.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        with guarded():
            return super().main(*args, **options)

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _usage_in_one_line():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, _terminate) if main_thread else None
        try:
            _hold_standard_streams()
            check_installation()
            with _usage_in_one_line(), naming_system_errors():
                return super().invoke(ctx)
        except BrokenPipeError:  # of whoever reads the output: click knows what to do
            raise
        except KeyboardInterrupt as stop:
            tell("Interrupted.")
            ctx.exit(143 if isinstance(stop, _Terminated) else 130)
        except SurgeryError as error:
            tell_error(error)
            ctx.exit(1)
        except OSError as error:  # of a path that the system will not even look at
            tell_error(error)
            ctx.exit(1)
        finally:
            if main_thread:
                signal.signal(signal.SIGTERM, before)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="surgery")
def main() -> None:
    """Surgery on model checkpoints: factorize weights by truncated SVD, train only scales, fold them back.

    \b
    surgery factorize MODEL --rank 16              write MODEL's factorized form and a tiny file of scales
    surgery fold factorized/ scales.safetensors    fold trained scales back into dense weights
    """


for _command in (blend, demo, export, factorize, fold, inspect, plan, project, recipes, recommend, scales, spectra, verify):
    main.add_command(_command)
