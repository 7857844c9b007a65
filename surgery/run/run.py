"""``Run``: one start of a command that writes a folder, with its engine, lock, journal, upload and result folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from surgery.engine.resources import Memory
from surgery.files.file_records import FileRecord
from surgery.names import MANIFEST_FILE, RESULT_DIR
from surgery.progress import note
from surgery.publish.results import submit_files, uploading
from surgery.run.disk_room import Fetching, download_needs
from surgery.run.engines import Engine, EngineOptions, ShardJobs, engine_of
from surgery.run.journal import Journal
from surgery.run.lock import locked
from surgery.run.result_folder import ResultFiles, files_together, result_folder
from surgery.run.resume import RecordedJobs, shard_results

if TYPE_CHECKING:
    from surgery.publish.upload import Upload

_Result = TypeVar("_Result")


class WritingJobs(ShardJobs[_Result], RecordedJobs[_Result], Protocol[_Result]):
    """The jobs of a run that write its result, shard by shard."""

    def files_of(self, result: _Result) -> Sequence[FileRecord]:
        """The files that were written for a shard, relative to the folder that is written to."""


class Run:
    """One start of a command that writes a folder. A context manager, to be entered before planning.

    A command opens what it reads, plans, and then takes what it needs in this order::

        with Run(out) as run:
            run.start_engine(EngineOptions(...))            # from here on run.engine.resources are known
            with run.uploading(repo_id, private=True), run.locked(inputs):
                run.identify({...})                         # from here on an interrupted run tells how to go on
                with run.result(files, sources, overwrite=False) as place:
                    results = run.shards(jobs, memory)      # what an earlier start has finished is not done again
                    ...                                     # the files that come last, and publishing

    If it is interrupted (KeyboardInterrupt) and can be continued, a note says how.

    Args:
        out: the output folder.

    Attributes:
        engine: what does the jobs; set by ``start_engine``.
        upload: of the result; None before ``uploading``, and if the result is not uploaded.
        journal: of the run; None before ``identify``.
        place: the folder that is written to, ``out`` or one inside of it; set by ``result`` and ``files_together``.
    """

    engine: Engine
    place: Path

    def __init__(self, out: Path) -> None:
        self.out = out
        self.upload: Upload | None = None
        self.journal: Journal | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.push(self._note_if_interrupted)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def start_engine(self, options: EngineOptions) -> Engine:
        """Start the engine that does the jobs, until the end of the run.

        Raises:
            OptionError, MissingExtra, ClusterError: see ``engine_of``.
        """
        self.engine = self._stack.enter_context(engine_of(options))
        return self.engine

    @contextmanager
    def uploading(self, repo_id: str | None, *, private: bool) -> Iterator[None]:
        """Open the repository that the result is uploaded to; None for no upload.

        Raises:
            OutputError: see ``surgery.publish.upload.Upload.open``, and if the upload fails.
        """
        with uploading(repo_id, private=private) as self.upload:
            yield

    @contextmanager
    def locked(self, inputs: Iterable[Path]) -> Iterator[None]:
        """Lock the output folder against other runs.

        Args:
            inputs: folders and files that are read, which the output must be apart from.

        Raises:
            OutputError: see ``surgery.run.lock.locked``.
        """
        with locked(self.out, inputs):
            yield

    def identify(self, identity: Mapping[str, Any]) -> None:
        """Say which run it is, so that it goes on with an unfinished one of the same identity.

        Args:
            identity: all that the bytes of the result depend on, as JSON.
        """
        self.journal = Journal(self.out, identity)

    @contextmanager
    def result(self, files: ResultFiles, sources: Iterable[Fetching], *, overwrite: bool) -> Iterator[Path]:
        """The folder to write the result to. When the context is left without an error, the result takes its place.

        Args:
            files: what will be written.
            sources: models that are fetched meanwhile, perhaps to the same disk.
            overwrite: whether an earlier result may be replaced.

        Raises:
            OutputError: see ``surgery.run.result_folder.result_folder``.
        """
        assert self.journal is not None
        with result_folder(self.out, self.journal, files, download_needs(*sources), overwrite=overwrite) as self.place:
            yield self.place

    @contextmanager
    def files_together(self, names: Iterable[str], *, overwrite: bool) -> Iterator[Path]:
        """The folder to write a few files to, which take their places in ``out`` together when the context is left.

        Raises:
            OutputError: see ``surgery.run.result_folder.files_together``.
        """
        assert self.journal is not None
        with files_together(self.out, self.journal, names, overwrite=overwrite) as self.place:
            yield self.place

    def shards(self, jobs: WritingJobs[_Result], memory: Memory, *, note_resumed: bool = True) -> list[_Result]:
        """The results of all shards, by index, from the journal or from the engine. Finished files are uploaded meanwhile.

        Args:
            jobs: of the run.
            memory: how many matrices may be worked on at a time, and in how much memory.
            note_resumed: whether to tell a note of how many shards an earlier start has finished.
        """
        return shard_results(
            jobs,
            lambda missing: self.engine.run(jobs, missing, memory),
            self.journal,
            lambda result: submit_files(self.upload, self.place, jobs.files_of(result)),
            note_resumed=note_resumed,
        )

    def forget(self) -> None:
        """Remove an unfinished run from the journal, as the result is complete already."""
        Journal.forget(self.out)

    def _note_if_interrupted(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, KeyboardInterrupt):
            return
        # With its manifest in place the result is whole, and the same command would only remove the journal.
        is_whole = (self.out / MANIFEST_FILE).is_file() and not (self.out / RESULT_DIR).is_dir()
        if Journal.is_there(self.out) and not is_whole:
            done = Journal.count(self.out)
            after = f"after {done} shard{'' if done == 1 else 's'}"
            if self.journal is not None and self.journal.matches():
                note(f"stopped {after}; the same command continues from there")
            else:
                note(f"{self.out} holds a run that was stopped {after}; the command that started it continues from there")
        elif self.upload is not None and self.upload.unfinished:
            note(f"stopped before the upload to {self.upload.repo_id} was complete; the same command continues from there")
