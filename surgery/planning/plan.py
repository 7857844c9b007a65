"""The plan of a factorization, made from headers: one object for --dry-run, progress, the disk check and the jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from surgery.engine.resources import Memory, Resources
from surgery.engine.sharing import CORRECTION_BYTES, share_out
from surgery.errors import OptionError, SourceError, few
from surgery.escapes import quoted
from surgery.format.header import Header, TensorEntry
from surgery.format.manifest_records import Alias, LeftOutRecord, SkippedRecord
from surgery.format.options import Options
from surgery.names import SCALES_METADATA_KEY, Train, is_of_lora
from surgery.planning.aliases import find_aliases
from surgery.planning.memory import collected_bytes, need_to_factorize
from surgery.planning.notes import notes_of_plan, notes_of_quantization, share_reached
from surgery.planning.nothing import nothing_selected
from surgery.planning.numbering import numbering_notes
from surgery.planning.recipes import find_recipe, recipe_for_family
from surgery.planning.summary import PlannedTarget, PlanSummary
from surgery.planning.targets import Model, Skipped, Target, check_globs, choose
from surgery.quantized.weight import packed_in
from surgery.reports import Report
from surgery.source.copies import copies_of
from surgery.source.protocol import Source, check_index
from surgery.weights.recognition import quantization_in

Layout = Literal["residual", "overlay"]
#: How aliases are looked for: not at all, so that each tensor is a target by itself; in a local model only; or also in weight
#: files of a hub model, which are fetched for it.
AliasSearch = Literal["none", "local", "fetch"]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One weight file of the source and its targets.

    Attributes:
        file: its name in the source.
        size: its bytes.
        header: of the file.
        targets: those in it; none if nothing of it is factorized.
    """

    file: str
    size: int
    header: Header
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Plan(Report):
    """Everything that a run of ``factorize`` will do. Its JSON is the JSON of its ``PlanSummary``.

    Attributes:
        layout: ``residual`` or ``overlay``.
        recipe: the name of the recipe that applies, because it was asked for or belongs to the model's family. None:
            the default rules for any model.
        options: the options that were asked for.
        shards: the weight files, in the order in which surgery works on them.
        skipped: every tensor without a target, with the reason.
        notes: what the user should know before the run.
        files_along: number of other files that are copied, such as config, tokenizer and code.
        bytes_along: the size of these files.
        left_out: files and folders of the source that are not copied, with the reason; see
            ``surgery.source.select.Selection``.
        bytes_read: bytes that the whole run reads.
        bytes_written: bytes that the whole run writes; an upper estimate.
        download_bytes: bytes of a hub model that still have to be downloaded.
        temporary_bytes: how much of the download is on the disk at one time. Without streaming, all of it is in the
            hub's cache.
        memory: how many matrices are processed at the same time, and how much memory that takes.
        train: what the trainable file will hold: ``scales``, or ``core`` for cores.
    """

    layout: Layout
    recipe: str | None
    options: Options
    shards: tuple[ShardPlan, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    files_along: int
    bytes_along: int
    left_out: Mapping[str, str]
    bytes_read: int
    bytes_written: int
    download_bytes: int
    temporary_bytes: int
    memory: Memory
    train: Train = "scales"

    @property
    def targets(self) -> list[Target]:
        return [target for shard in self.shards for target in shard.targets]

    @property
    def reached(self) -> float:
        """Share of the weights that should be targets and are targets, by number of entries.

        The others are the ``entries`` of ``skipped``: surgery passes over them because of the way they are stored.
        """
        return share_reached(self.targets, self.skipped)

    @property
    def trainable(self) -> int:
        """Number of trainable scales, or of trainable numbers in cores. With an energy it is the largest number possible."""
        return sum(target.numbers_of(self.train) for target in self.targets)

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON, see ``Report.as_json``."""
        return self._summary().as_json()

    def _summary(self) -> PlanSummary:
        return PlanSummary(
            layout=self.layout,
            recipe=self.recipe,
            targets=tuple(map(PlannedTarget.of, self.targets)),
            skipped=tuple(SkippedRecord(item.tensor, item.shard, item.reason) for item in self.skipped),
            notes=self.notes,
            files_along=self.files_along,
            bytes_along=self.bytes_along,
            left_out=tuple(LeftOutRecord(file, reason) for file, reason in self.left_out.items()),
            prove=self.options.prove,
            train=self.train,
            trainable=self.trainable,
            reached=self.reached,
            bytes_read=self.bytes_read,
            bytes_written=self.bytes_written,
            download_bytes=self.download_bytes,
            temporary_bytes=self.temporary_bytes,
            workers=self.memory.workers,
            peak_memory_bytes=self.memory.peak_bytes,
            device_memory_bytes=self.memory.device_bytes,
        )


def make_plan(
    source: Source,
    options: Options,
    layout: Layout | None = None,
    resources: Resources | None = None,
    *,
    aliases: AliasSearch = "none",
    train: Train = "scales",
) -> Plan:
    """Plan a factorization from headers. Weights are read only to compare copies in several files, and to find aliases.

    Args:
        source: the model.
        options: what is asked for, after ``Options.check``.
        layout: of the result; None: the residual layout, or the overlay if a target is quantized.
        resources: what the run may use; None: one core.
        aliases: how aliases are looked for.
        train: what is to be trained.

    Raises:
        OptionError: the options make no sense for this model, or select nothing.
        SourceError: all that would be a target is quantized in a way that is not read, or anything by a method that is not
            known.
        FormatError: the headers contradict each other, the index or the config.
    """
    headers = {shard: source.header(shard) for shard in source.selection.shards}
    _check_is_a_model(source.name, headers)
    index_notes = check_index(source, headers)
    stored, copies = _all_names(headers, source)
    config = source.config()
    quantization = quantization_in(source, headers)
    packed = packed_in(quantization.weights.values())
    headers = {shard: header.unpacked(packed) for shard, header in headers.items()}
    names = list(dict.fromkeys([*stored, *(weight.name for weight in packed.values()), *quantization.unread]))
    check_globs(options, names, packed)
    recipe = find_recipe(options.recipe) if options.recipe is not None else recipe_for_family(config)
    model = Model(config, recipe, quantization, quantized_too=layout != "residual")
    entries = [(entry, file) for file, header in headers.items() for entry in header.tensors]
    fates = [
        fate
        for entry, file in entries
        for fate in (
            choose(entry, file, options, model)
            if entry.stored.name not in copies
            else [_skipped_copy(entry, file, copies[entry.stored.name], options, model)]
        )
    ]
    every = [fate for fate in fates if not isinstance(fate, Skipped)]
    same, alias_notes = ({}, []) if aliases == "none" else find_aliases(source, headers, every, fetch=aliases == "fetch")
    if untouched := _tied_to(copies, same):
        same = {tensor: several for tensor, several in same.items() if tensor not in untouched}
        fates = [
            Skipped(fate.tensor, fate.shard, "one parameter with a tensor in several weight files", True, fate.entries)
            if fate.tensor in untouched and isinstance(fate, Target)
            else fate
            for fate in fates
        ]
        every = [fate for fate in fates if not isinstance(fate, Skipped)]
    merged = {alias.tensor for several in same.values() for alias in several}
    every = [replace(one, aliases=same.get(one.tensor, ())) for one in every if one.tensor not in merged]
    skipped = [fate for fate in fates if isinstance(fate, Skipped) and fate.tensor not in merged]
    by_shard: dict[str, list[Target]] = {file: [] for file in headers}
    for target in every:
        by_shard[target.shard].append(target)
    shards = [ShardPlan(file, source.size(file), header, tuple(by_shard[file])) for file, header in headers.items()]
    if not every:
        raise nothing_selected(source, options, model, skipped, names, entries)
    if options.max_rank is not None and not any(target.energy is not None for target in every):
        raise OptionError(
            "a largest rank goes with an energy", got=f"max-rank {options.max_rank} without one", hint="--energy 0.5"
        )
    layout = _layout(layout, every)
    if layout == "overlay" and not options.correction:
        raise OptionError(
            "an overlay has no correction to leave out", hint="drop --no-correction: its weights stay as they are"
        )
    if same and not options.correction:
        raise OptionError(
            "a weight that is stored twice needs its correction: else its two copies would not be equal after a fold",
            got=f"{next(iter(same))} and {next(iter(same.values()))[0].tensor}",
            hint="drop --no-correction",
        )
    weights = sum(shard.size for shard in shards)
    twice = {
        target.tensor: target.stored_bytes for target in every if target.energy is not None and target.view.kind == "stack"
    }
    along = sum(source.size(file) for file in source.selection.others)
    factors = sum(target.factor_bytes + _described_bytes(target) for target in every)
    written = along + factors + (sum(4 * target.numbers_of("core") for target in every) if train == "core" else 0)
    if layout == "residual":
        written += weights + (int(CORRECTION_BYTES * sum(target.entries for target in every)) if options.correction else 0)
    return Plan(
        layout=layout,
        recipe=recipe.name if recipe else None,
        options=options,
        shards=tuple(shards),
        skipped=tuple(skipped),
        notes=(
            *source.selection.notes,
            *index_notes,
            *numbering_notes(stored, config),
            *notes_of_quantization(quantization),
            *notes_of_plan(options, model, every, skipped, names),
            *alias_notes,
        ),
        files_along=len(source.selection.others),
        bytes_along=along,
        left_out=source.selection.left_out,
        bytes_read=weights + sum(twice.values()),
        bytes_written=written,
        download_bytes=source.bytes_to_fetch(),
        temporary_bytes=sum(source.room_to_fetch().values()),
        memory=share_out(
            [need_to_factorize(target, prove=options.prove) for target in every],
            resources or Resources(),
            kept=collected_bytes(every, len(entries)),
            windows="resident",
            longest=max(shard.size for shard in shards),
        ),
        train=train,
    )


def _check_is_a_model(name: str, headers: Mapping[str, Header]) -> None:
    """Refuse files that hold no model, by the names of their tensors.

    Raises:
        SourceError: they hold scales, or an adapter under another file name than PEFT's.
    """
    for shard, header in headers.items():
        if SCALES_METADATA_KEY in header.metadata:
            raise SourceError(
                f"{name} holds scales and no model: {shard}",
                expected="the model that was factorized",
                hint="surgery fold FACTORIZED SCALES makes a model of scales",
            )
    tensors = [entry.name for header in headers.values() for entry in header.tensors]
    if tensors and sum(map(is_of_lora, tensors)) > len(tensors) / 2:
        raise SourceError(
            f"{name} holds a LoRA adapter and no weights of a model: {few(headers)}",
            got=f"such as {next(filter(is_of_lora, tensors))!r}",
            hint=f"give the model that it was trained on, or merge the two first: surgery merge MODEL {quoted(name)}",
        )


def _layout(asked: Layout | None, targets: list[Target]) -> Layout:
    """The layout of the result: what is quantized has no residual of its own kind."""
    return asked or ("residual" if all(target.quantized is None for target in targets) else "overlay")


def _all_names(headers: Mapping[str, Header], source: Source) -> tuple[list[str], dict[str, list[str]]]:
    """The names of all tensors; and, for each tensor that is in several shards, these shards.

    Loaders take the copy that they read last. So the copies must be equal, and are no target: they stay unchanged, and the one
    that a loader takes is right.

    Raises:
        FormatError: copies differ.
    """
    places = copies_of(source, headers)
    return list(places), {name: shards for name, shards in places.items() if len(shards) > 1}


def _skipped_copy(entry: TensorEntry, file: str, places: Sequence[str], options: Options, model: Model) -> Skipped:
    """A tensor that is in several weight files, the ``places``; of its copies the first counts as one that is wanted."""
    fates = choose(entry, file, options, model) if file == places[0] else []
    entries = sum(fate.entries for fate in fates if isinstance(fate, Target) or fate.wanted)
    return Skipped(entry.stored.name, file, f"in several weight files: {', '.join(places)}", entries > 0, entries)


def _tied_to(copies: Mapping[str, list[str]], aliases: Mapping[str, tuple[Alias, ...]]) -> set[str]:
    """The tensors that are one parameter with a tensor in several files, and so must stay unchanged as well."""
    several = [{tensor, *(alias.tensor for alias in others)} for tensor, others in aliases.items()]
    return set[str]().union(*(names for names in several if not names.isdisjoint(copies)))


def _described_bytes(target: Target) -> int:
    """An upper estimate of the bytes that a target takes in headers, manifest and scales, besides its factors."""
    return 8 * len(target.key) + 4096 + target.matrices[0] * (64 * target.rank + 2048)
