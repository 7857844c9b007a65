"""An extraction as a whole: two models held against each other, its identity, and the adapter that comes of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from surgery.engine.resources import Resources
from surgery.engine.sharing import share_out
from surgery.errors import OptionError, SurgeryError
from surgery.escapes import quoted
from surgery.extraction.budget import ranks_of_budget
from surgery.extraction.extents import Extent
from surgery.extraction.nothing import nothing_to_extract
from surgery.extraction.records import ExtractedShard, balanced, saved_key
from surgery.files.access import all_below
from surgery.files.file_records import FileRecord
from surgery.format.header import TensorEntry
from surgery.format.options import Options
from surgery.format.safetensors import DTYPE_NAMES, TORCH_DTYPES, ShardReader, same_bytes
from surgery.lossless.factors import Factors
from surgery.names import ADAPTER_CONFIG, EXTRACTION_FILE, FACTORIZABLE_DTYPES, PARTS_DIR, factor_key
from surgery.planning.memory import known_bytes, need_to_compare, need_to_extract
from surgery.planning.plan import AliasSearch, Plan, make_plan
from surgery.planning.targets import Target, check_all_match, matches
from surgery.progress import listening, phase
from surgery.quantized.recognize import Quantization
from surgery.quantized.unread import UnreadWeight
from surgery.quantized.weight import beside_weights, packed_in
from surgery.run.factorization import target_identity
from surgery.run.result_folder import ResultFiles
from surgery.source.component import config_folder
from surgery.source.protocol import Source
from surgery.tuned.model import TunedModel
from surgery.tuned.search import Original, find_tuned
from surgery.updates.writing.adapter import AdapterToWrite
from surgery.updates.writing.low_rank import AdapterForm, LowRankTensor, NotWritten
from surgery.updates.writing.making import AdaptableModel
from surgery.version import __version__
from surgery.weights.model import ModelWeights
from surgery.weights.recognition import not_read, quantization_in, with_unread


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """What is extracted, and as what.

    Attributes:
        extent: how many directions are kept.
        form: what the adapter is written as.
        full: globs over names of tensors that the adapter holds whole, where they have changed.
        chosen: what chooses the targets, and the tolerance and seed of the approximations.
    """

    extent: Extent
    form: AdapterForm
    full: tuple[str, ...]
    chosen: Options


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """The new numbers of a tensor, in the file of a job. Implements ``Copied``.

    Attributes:
        path: of the file.
        tensor: the tensor's name.
        dtype: of the numbers, as the format names it.
        shape: its sizes.
    """

    path: Path
    tensor: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """Its numbers, on the CPU."""
        stored = TORCH_DTYPES[self.dtype]
        with ShardReader(self.path) as reader:
            data = reader.read_bytes(reader.entries[saved_key(self.tensor)])
        return data[: math.prod(self.shape) * stored.itemsize].view(stored).reshape(self.shape)


class Extraction:
    """Two models, held against each other.

    Args:
        source: the base.
        other: the tuned model.
        options: what is extracted.
        resources: what the run may use.
        aliases: how tensors that are one parameter are looked for.

    Attributes:
        source, other, options: as given.
        plan: the targets, and what the run needs.
        weights: of the base.
        tuned: the tuned model.
        compared: weight file of the base -> its tensors that are no targets, each in one file.
        saved: those of them that the adapter holds whole, if one of their module has changed.

    Raises:
        OptionError: an option makes no sense for these models, or no adapter of this layout can hold a target.
        SourceError, FormatError, ReadError, MissingExtra: see ``extract``.
    """

    def __init__(
        self, source: Source, other: Source, options: ExtractOptions, resources: Resources, *, aliases: AliasSearch = "local"
    ) -> None:
        self._resources = resources
        self.source = source
        self.other = other
        self.options = options
        extent, chosen = options.extent, options.chosen
        headers = {shard: source.header(shard) for shard in source.selection.shards}
        names = [entry.name for header in headers.values() for entry in header.tensors]
        check_all_match("--full", options.full, names)
        # What is saved whole is no target.
        apart = replace(extent.options(chosen), exclude=(*chosen.exclude, *options.full))
        try:
            plan = _with_ranks_alone(make_plan(source, apart, "overlay", resources, aliases=aliases))
        except OptionError as error:
            if options.full and "matched by --exclude" in str(error.got):
                error.got = str(error.got).replace("--exclude", "--full or --exclude")
                error.hint = "an adapter needs at least one pair of matrices: let --full match fewer tensors"
            raise
        quantization = quantization_in(source, headers)
        if unread := _named_unread(options.full, quantization):
            raise not_read("what --full names is in", unread, "leave it out of --full")
        quantized = quantization.weights
        headers = {shard: header.unpacked(packed_in(quantized.values())) for shard, header in headers.items()}
        self.weights = ModelWeights(source, lambda: quantization)
        self._entries = {entry.name: entry for header in headers.values() for entry in header.tensors}
        self.compared = _compared(plan, quantization)
        wanted = {target.tensor: tuple(alias.tensor for alias in target.aliases) for target in plan.targets}
        optional = [name for some in self.compared.values() for name in some]
        shapes = {name: tuple(entry.shape) for name, entry in with_unread(self._entries, quantization).items()}
        self._model = AdaptableModel(config_folder(source), shapes)
        self.tuned: TunedModel = find_tuned(other, Original(wanted, shapes, lambda: config_folder(source), optional))
        self.plan = plan
        asked = [name for name in optional if matches(name, options.full) and self.tuned.has(name)]
        # Whatever cannot be written is refused before any work.
        saved = self._checked(asked)
        try:
            adapter = self._adapter({target.tensor: target.rank for target in plan.targets}, saved)
        except NotWritten as error:
            if self._can_be_whole(error.alike, saved):
                error.hint = f"save it whole, beside pairs of other weights: --full {quoted(error.alike)}; or {error.hint}"
            raise
        held = set(adapter.copied.values())
        self.saved = self._checked([name for name in optional if name in held])
        self.plan = self._with_memory(plan, resources)
        self._file = adapter.file

    def _can_be_whole(self, glob: str, saved: Sequence[str]) -> bool:
        """Whether the adapter could hold the targets that a glob matches whole, beside those that it does already."""
        wanted = [target.tensor for target in self.plan.targets if matches(target.tensor, [glob])]
        rest = [_low_rank(target, target.rank) for target in self.plan.targets if target.tensor not in wanted]
        try:
            self._checked(wanted)
            if self.options.form.layout != "peft" or not wanted:
                return False
            if rest:
                self._model.adapter(rest, self.options.form, [*saved, *wanted])
            else:
                self._model.check_whole([*saved, *wanted])
        except SurgeryError:
            return False
        return True

    def _can_be_pairs(self, glob: str) -> bool:
        """Whether ``--include`` of a glob, alone, would make pairs."""
        options = replace(self.options.extent.options(self.options.chosen), include=(glob,), exclude=())
        try:
            plan = make_plan(self.source, options, "overlay", self._resources, aliases="local")
            self._model.adapter([_low_rank(target, 1) for target in plan.targets], self.options.form)
        except SurgeryError:
            return False
        return True

    def is_resized(self, name: str) -> bool:
        """Whether a tensor of the base has another shape in the tuned model."""
        there = self.tuned.entry(name) if self.tuned.has(name) else None
        return there is not None and there.shape != self._entries[name].shape

    def _checked(self, names: Sequence[str]) -> tuple[str, ...]:
        """Tensors that the adapter is to hold whole. Raises OptionError for one that cannot be held so."""
        for name in names:
            entry = self._entries[name]
            if not self.tuned.has(name):
                raise OptionError(
                    f"{name!r} is not in the tuned model, and its module cannot be saved whole",
                    hint="leave the other tensors of the module out of --full",
                )
            there = self.tuned.entry(name)
            if there is not None and self.is_resized(name):
                raise OptionError(
                    f"{name!r} has another shape in the tuned model, and cannot be saved whole",
                    got=list(there.shape),
                    expected=list(entry.shape),
                    hint="leave it out of --full: what has another shape is in no adapter",
                )
            if entry.dtype not in FACTORIZABLE_DTYPES and name not in self.weights.quantized:
                raise OptionError(f"{name!r} is no tensor of floating-point numbers", got=entry.dtype)
            if there is not None and there.dtype not in FACTORIZABLE_DTYPES and not self.tuned.is_quantized(name):
                raise OptionError(f"{name!r} cannot be saved whole as it is in the tuned model", got=there.dtype)
        return tuple(names)

    def _with_memory(self, plan: Plan, resources: Resources) -> Plan:
        """The plan with the memory and the bytes of an extraction."""
        whole = [(name, file) for file, some in self.compared.items() for name in some if self._is_read_whole(name)]
        needs = [need_to_extract(target) for target in plan.targets]
        needs += [need_to_compare(self._entries[name], file) for name, file in whole]
        stacks = max((target.factor_bytes for target in plan.targets if target.matrices[0] > 1), default=0)
        memory = share_out(needs, resources, kept=stacks + known_bytes(plan.targets, len(self._entries)), windows="together")
        saved = sum(self._entries[name].nbytes for name in self.saved)
        factors = sum(target.factor_bytes for target in plan.targets)
        tuned = sum(self.other.size(shard) for shard in self.other.selection.shards)
        return replace(
            plan,
            memory=memory,
            bytes_read=sum(shard.size for shard in plan.shards) + tuned,
            # Once as the jobs leave them, and once as an adapter.
            bytes_written=2 * (factors + saved),
            download_bytes=plan.download_bytes + self.other.bytes_to_fetch(),
        )

    def _is_read_whole(self, name: str) -> bool:
        if name in self.saved or name in self.weights.quantized:
            return True
        return self.tuned.has(name) and self.tuned.is_quantized(name)

    def identity(self, device: str) -> dict[str, Any]:
        """All that the bytes of the result depend on, as JSON."""
        targets = [
            [*target_identity(t.key, t.shape, t.view), t.rank, [alias.tensor for alias in t.aliases]] for t in self.plan.targets
        ]
        models = {
            which: {**asdict(one.record), "files": one.stamps()}
            for which, one in (("base", self.source), ("tuned", self.other))
        }
        return {
            "command": "extract",
            "tool": f"surgery {__version__}",
            "torch": torch.__version__,
            "device": device,
            "window_bytes": self.plan.memory.window_bytes,
            "options": asdict(self.options),
            "targets": hashlib.sha256(json.dumps([targets, self.saved]).encode()).hexdigest(),
            **models,
        }

    def files(self, out: Path, earlier: Sequence[str]) -> ResultFiles:
        """What will be written.

        Args:
            out: the output folder, which may hold what jobs of an earlier start have left.
            earlier: the files of an earlier result in it.
        """
        names = frozenset({self._file, ADAPTER_CONFIG, EXTRACTION_FILE})
        left = sum(path.lstat().st_size for path in all_below(out / PARTS_DIR))
        return ResultFiles(names, max(0, self.plan.bytes_written - left), frozenset(earlier))

    def ranks(self, results: Sequence[ExtractedShard]) -> dict[str, int]:
        """Target -> how many directions of each of its matrices the adapter has; 0 for none."""
        found = {one.tensor: one for result in results for one in result.targets}
        budget = self.options.extent.budget
        largest = {tensor: one.rank for tensor, one in found.items()}
        if budget is None or not any(largest.values()):
            return largest
        adapter = self._adapter(largest, self.saved)
        bought = ranks_of_budget(adapter, found, budget, uniform=self.options.form.uniform_rank)
        return dict.fromkeys(found, 0) | bought

    def finish(
        self, out: Path, place: Path, results: Sequence[ExtractedShard], ranks: Mapping[str, int]
    ) -> tuple[AdapterToWrite, list[FileRecord]]:
        """Write the adapter from the files that the jobs have left.

        Args:
            out: the output folder, inside of which these files are.
            place: the folder that is written to: ``out``, or one inside of it.
            results: of all jobs, in order.
            ranks: of all targets, as ``ranks`` gives them.

        Returns:
            What has been written, and its files.

        Raises:
            OptionError: no target has changed, or no direction is above the noise.
        """
        files: dict[str, str] = {}
        for result in results:
            if result.file is not None:
                tensors = [*(one.tensor for one in result.targets), *(one.tensor for one in result.others)]
                files |= dict.fromkeys(tensors, result.file.file)
        changed = {one.tensor for result in results for one in result.others if one.fate == "changed"}
        saved = [name for name in self.saved if name in changed]
        if not any(ranks.values()):
            apart = (*self.options.chosen.exclude, *self.options.full)
            raise nothing_to_extract(results, self.further(), apart, self._can_be_pairs)
        adapter = self._adapter(ranks, saved)
        # Of a module that is saved all tensors, also those that are as they were.
        copied = {
            name: SavedTensor(
                out / files[name], name, DTYPE_NAMES[self.tuned.dtype_of_numbers(name)], tuple(self._entries[name].shape)
            )
            for name in adapter.copied.values()
        }

        for first, *others in adapter.tied:
            for other in others:
                _check_same(out, files, first, other)

        def halves(one: LowRankTensor) -> tuple[torch.Tensor, torch.Tensor]:
            with ShardReader(out / files[one.tensor]) as reader:
                U, s, V = (reader.read(reader.entries[factor_key(one.tensor, part)]) for part in ("U", "s", "V"))
            return balanced(Factors(U[..., : one.rank], s[..., : one.rank], V[..., : one.rank]))

        records = adapter.write(place, halves, copied, listening())
        return adapter, records

    def _adapter(self, ranks: Mapping[str, int], saved: Sequence[str]) -> AdapterToWrite:
        tensors = [_low_rank(target, ranks[target.tensor]) for target in self.plan.targets if ranks[target.tensor]]
        with phase(listening(), "finding modules"):
            return self._model.adapter(tensors, self.options.form, saved)

    def entry(self, tensor: str) -> TensorEntry:
        """What the base's headers say of a tensor."""
        return self._entries[tensor]

    def further(self) -> tuple[str, ...]:
        """The tensors of the tuned model that are none of the base's, but for parts of quantized weights."""
        parts = beside_weights(self.tuned.weights.quantized.values())
        return tuple(name for name in self.tuned.found.further if name not in parts)


