"""Whether another attempt at something asked of the hub may succeed, how long to wait before it, and when to give up.

Of all requests of a run, downloads and uploads alike. The hub's client tries some requests several times by itself; those
that are made here are made in ways in which it does not, so that attempts do not multiply.
"""

from __future__ import annotations

import email.utils
import json
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from surgery.errors import SurgeryError
from surgery.hub import hub_client as client

_T = TypeVar("_T")

#: Seconds without any success after which a request is given up.
GIVE_UP_AFTER = 900.0
#: The same of the first question to the hub, which answers and cannot say: nothing is lost by then. And of a place that the
#: hub sends us to, which refuses: its addresses are good for a while, and each attempt gets a new one.
GIVE_UP_FIRST_AFTER = 60.0
#: Seconds before the second attempt, twice as many before each further one, and the most.
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
#: Seconds that the hub may ask to be left alone for: its limits are those of an hour at most.
LONGEST_ASKED = 3700.0
#: Seconds of waiting after which it is worth a note.
_WORTH_A_NOTE = 60.0

#: What a server answers that has too much to do, or is being restarted; with those that stand between it and us (52x).
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, *range(520, 531)})
_SECONDS = re.compile(r"\s*([0-9]{1,9})(\.[0-9]*)?\s*")
_LIMIT_REACHED = re.compile(r"r=0;t=([0-9]{1,9})")


class Dropped(Exception):
    """Nobody wants any more what is waited for."""


class Patience:
    """What is known of the attempts at one thing, which may be several requests one after the other.

    Args:
        tell: told why and how long it waits, in a few words, and whether that is worth a note.
        dropped: ends a wait when it is set.
        may_pass: of which errors another attempt may be without; see ``is_transient``.
        give_up_after: seconds without any success.
    """

    def __init__(
        self,
        tell: Callable[[str, bool], object],
        dropped: threading.Event | None = None,
        may_pass: Callable[[Exception], bool] | None = None,
        give_up_after: float | None = None,
    ) -> None:
        self._tell = tell
        self._dropped = dropped
        self._may_pass = may_pass or is_transient
        self._give_up_after = GIVE_UP_AFTER if give_up_after is None else give_up_after
        self.succeeded()

    def succeeded(self) -> None:
        """Something has come: of what fails from now on no attempt has failed yet."""
        self._attempts = 0
        self._since = 0.0
        self._is_extended = False

    def go_on(self) -> None:
        """Raises ``Dropped`` if nobody wants it any more."""
        if self._dropped is not None and self._dropped.is_set():
            raise Dropped

    def failed(self, error: Exception) -> None:
        """Wait until the next attempt is due.

        Raises:
            Exception: the error itself, if no further attempt is worth it, with a note of how long it has been tried.
            Dropped: meanwhile, or before, nobody wants it any more.
        """
        self.go_on()
        if not self._may_pass(error) or getattr(error, "__notes__", None):  # given up already
            raise error
        now = _now()
        self._since = now if self._attempts == 0 else self._since
        self._attempts += 1
        # Not all of those that a failing server has sent away come back at once.
        pause = min(FIRST_PAUSE * 2 ** min(self._attempts - 1, 30), LONGEST_PAUSE) * random.uniform(0.75, 1.25)
        asked = asked_for(error)
        if asked is not None:
            pause = max(pause, asked)
        # Of a place that the hub sends us to a new address may help, and hardly a long wait.
        give_up_after = min(self._give_up_after, GIVE_UP_FIRST_AFTER) if is_refused_elsewhere(error) else self._give_up_after
        if now + pause > self._since + give_up_after:
            # One long pause is waited out if the hub itself says that it is enough.
            if asked is None or self._is_extended or asked > LONGEST_ASKED:
                raise self._given_up(error, now - self._since, asked)
            self._is_extended = True
        until = now + pause - self._since
        self._tell(f"{_said(error)}; attempt {self._attempts + 1} in {_duration(pause)}", until >= _WORTH_A_NOTE)
        if _wait(pause, self._dropped):
            raise Dropped from error

    def run(self, call: Callable[[], _T]) -> _T:
        """What a call returns, at whatever attempt. Raises what ``failed`` does."""
        while True:
            self.go_on()
            try:
                result = call()
            except Exception as error:
                self.failed(error)
            else:
                self.succeeded()
                return result

    def _given_up(self, error: Exception, tried: float, asked: float | None) -> Exception:
        if asked is not None and asked > LONGEST_ASKED:
            error.__notes__ = [f"the hub asks to come back in {_duration(asked)}"]
        elif self._attempts > 1:
            error.__notes__ = [f"tried {self._attempts} times in {_duration(tried)}"]
        return error


def is_transient(error: Exception) -> bool:
    """Whether another attempt may succeed: the hub is busy or gone for a while, or the way to it is."""
    if isinstance(error, client.OfflineModeIsEnabled):
        return False
    # The client wraps what fails in an upload or a download, and takes an error's page for JSON.
    if isinstance(error, (RuntimeError, client.LocalEntryNotFoundError)) and isinstance(error.__cause__, Exception):
        return is_transient(error.__cause__)
    if isinstance(error, client.HfHubHTTPError):
        return error.response.status_code in _PASSING or is_refused_elsewhere(error)
    if isinstance(error, (client.http.UnsupportedProtocol, client.http.LocalProtocolError)):
        return False
    return isinstance(
        error,
        (
            client.TransportError,
            client.http.DecodingError,
            client.XetDownloadError,
            client.Incomplete,
            client.NoHub,
            ConnectionError,
            TimeoutError,
            RuntimeError,
            json.JSONDecodeError,
        ),
    )


def is_refused_elsewhere(error: Exception) -> bool:
    """Whether a place that the hub has sent us to refuses what the hub itself grants: its address may have been too old."""
    if not isinstance(error, client.HfHubHTTPError) or error.response.status_code in _PASSING:
        return False
    return client.is_elsewhere(error)


def is_busy(error: Exception) -> bool:
    """Whether something has answered that may have something better to say in a while: no dead network, no portal's page."""
    answers = (client.HfHubHTTPError, client.http.ReadError, client.http.RemoteProtocolError, client.Incomplete)
    return is_transient(error) and isinstance(error, answers)


def asked_for(error: Exception) -> float | None:
    """The seconds for which the hub asks to be left alone; None if it does not, or in words that nobody knows."""
    if not isinstance(error, client.HfHubHTTPError):
        return None
    headers: Mapping[str, str] = error.response.headers
    wanted = headers.get("Retry-After", "")
    if match := _SECONDS.fullmatch(wanted):
        return float(match[1])
    if (until := _date(wanted)) is not None:
        # By the clock of whoever says it, if it tells the time.
        told = _date(headers.get("Date", ""))
        return max(0.0, until - (time.time() if told is None else told))
    reached = _LIMIT_REACHED.search(headers.get("RateLimit", ""))
    return float(reached[1]) if reached else None


def _date(text: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _said(error: Exception) -> str:
    if isinstance(error, client.HfHubHTTPError):
        return f"the hub answers {error.response.status_code}"
    if isinstance(error, (client.http.TimeoutException, TimeoutError)):
        return "the hub does not answer"
    if isinstance(error, SurgeryError):
        return error.what
    return f"the hub cannot be reached ({type(error).__name__})"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _now() -> float:
    return time.monotonic()


def _wait(seconds: float, dropped: threading.Event | None) -> bool:
    """Whether nobody wants it any more. Ctrl-C ends it at once."""
    if dropped is not None:
        return dropped.wait(seconds)
    time.sleep(seconds)
    return False
