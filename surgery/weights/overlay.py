"""The model under an overlay: the weights that a factorized folder has the factors of, and does not hold itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.errors import FormatError, OptionError, SourceError
from surgery.files.access import read_errors
from surgery.files.file_records import FileRecord, file_sha256, not_as_described
from surgery.files.json_files import read_json_object
from surgery.format.manifest import Manifest
from surgery.names import CONFIG_FILE
from surgery.progress import listening, phase
from surgery.source.address import address_of
from surgery.source.open import open_part, open_source
from surgery.source.protocol import Source, WeightFiles
from surgery.weights.protocol import FindQuantized, Weights
from surgery.weights.quantization import FP8, Scaled, quantization_of, read_quantization

BASE_HINT = "give the model that was factorized with --base"


class OverlayWeights(Weights):
    """The weights of the model that a checkpoint was made from, which must be what its manifest says.

    Args:
        files: where they are: in that model.
        name: of it, for messages.
        manifest: of the checkpoint.
        there: the names of its weight files.
        find_quantized: see ``Weights``.
    """

    def __init__(
        self,
        files: WeightFiles,
        name: str,
        manifest: Manifest,
        there: frozenset[str],
        find_quantized: FindQuantized = dict,
    ) -> None:
        super().__init__(files, find_quantized)
        self._name = name
        self._fp8 = [target.tensor for target in manifest.targets if target.dtype == FP8]
        self._there = there
        self._seen_at: dict[str, Path] = {}
        self._records = {shard.source.file: shard.source for shard in manifest.shards}

    def path(self, shard: str) -> Path:
        if shard not in self._records:
            raise SourceError(f"the base is not that of this overlay: it has another weight file, {shard}")
        self._check_there(shard)
        self._seen_at[shard] = path = super().path(shard)
        return path

    def expected(self, shard: str) -> FileRecord:
        return self._records[shard]

    def check(self, shard: str, sha256: str) -> None:
        """Refuse a weight file that is not that of the model that was factorized.

        Raises:
            FormatError: names both hashes.
        """
        if sha256 != self._records[shard].sha256:
            # One that passes through may be gone by now.
            raise not_as_described(self._seen_at[shard], sha256, self._records[shard], BASE_HINT)

    def check_quantized(self) -> None:
        """Refuse a base in which a target is not FP8 that was when it was factorized.

        Raises:
            SourceError: names it.
        """
        if lost := [tensor for tensor in self._fp8 if tensor not in self.quantized]:
            raise SourceError(f"the base is not that of this overlay: {lost[0]!r} is not FP8 there")

    def check_files(self) -> None:
        """Refuse what is seen not to be the base before a weight of it is read.

        Raises:
            SourceError: it lacks a weight file.
            FormatError: one has another size.
        """
        for shard, record in self._records.items():
            self._check_there(shard)
            if (size := self.files.size(shard)) != record.size:
                raise not_as_described(Path(self._name) / shard, f"of {size} bytes", record, BASE_HINT)

    def _check_there(self, shard: str) -> None:
        if shard not in self._there:
            raise SourceError(f"{self._name} is not the base of this overlay: it has no {shard}")


def open_base(base: str | Path, manifest: Manifest) -> Source:
    """The model that a user says a checkpoint was made from, maybe by the pipeline that it is a part of.

    The repository that the manifest names is opened at the commit that it names, unless the user gives a revision.
    """
    record, address = manifest.source, address_of(base)
    is_named = address.folder is None and address.repo_id == record.repo_id and address.subfolder in (None, record.subfolder)
    if is_named and address.revision is None and record.repo_id is not None:
        return open_source(record.repo_id, revision=record.commit, subfolder=record.subfolder)
    return open_part(base, record.subfolder)


def base_of(factorized: Path, manifest: Manifest, base: str | Path | None) -> Source:
    """The model under an overlay: what the user says it is, or the one on the hub that the manifest names.

    Raises:
        SourceError: an overlay on a local model, and no base.
    """
    record = manifest.source
    if base is not None:
        return open_base(base, manifest)
    if record.repo_id is not None:
        return open_source(record.repo_id, revision=record.commit, subfolder=record.subfolder)
    raise SourceError(
        f"{factorized} is an overlay on a local model, and does not say where that is",
        hint="--base FOLDER, the model it was factorized from",
    )


def quantized_of(source: Source, factorized: Path, manifest: Manifest, *, all_of_them: bool) -> dict[str, Scaled]:
    """The FP8 weights of a base and where their scales are, by the config of the checkpoint that was factorized.

    Of a checkpoint without FP8 targets only if ``all_of_them`` are wanted: each header of the base is read for it.

    Raises:
        FormatError: that config has been edited since, and speaks of another quantization than the base.
    """
    if not (all_of_them or any(target.dtype == FP8 for target in manifest.targets)):
        return {}
    config, is_edited = _own_config(factorized, manifest)
    if is_edited and quantization_of(config) != quantization_of(source.config()):
        raise FormatError(
            f"{factorized / CONFIG_FILE} has been edited, and speaks of another quantization than the model",
            got=quantization_of(config),
            expected=quantization_of(source.config()),
            hint="restore that part of it from the source model",
        )
    with phase(listening(), "reading headers"):
        headers = {shard: source.header(shard) for shard in source.selection.shards}
    return read_quantization(config, headers, source.name)


def _own_config(factorized: Path, manifest: Manifest) -> tuple[dict[str, Any], bool]:
    """The ``config.json`` of a factorized checkpoint, empty if there was none, and whether it is another than in the source."""
    record = next((record for record in manifest.files if record.file == CONFIG_FILE), None)
    if record is None:
        return {}, False
    path = factorized / CONFIG_FILE
    with read_errors(path):
        is_edited = file_sha256(path) != record.sha256
    return read_json_object(path, str(path)), is_edited


def no_base_needed(base: object, stream: object) -> None:
    """Refuse what is for overlays where a checkpoint holds its own weights.

    Raises:
        OptionError: a base, or a stream.
    """
    if base is not None:
        raise OptionError("--base is for overlays; this checkpoint holds its own weights", hint="leave --base out")
    if stream is not None:
        raise OptionError("--stream is for overlays; this checkpoint holds its own weights", hint="leave --stream out")