def _low_rank(target: Target, rank: int) -> LowRankTensor:
    aliases = tuple(alias.tensor for alias in target.aliases)
    return LowRankTensor(target.tensor, tuple(target.shape), target.view.kind, rank, aliases)


def _check_same(place: Path, files: Mapping[str, str], first: str, other: str) -> None:
    """Refuse two tensors that the base has for one parameter, and of which the tuned model has two."""
    with ShardReader(place / files[first]) as here, ShardReader(place / files[other]) as there:
        if not same_bytes(here, here.entries[saved_key(first)], there, there.entries[saved_key(other)]):
            raise OptionError(
                f"{first!r} and {other!r} cannot be saved whole",
                got="two parameters in the tuned model",
                expected="one, as in the base",
                hint="leave both out of --full: the report tells how much of them has changed",
            )


def _with_ranks_alone(plan: Plan) -> Plan:
    """The plan with targets of which only the largest rank is known: an energy would be that of the weights."""
    shards = (replace(shard, targets=tuple(replace(one, energy=None) for one in shard.targets)) for shard in plan.shards)
    return replace(plan, shards=tuple(shards))


def _named_unread(globs: Sequence[str], quantization: Quantization) -> list[UnreadWeight]:
    """The weights that are not read and of which any tensor is meant."""
    return [one for one in quantization.unread.values() if any(matches(name, globs) for name in (one.name, *one.tensors))]


def _compared(plan: Plan, quantization: Quantization) -> dict[str, tuple[str, ...]]:
    """Weight file -> its tensors that are no targets, nor belong to a quantized weight; each in the first file that has it."""
    taken = {target.tensor for target in plan.targets} | {alias.tensor for t in plan.targets for alias in t.aliases}
    taken |= beside_weights(quantization.weights.values()) | quantization.unread_tensors.keys()
    compared: dict[str, tuple[str, ...]] = {}
    for shard in plan.shards:
        mine = tuple(entry.name for entry in shard.header.tensors if entry.name not in taken)
        taken.update(mine)
        compared[shard.file] = mine
    return compared
