"""The folder that a fold or a merge writes: a model, of updated weights and of the files that go along with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from surgery.engine.resources import Memory
from surgery.errors import OTHER_OUT, OVERWRITE, OutputError, SurgeryError
from surgery.files.access import all_below
from surgery.files.file_records import RESTORE_HINT, FileRecord, check_file
from surgery.files.file_writer import copy_file, write_file
from surgery.names import CONFIG_FILE
from surgery.progress import listening, phase
from surgery.run.contents import files_in, is_as_recorded, loading_order, not_as_recorded
from surgery.run.journal import Journal
from surgery.run.result_folder import ResultFiles
from surgery.run.resume import shard_results
from surgery.run.run import Run, WritingJobs
from surgery.source.folder import FolderSource
from surgery.source.weight_files import is_index
from surgery.weights.checkpoint import SourceShard
from surgery.weights.quantized import index_of

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class FileAlong:
    """A file that goes along with the weights, such as config and tokenizer.

    Attributes:
        record: its name, size and hash.
        path: where it is taken from.
    """

    record: FileRecord
    path: Path


@dataclass(frozen=True, slots=True)
class WrittenModel:
    """A model that is written, shard by shard. It keeps no record of how it was made.

    Attributes:
        out: the output folder.
        shards: the weight files of the source, under whose names the new ones are written.
        others: the files that go along.
        config: makes the contents of the new ``config.json`` from the old file, where weights are stored in another way than
            in the source; None where all are stored as before, so that config and index stay.
    """

    out: Path
    shards: Sequence[SourceShard]
    others: Sequence[FileAlong]
    config: Callable[[Path], bytes] | None

    def files(self) -> ResultFiles:
        """All files that will be written, their size, and the files of a model that is in the output folder already."""
        others = [other.record for other in self.others]
        # Stored in another way, FP8 weights take twice as much, in bfloat16.
        size = sum(shard.size for shard in self.shards) * (1 if self.config is None else 2) + sum(one.size for one in others)
        names = [*(shard.file for shard in self.shards), *(one.file for one in others)]
        return ResultFiles(frozenset(names), size, _model_in(self.out))

    def looks_finished(self) -> bool:
        """Whether the output folder may hold the complete result: its files, no others, and weights of the right sizes.

        Stored in another way, the weights have sizes that are not known here, and a weight file may be gone.
        """
        if Journal.is_there(self.out) or any(path.is_symlink() for path in all_below(self.out)):
            return False
        others, there = {other.record.file for other in self.others}, files_in(self.out)
        expected = others | {shard.file for shard in self.shards}
        if self.config is not None:
            return others < there <= expected
        return there == expected and all((self.out / shard.file).stat().st_size == shard.size for shard in self.shards)

    def compared(self, run: Run, jobs: WritingJobs[_Result], memory: Memory) -> list[_Result]:
        """Check that the output folder holds this very result, by making it again without writing.

        Args:
            run: whose engine makes it.
            jobs: that compare only.
            memory: see ``Run.shards``.

        Returns:
            The results of all shards.

        Raises:
            OutputError: what is there is another result, or something else.
        """
        progress = listening()
        with phase(progress, "comparing", sum(shard.size for shard in self.shards)):
            results = shard_results(jobs, lambda which: run.engine.run(jobs, which, memory), None)
        written = [record for result in results for record in jobs.files_of(result)]
        rewritten = {other: data for other in self.others if (data := self._rewritten(other, self.out)) is not None}
        as_they_are = [other.record for other in self.others if other not in rewritten]
        if not_as_recorded(self.out, (*written, *as_they_are)) or any(
            (self.out / other.record.file).read_bytes() != data for other, data in rewritten.items()
        ):
            raise OutputError(
                f"{self.out} holds files already, and they are not those of this run",
                hint=f"{OVERWRITE} replaces an earlier result; {OTHER_OUT} folder",
            )
        progress.note(f"{self.out} is already complete: nothing to do")
        return results

    def copy_others(self, place: Path) -> None:
        """Copy the files that go along, ``config.json`` last; config and index are adapted to weights stored in another way.

        Files that an earlier start has put in place are not written again, as ``config.json`` says that the result is whole.

        Args:
            place: the folder that is written to. The weight files are there.

        Raises:
            FormatError: a file is not the one that was recorded.
        """
        progress = listening()
        by_name = {other.record.file: other for other in self.others}
        with phase(progress, "copying"):
            for name in loading_order(by_name):
                progress.item(name)
                record, path = by_name[name].record, by_name[name].path
                if (data := self._rewritten(by_name[name], place)) is not None:
                    if not (place / name).is_file() or (place / name).read_bytes() != data:
                        write_file(place / name, data)
                elif not is_as_recorded(place, record):
                    copy_file(path, place / name, name, record)

    def _rewritten(self, other: FileAlong, place: Path) -> bytes | None:
        """The contents of config or index for weights that are stored in another way; None for a file that is copied.

        Args:
            place: the folder that has the weight files.
        """
        record, path = other.record, other.path
        if self.config is None or not (record.file == CONFIG_FILE or is_index(record.file)):
            return None
        check_file(path.parent, FileRecord(path.name, record.size, record.sha256), RESTORE_HINT)
        return index_of(place, path) if is_index(record.file) else self.config(path)


def _model_in(out: Path) -> frozenset[str]:
    """The files of a model in the output folder; empty if there is none. It may be an earlier one, which has no manifest."""
    try:
        selection = FolderSource(out).selection
    except SurgeryError as error:
        if isinstance(error.__cause__, OSError):  # it cannot be read, so nothing is known of its contents
            raise
        return frozenset()
    if CONFIG_FILE not in selection.others:
        return frozenset()
    return frozenset((*selection.shards, *selection.others))
