"""The ``surgery`` command. Exit codes: 0 ok, 1 a SurgeryError, 2 usage, 3 a check that failed, 129, 130 and 143 interrupted."""

from __future__ import annotations

import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self, TextIO

import click

from surgery.cli.adapters.export import export
from surgery.cli.adapters.extract import extract
from surgery.cli.adapters.merge import merge
from surgery.cli.adapters.resize import resize
from surgery.cli.check import inspect, verify
from surgery.cli.demo import demo
from surgery.cli.factorize import factorize, plan, recipes
from surgery.cli.fold import fold
from surgery.cli.scales import scales
from surgery.cli.scaling import blend, project
from surgery.cli.study import recommend, spectra
from surgery.cli.text import guarded, tell, tell_error
from surgery.errors import SurgeryError, naming_system_errors
from surgery.escapes import escaped
from surgery.installation import check_installation
from surgery.version import __version__

#: The signals that ask a command to stop. Windows has no SIGHUP.
_STOPPING = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]


class _Stopped(KeyboardInterrupt):
    """A signal that stops a run as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _Signals:
    """Raises ``_Stopped`` at the first signal that asks to stop, and ignores further ones: nothing disturbs the clean-up.

    When a connection is dropped, there are two signals: that of the system, and the one that the shell passes on. Ctrl-C during
    the clean-up prints how to stop at once, and the next Ctrl-C does so. A signal that was ignored at the beginning, as under
    nohup, stays ignored. A context manager, without an effect outside of the main thread.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._under_way: Callable[[], _Stopped | None] = lambda: None
        self._insisted = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._arrived)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._under_way() is None:
            stop = _Stopped(number)
            # The reference lives as long as the exception is under way. If a finalizer swallows it, the next signal counts.
            self._under_way = weakref.ref(stop)
            try:
                raise stop
            finally:
                del stop
        if number == signal.SIGINT:
            if self._insisted:
                os._exit(128 + number)
            self._insisted = True
            with suppress(OSError):  # not through sys.stderr, which the signal may have interrupted in a write
                os.write(2, b"\nStopping. This may take a moment; press Ctrl-C again to stop at once.\n")


def _drop_unwritten(stream: TextIO | None) -> None:
    """Drop output that cannot be written, as to a closed terminal: else Python tries again at its end, and exits with 120."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _hold_standard_streams() -> None:
    """Open the null device for each standard stream that is closed.

    Else the next file that is opened would get its number, and so what libraries print.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


@contextmanager
def _usage_in_one_line() -> Iterator[None]:
    """Turns a click error that quotes unprintable characters of an argument into one in which they are escaped."""
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
        with _Signals():
            try:
                _hold_standard_streams()
                check_installation()
                with _usage_in_one_line(), naming_system_errors():
                    return super().invoke(ctx)
            except BrokenPipeError:  # of whoever reads the output: click knows what to do
                raise
            except KeyboardInterrupt as stop:
                tell("Interrupted.")
                self._end(ctx, 128 + (stop.number if isinstance(stop, _Stopped) else signal.SIGINT))
            except (SurgeryError, OSError) as error:  # OSError: a path that the system refuses before any file is opened
                tell_error(error)
                self._end(ctx, 1)
            finally:
                _drop_unwritten(sys.stderr)

    @staticmethod
    def _end(ctx: click.Context, code: int) -> NoReturn:
        _drop_unwritten(sys.stdout)
        ctx.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="surgery")
def main() -> None:
    """Surgery on model checkpoints: factorize weights by truncated SVD, train only scales, fold them back.

    \b
    surgery factorize MODEL --rank 16              write factors and scales
    surgery fold factorized/ scales.safetensors    fold the trained scales
    """


for _command in (
    blend,
    demo,
    export,
    extract,
    factorize,
    fold,
    inspect,
    merge,
    plan,
    project,
    recipes,
    recommend,
    resize,
    scales,
    spectra,
    verify,
):
    main.add_command(_command)
