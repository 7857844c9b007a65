"""The headers of a shard's files, checked against the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from surgery.files.watch import Watch
from surgery.format.manifest import Manifest
from surgery.format.manifest_records import ShardRecord
from surgery.format.safetensors import ShardReader
from surgery.names import correction_key, factor_key
from surgery.shards.failures import CheckedCheckpoint, Failures

#: Tensor -> the dtype and shape that it must have; None for any shape.
_Wanted = Mapping[str, tuple[str, list[int] | None]]


def check_headers(
    checkpoint: CheckedCheckpoint, shard: ShardRecord, passed: AbstractSet[str], watch: Watch, failures: Failures
) -> None:
    """Check that each target and its factors are there with their dtypes and shapes, and that nothing unknown is.

    Args:
        checkpoint: what is checked.
        shard: which weight file.
        passed: the tensors in it that the manifest records as passed over.
        watch: of the checkpoint's own files.
        failures: failed checks are added to it.
    """
    manifest, folder, weights = checkpoint.manifest, checkpoint.folder, checkpoint.weights
    edited = manifest.edited_in(shard.source.file)
    tensors: _Wanted = {tensor: (target.dtype, list(target.shape)) for tensor, target in edited.items()}
    if shard.residual is not None:
        with ShardReader(folder / shard.residual.file, name=shard.residual.file, watch=watch) as reader:
            _check_header(reader, shard.residual.file, tensors, passed, failures)
    if weights is not None and not weights.holds_residuals:
        path = weights.path(shard.source.file)
        with weights.opened(shard.source.file, path, path.name) as reader:
            _check_header(reader, path.name, tensors, passed, failures)
    if shard.factors is not None:
        with ShardReader(folder / shard.factors.file, name=shard.factors.file, watch=watch) as reader:
            _check_header(reader, shard.factors.file, _factors_of(shard, manifest), set(), failures)


def _factors_of(shard: ShardRecord, manifest: Manifest) -> _Wanted:
    """The tensors that the factors file of a shard must hold."""
    parts: dict[str, tuple[str, list[int] | None]] = {}
    for target in manifest.targets_of(shard.source.file):
        (count, m, n), k = target.matrices, target.rank
        stack = [count] if target.view == "stack" else []
        shapes: list[tuple[str, list[int]]] = [("U", [m, k]), ("s", [k]), ("V", [n, k])]
        parts.update((factor_key(target.key, part), ("F32", stack + shape)) for part, shape in shapes)
        if manifest.layout == "residual" and manifest.options.correction:
            places = range(count) if stack else [None]
            parts.update((correction_key(target.key, place), ("U8", None)) for place in places)
    return parts


def _check_header(reader: ShardReader, name: str, wanted: _Wanted, passed: AbstractSet[str], failures: Failures) -> None:
    found = {entry.name: (entry.dtype, list(entry.shape)) for entry in reader.header.tensors}
    # What was passed over has the names that it has in the file.
    stored = {entry.name: entry.stored.name for entry in reader.header.tensors if entry.name not in wanted}
    for tensor, (dtype, shape) in wanted.items():
        got = found.get(tensor)
        good = got is not None and got[0] == dtype and (shape is None or got[1] == shape)
        failures.expect(good, f"{name}: {tensor}", "dtype and shape", got or "nothing", f"{dtype} {shape or ''}")
    for tensor in sorted(passed - set(stored.values())):
        failures.expect(False, f"{name}: {tensor}", "what was passed over is there", "nothing")
    for tensor in sorted(name for name in stored if stored[name] not in passed):
        failures.expect(False, f"{name}: {tensor}", "the manifest knows the tensor", "it does not")
