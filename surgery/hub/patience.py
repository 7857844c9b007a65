"""Retries of requests to the hub: which errors are worth another attempt, how long to wait, and when to give up.

Used for all requests of a run, downloads and uploads alike. The hub's client retries some requests by itself; the requests
of this project are made in ways in which it does not, so that attempts do not multiply.
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

#: Seconds without any success after which we give up.
GIVE_UP_AFTER = 900.0
#: The same for the very first request to a busy hub, when no work can be lost yet; and where a host that the hub redirects
#: us to refuses: its addresses expire, and each attempt gets a new one.
GIVE_UP_FIRST_AFTER = 60.0
#: Seconds before the second attempt, doubled before each further one, and the longest such pause.
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
#: The longest time for which the hub may ask us to wait, in seconds: its rate limits are per hour at most.
LONGEST_ASKED = 3700.0
#: Seconds of waiting after which the user is told by a note.
_WORTH_A_NOTE = 60.0

#: Statuses of a server that is overloaded or being restarted, and of proxies before one (52x).
_TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, *range(520, 531)})
_SECONDS = re.compile(r"\s*([0-9]{1,9})(\.[0-9]*)?\s*")
_LIMIT_REACHED = re.compile(r"r=0;t=([0-9]{1,9})")


class Dropped(Exception):
    """What is waited for is no longer wanted: the ``dropped`` event of a ``Patience`` has been set."""


class Patience:
    """Counts and spaces the attempts at one thing, which may take several requests one after the other.

    Args:
        on_wait: called before each wait, with the reason and length of it in a few words, and whether that is worth a note.
        dropped: set by another thread when the thing is no longer wanted; ends a wait.
        may_pass: whether another attempt after an error may succeed; ``is_transient`` if None.
        give_up_after: seconds without any success after which ``failed`` raises; ``GIVE_UP_AFTER`` if None.
    """

    def __init__(
        self,
        on_wait: Callable[[str, bool], object],
        dropped: threading.Event | None = None,
        may_pass: Callable[[Exception], bool] | None = None,
        give_up_after: float | None = None,
    ) -> None:
        self._on_wait = on_wait
        self._dropped = dropped
        self._may_pass = may_pass or is_transient
        self._give_up_after = GIVE_UP_AFTER if give_up_after is None else give_up_after
        self.succeeded()

    def succeeded(self) -> None:
        """Some data has come: count the attempts from the beginning again."""
        self._attempts = 0
        self._since = 0.0
        self._is_extended = False

    def check_wanted(self) -> None:
        """Raise ``Dropped`` if the ``dropped`` event has been set."""
        if self._dropped is not None and self._dropped.is_set():
            raise Dropped

    def failed(self, error: Exception) -> None:
        """Wait until the next attempt is due, or give up.

        Args:
            error: why the last attempt failed.

        Raises:
            Exception: ``error`` itself, if no further attempt is worth it, with a note of how long it has been tried.
            Dropped: it is no longer wanted, or not any more after the wait.
        """
        self.check_wanted()
        if not self._may_pass(error) or getattr(error, "__notes__", None):  # given up already
            raise error
        now = _now()
        self._since = now if self._attempts == 0 else self._since
        self._attempts += 1
        # Jitter, so that not all clients of a server that failed come back at the same moment.
        pause = min(FIRST_PAUSE * 2 ** min(self._attempts - 1, 30), LONGEST_PAUSE) * random.uniform(0.75, 1.25)
        asked = asked_for(error)
        if asked is not None:
            pause = max(pause, asked)
        # Where a redirect is refused, a new address may help, but hardly a long wait.
        give_up_after = min(self._give_up_after, GIVE_UP_FIRST_AFTER) if is_refused_elsewhere(error) else self._give_up_after
        if now + pause > self._since + give_up_after:
            # One pause beyond the limit is allowed if the hub itself asks for it.
            if asked is None or self._is_extended or asked > LONGEST_ASKED:
                raise self._given_up(error, now - self._since, asked)
            self._is_extended = True
        until = now + pause - self._since
        self._on_wait(f"{_reason(error)}; attempt {self._attempts + 1} in {_duration(pause)}", until >= _WORTH_A_NOTE)
        if _wait(pause, self._dropped):
            raise Dropped from error

    def run(self, call: Callable[[], _T]) -> _T:
        """Call until it succeeds; returns its result. Raises what ``failed`` raises."""
        while True:
            self.check_wanted()
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
    """Whether another attempt may succeed, since the hub is busy or gone for a while, or the connection to it broke."""
    if isinstance(error, client.OfflineModeIsEnabled):
        return False
    # The client wraps errors of uploads and downloads, and tries to parse an error page as JSON.
    if isinstance(error, (RuntimeError, client.LocalEntryNotFoundError)) and isinstance(error.__cause__, Exception):
        return is_transient(error.__cause__)
    if isinstance(error, client.HfHubHTTPError):
        return error.response.status_code in _TRANSIENT_STATUSES or is_refused_elsewhere(error)
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
    """Whether a host that the hub has redirected us to refuses what the hub grants: its address may have expired."""
    if not isinstance(error, client.HfHubHTTPError) or error.response.status_code in _TRANSIENT_STATUSES:
        return False
    return client.is_elsewhere(error)


def is_busy(error: Exception) -> bool:
    """Whether a server has answered and may do better in a while; not so for a dead network or a captive portal's page."""
    answers = (client.HfHubHTTPError, client.http.ReadError, client.http.RemoteProtocolError, client.Incomplete)
    return is_transient(error) and isinstance(error, answers)


def asked_for(error: Exception) -> float | None:
    """The seconds that the hub asks us to wait, by ``Retry-After`` or ``RateLimit``; None if it does not, or unreadably."""
    if not isinstance(error, client.HfHubHTTPError):
        return None
    headers: Mapping[str, str] = error.response.headers
    wanted = headers.get("Retry-After", "")
    if match := _SECONDS.fullmatch(wanted):
        return float(match[1])
    if (until := _date(wanted)) is not None:
        # Measured by the server's clock, if it tells the time.
        told = _date(headers.get("Date", ""))
        return max(0.0, until - (time.time() if told is None else told))
    reached = _LIMIT_REACHED.search(headers.get("RateLimit", ""))
    return float(reached[1]) if reached else None


def _date(text: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _reason(error: Exception) -> str:
    """Why an attempt failed, in a few words."""
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
    """Wait so many seconds, or until ``dropped`` is set; returns whether it is. Ctrl-C ends the wait at once."""
    if dropped is not None:
        return dropped.wait(seconds)
    time.sleep(seconds)
    return False
