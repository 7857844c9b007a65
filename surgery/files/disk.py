"""Writing to disk in the background: a thread writes what has been handed over while the caller makes more."""

from __future__ import annotations

import errno
import mmap
import os
import queue
import sys
import threading
from typing import IO

import numpy as np

#: Bytes written to the disk at a time, and how many such chunks there are: one is filled while the other is written.
_CHUNK_BYTES = 2 << 20
_CHUNKS = 2
STREAM_MEMORY = _CHUNKS * _CHUNK_BYTES
#: With ``O_DIRECT`` the position and length of a write must be multiples of this, in bytes, on any disk.
_PAGE = 4096
#: Bytes after which a file is synced.
_SYNC_BYTES = 32 << 20


class DiskStream:
    """Appends to an unbuffered file in a background thread, from the file's current position.

    Writes bypass the system's page cache where the file system allows it (``O_DIRECT``). Through the cache, gigabytes would
    wait in memory until the file is synced, they would evict everything else from it, and a core would be busy moving
    pages: measured, up to two seconds for a gigabyte, where these writes take a tenth of a second.

    Args:
        file: unbuffered, open for writing.
        read_soon: whether the file will be read right after it is written; then it goes through the cache.
    """

    def __init__(self, file: IO[bytes], *, read_soon: bool) -> None:
        self._file = file
        self._past_cache: bool | None = False if read_soon else None  # None: not known yet whether it is possible
        self._chunk: mmap.mmap | None = None  # the one being filled
        self._filled = 0
        self._made = 0
        self._unsynced = 0
        self._free: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[mmap.mmap | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._ended = False

    def write(self, view: memoryview) -> None:
        """Copy the bytes of ``view``, to be written in the background.

        Raises:
            OSError: this write or an earlier one failed.
            ValueError: after ``finish`` or ``stop``.
        """
        if self._ended:
            raise ValueError("the file has been finished")
        done = 0
        while done < len(view):
            if self._chunk is None:
                self._chunk = self._empty_chunk()
            taken = min(len(view) - done, _CHUNK_BYTES - self._filled)
            # NumPy releases the GIL while it copies.
            room = np.frombuffer(self._chunk, np.uint8, taken, self._filled)
            np.copyto(room, np.frombuffer(view, np.uint8, taken, done))
            self._filled += taken
            done += taken
            if self._filled == _CHUNK_BYTES:
                self._hand_over(self._chunk)

    def finish(self) -> None:
        """Write the rest. The caller has to sync the file: some of it may still be in the system's cache.

        Raises:
            OSError: this write or an earlier one failed.
        """
        self.stop()
        self._check()
        if self._past_cache:
            self._past_cache = _pass_cache(self._file, False)
        if self._chunk is not None:
            write_all(self._file, memoryview(self._chunk)[: self._filled])
            self._chunk = None

    def stop(self) -> None:
        """Accept no more bytes, and wait until full chunks that were handed over have been written."""
        self._ended = True
        if self._thread is not None:
            self._full.put(None)
            if self._thread.ident is not None:  # None where it could not be started
                self._thread.join()
            self._thread = None

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _empty_chunk(self) -> mmap.mmap:
        """A chunk to fill; waits for one that is being written if all are in use. Raises OSError."""
        self._check()
        if self._made < _CHUNKS:
            chunk = mmap.mmap(-1, _CHUNK_BYTES)  # whose memory begins at a page
            self._made += 1
            return chunk
        chunk = self._free.get()
        if self._error is not None:
            self._free.put(chunk)
            raise self._error
        return chunk

    def _hand_over(self, chunk: mmap.mmap) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="surgery-disk", daemon=True)
            self._thread.start()
        self._full.put(chunk)
        self._chunk, self._filled = None, 0

    def _run(self) -> None:
        while (chunk := self._full.get()) is not None:
            try:
                if self._error is None:
                    self._write_chunk(memoryview(chunk))
            except BaseException as error:  # raised at the caller's next write; the system reports it only once
                self._error = error
            self._free.put(chunk)

    def _write_chunk(self, view: memoryview) -> None:
        """Write a full chunk, past the cache if that is possible, and sync the file from time to time."""
        if self._past_cache is None:
            self._past_cache = self._file.tell() % _PAGE == 0 and _pass_cache(self._file, True)
        done = 0
        while self._past_cache and done < len(view):
            try:
                done += self._file.write(view[done:])
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # This file system accepts the flag, but refuses these writes.
                self._past_cache = _pass_cache(self._file, False)
            if done % _PAGE:
                self._past_cache = _pass_cache(self._file, False)
        write_all(self._file, view[done:])
        # Synced even with O_DIRECT: some file systems accept the flag and use the cache all the same.
        self._unsynced += len(view)
        if self._unsynced >= _SYNC_BYTES:
            os.fsync(self._file.fileno())
            self._unsynced = 0


def write_all(file: IO[bytes], view: memoryview) -> None:
    """Write all of ``view`` to an unbuffered file, whose ``write`` may take only a part of it."""
    done = 0
    while done < len(view):
        done += file.write(view[done:])


def _pass_cache(file: IO[bytes], wanted: bool) -> bool:
    """Switch ``O_DIRECT`` on or off for a file. Returns whether its writes bypass the system's cache now."""
    if sys.platform != "linux":
        return False
    import fcntl

    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
    except OSError:  # this file system cannot
        return False
    return wanted
