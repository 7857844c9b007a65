"""A factorization as a whole: its identity, whether a folder holds its complete result already, and its last files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.errors import OTHER_OUT, OVERWRITE, OutputError, few
from surgery.escapes import quoted
from surgery.files.access import read_errors
from surgery.files.file_records import file_sha256
from surgery.files.file_writer import copy_file
from surgery.format.manifest import Manifest, ShardResult, fingerprint_of, source_stamp
from surgery.format.manifest_records import LeftOutRecord, SkippedRecord, TargetRecord
from surgery.format.options import Options
from surgery.format.scales.reading import read_trained, train_in
from surgery.format.scales.writing import distance, write_untouched
from surgery.format.views import View
from surgery.names import FORMAT_VERSION, MANIFEST_FILE, SCALES_FILE, TRAINED, factors_file
from surgery.planning.plan import Plan
from surgery.planning.targets import Target
from surgery.progress import listening, note, phase
from surgery.run.contents import loading_order, not_as_recorded
from surgery.run.journal import differing
from surgery.run.result_folder import ResultFiles
from surgery.source.protocol import Source
from surgery.version import __version__


@dataclass(frozen=True, slots=True)
class Factorization:
    """What is factorized, and how.

    Attributes:
        source: the model.
        plan: what is done with each of its weight files.
        options: as the manifest records them, with the name of the recipe that applies.
        device: what the linear algebra runs on, as the manifest records it.
    """

    source: Source
    plan: Plan
    options: Options
    device: str

    def identity(self) -> dict[str, Any]:
        """All that the bytes of the result depend on, as JSON."""
        chosen = [
            [*target_identity(t.key, t.shape, t.view), t.rank, t.energy, [alias.tensor for alias in t.aliases]]
            for t in self.plan.targets
        ]
        return {
            "command": "factorize",
            "format_version": FORMAT_VERSION,
            "tool": f"surgery {__version__}",
            "torch": torch.__version__,
            "device": self.device,
            "window_bytes": self.plan.memory.window_bytes,
            "layout": self.plan.layout,
            "options": asdict(self.options),
            "targets": hashlib.sha256(json.dumps(chosen).encode()).hexdigest(),
            "source": {**asdict(self.source.record), "files": self.source.stamps()},
        }

    def files(self) -> ResultFiles:
        """All files that will be written, and their size."""
        plan = self.plan
        names = {MANIFEST_FILE, SCALES_FILE, *self.source.selection.others}
        for index, shard in enumerate(plan.shards):
            if shard.targets:
                names.add(factors_file(index, len(plan.shards)))
            if plan.layout == "residual":
                names.add(shard.file)
        return ResultFiles(frozenset(names), plan.bytes_written)

    def complete_in(self, out: Path) -> Manifest:
        """Check that a folder holds the complete result of this very factorization, and return its manifest.

        Args:
            out: a folder with a manifest.

        Raises:
            OutputError: it holds the result of another factorization, and the message says what differs; or files of it are
                missing or have changed.
            FormatError, ReadError: the manifest is damaged, or a file of the model cannot be read.

        Warns:
            SurgeryWarning, or a note where somebody listens: an untouched trainable file of the other kind is written again.
        """
        manifest = Manifest.read(out)
        if differences := self._differences(manifest):
            raise OutputError(
                f"{out} holds the complete result of another run",
                got=few(differences, between="; "),
                hint=f"{OVERWRITE} replaces it; {OTHER_OUT} folder",
            )
        lost = not_as_recorded(out, manifest.output_files())
        if lost or not (out / SCALES_FILE).is_file():
            lost = lost or [SCALES_FILE]
            raise OutputError(
                f"{out} holds a complete result, but some of its files are missing or have changed since",
                got=few(lost),
                hint=f"{OVERWRITE} makes it again",
            )
        self._change_untouched(out / SCALES_FILE, manifest)
        return manifest

    def _change_untouched(self, path: Path, manifest: Manifest) -> None:
        """Write an untouched file of scales again as one of cores, or the other way round, if that is what is asked for.

        Raises:
            OutputError: it has been trained.
        """
        train, there = self.plan.train, train_in(path, manifest)
        if there in (None, train):
            return
        trained = read_trained(path, manifest)
        if trained.beside or any(bool(distance(value, trained.train).any()) for value in trained.values.values()):
            raise OutputError(
                f"{path} holds {TRAINED[trained.train]} that have been trained, and {TRAINED[train]} are asked for",
                hint=f"surgery scales new {quoted(path.parent.parent)} --train {train} -o FILE writes untouched "
                f"{TRAINED[train]} of the same factors beside them; --train {trained.train} leaves them as they are",
            )
        write_untouched(path, manifest.targets, manifest.fingerprint, train)
        note(f"{path} was untouched, and now holds untouched {TRAINED[train]}")

    def _differences(self, manifest: Manifest) -> list[str]:
        """What differs between this factorization and a complete result, in words; empty if nothing does.

        If nothing else differs, all files of a local model are hashed and compared.
        """
        source, plan = self.source, self.plan
        then = {"layout": manifest.layout, "options": asdict(manifest.options), "source": asdict(manifest.source)}
        now = {"layout": plan.layout, "options": asdict(self.options), "source": asdict(source.record)}
        differences = differing(then, now)
        found = {target.key: target for target in manifest.targets}
        planned = sorted(target_identity(t.key, t.shape, t.view) for t in plan.targets)
        if sorted(target_identity(t.key, t.shape, t.seen_as) for t in manifest.targets) != planned:
            differences.append("the targets differ")
        elif any(has_other_rank(found[target.key], target) for target in plan.targets):
            differences.append("the ranks differ")
        if source.record.kind == "folder" and not differences:
            recorded = {record.file: record for record in (*(shard.source for shard in manifest.shards), *manifest.files)}
            files = (*(shard.file for shard in plan.shards), *source.selection.others)
            progress = listening()
            with phase(progress, "comparing", sum(map(source.size, files))):
                for file in files:
                    progress.item(file)
                    path = source.fetch(file)
                    with read_errors(path):
                        same = file in recorded and recorded[file].sha256 == file_sha256(path)
                    if not same:
                        differences.append(f"{file} of the model has changed")
                    progress.advance(source.size(file))
            differences += [f"{file} of the model is gone" for file in sorted(recorded.keys() - set(files))]
        return differences

    def finish(self, place: Path, results: Sequence[ShardResult]) -> Manifest:
        """Copy the files that go along, write the scales and, as the last file, the manifest.

        Args:
            place: the folder that is written to.
            results: of all shards, in order; their files are in place already.

        Raises:
            FormatError: a file of the source has changed during the run.
        """
        source, progress = self.source, listening()
        targets = [target for result in results for target in result.targets]
        source.watch.check()
        others = []
        with phase(progress, "copying"):
            for name in loading_order(source.selection.others):
                progress.item(name)
                others.append(copy_file(source.fetch(name), place / name, name, watch=source.watch))
        fingerprint = fingerprint_of(targets)
        write_untouched(place / SCALES_FILE, targets, fingerprint, self.plan.train)
        shards, stamps = [result.shard for result in results], source.stamps()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tool=f"surgery {__version__}",
            torch=torch.__version__,
            device=self.device,
            layout=self.plan.layout,
            source=source.record,
            options=self.options,
            fingerprint=fingerprint,
            source_stamps=[source_stamp(shard.source, stamps[shard.source.file][1]) for shard in shards] if stamps else [],
            shards=shards,
            files=others,
            left_out=[LeftOutRecord(name, reason) for name, reason in sorted(source.selection.left_out.items())],
            targets=targets,
            skipped=[SkippedRecord(item.tensor, item.shard, item.reason) for item in self.plan.skipped],
        )
        source.watch.check()
        manifest.write(place)
        return manifest


def target_identity(key: str, shape: Sequence[int], view: View) -> list[Any]:
    """What identifies a target, as JSON: its key, the shape of its tensor, and how that is seen as matrices."""
    return [key, list(shape), view.kind, asdict(view.slice) if view.slice else None]


def has_other_rank(target: TargetRecord, planned: Target) -> bool:
    """Whether a result's rank is not the planned one or, with an energy, is above the planned maximum."""
    return target.rank > planned.rank or (planned.energy is None and target.rank != planned.rank)
