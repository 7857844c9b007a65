"""The base of a factorized checkpoint: the model that it was made from, whose weights an overlay does not hold itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.errors import FormatError, OptionError, SourceError
from surgery.files.access import read_errors
from surgery.files.file_records import FileRecord, file_sha256, not_as_described
from surgery.files.json_files import read_json_object
from surgery.format.manifest import Manifest
from surgery.names import CONFIG_FILE, FACTORIZABLE_DTYPES, told_dtype
from surgery.progress import listening, phase
from surgery.quantized.recognize import Quantization, quantization_of
from surgery.source.address import address_of
from surgery.source.open import open_part, open_source
from surgery.source.protocol import Source, WeightFiles
from surgery.weights.protocol import FindQuantization, Weights
from surgery.weights.recognition import quantization_in

BASE_HINT = "give the model that was factorized with --base"


class OverlayWeights(Weights):
    """The weights of the model that a checkpoint was made from, checked against the checkpoint's manifest.

    Args:
        files: the weight files of that model.
        name: of that model, for messages.
        manifest: of the checkpoint.
        there: the names of the weight files that the model has.
        find_quantization: see ``Weights``.
    """

    def __init__(
        self,
        files: WeightFiles,
        name: str,
        manifest: Manifest,
        there: frozenset[str],
        find_quantization: FindQuantization = Quantization,
    ) -> None:
        super().__init__(files, find_quantization)
        self._name = name
        self._quantized = quantized_targets(manifest)
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
        """Refuse a weight file whose sha256 is not the one that the manifest records.

        Raises:
            FormatError: names both hashes.
        """
        if sha256 != self._records[shard].sha256:
            # Not ``path()``: a streamed file may be gone by now, and would be fetched again.
            raise not_as_described(self._seen_at[shard], sha256, self._records[shard], BASE_HINT)

    def check_quantized(self) -> None:
        """Refuse a base in which a target is not quantized as it was when it was factorized.

        Raises:
            SourceError: names the target.
        """
        for tensor, dtype in self._quantized.items():
            if tensor not in self.quantized or self.quantized[tensor].dtype != dtype:
                raise SourceError(f"the base is not that of this overlay: {tensor!r} is not {told_dtype(dtype)} there")

    def check_files(self) -> None:
        """Refuse a base whose weight files differ from the manifest's in name or size, before any weight is read.

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
    """Open the base that a user gives for a checkpoint: the model, or the pipeline that the model is a part of.

    If it is the repository that the manifest names, it is opened at the commit that was factorized, unless the user gives a
    revision.
    """
    record, address = manifest.source, address_of(base)
    is_named = address.folder is None and address.repo_id == record.repo_id and address.subfolder in (None, record.subfolder)
    if is_named and address.revision is None and record.repo_id is not None:
        return open_source(record.repo_id, revision=record.commit, subfolder=record.subfolder)
    return open_part(base, record.subfolder)


def base_of(factorized: Path, manifest: Manifest, base: str | Path | None) -> Source:
    """Open the base of an overlay: the model that the user gives, else the one on the hub that the manifest names.

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


def quantized_targets(manifest: Manifest) -> dict[str, str]:
    """The tensors of a checkpoint's targets that are quantized -> their dtypes."""
    return {target.tensor: target.dtype for target in manifest.targets if target.dtype not in FACTORIZABLE_DTYPES}


def quantization_of_base(source: Source, factorized: Path, manifest: Manifest, *, all_of_them: bool) -> Quantization:
    """Find what is quantized in a base, as the factorized folder's ``config.json`` describes the quantization.

    It reads all headers of the base. So without quantized targets the result is empty, unless ``all_of_them`` are asked for.

    Raises:
        FormatError: that config has been edited since, and describes another quantization than the base's own.
    """
    if not (all_of_them or quantized_targets(manifest)):
        return Quantization()
    config, is_edited = own_config(factorized, manifest)
    if is_edited and quantization_of(config) != quantization_of(source.config()):
        raise FormatError(
            f"{factorized / CONFIG_FILE} has been edited, and speaks of another quantization than the model",
            got=quantization_of(config),
            expected=quantization_of(source.config()),
            hint="restore that part of it from the source model",
        )
    with phase(listening(), "reading headers"):
        headers = {shard: source.header(shard) for shard in source.selection.shards}
    return quantization_in(source, headers, config)


def own_config(factorized: Path, manifest: Manifest) -> tuple[dict[str, Any], bool]:
    """The ``config.json`` of a factorized checkpoint, empty if it has none, and whether it was edited after factorizing."""
    record = next((record for record in manifest.files if record.file == CONFIG_FILE), None)
    if record is None:
        return {}, False
    path = factorized / CONFIG_FILE
    with read_errors(path):
        is_edited = file_sha256(path) != record.sha256
    return read_json_object(path, str(path)), is_edited


def no_base_needed(base: object, stream: object) -> None:
    """Refuse options that are for overlays alone, given for a checkpoint that holds its own weights.

    Raises:
        OptionError: a base, or a stream.
    """
    if base is not None:
        raise OptionError("--base is for overlays; this checkpoint holds its own weights", hint="leave --base out")
    if stream is not None:
        raise OptionError("--stream is for overlays; this checkpoint holds its own weights", hint="leave --stream out")
