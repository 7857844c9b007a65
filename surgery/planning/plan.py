"""What a run will do, from headers alone: the one object behind --dry-run, progress, disk check and engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery.errors import FormatError, OptionError
from surgery.format.safetensors import Header
from surgery.planning.memory import CORRECTION_BYTES, Memory, Resources, collected_bytes, need_to_factorize, share_out
from surgery.planning.quantization import read_quantization
from surgery.planning.recipes import Recipe, builtin_recipes, find_recipe, recipe_for_family
from surgery.planning.targets import Choice, Model, Skipped, Target, check_choice, choose, matches
from surgery.source.model import Source, check_index

Layout = Literal["residual", "overlay"]
LAYOUTS: tuple[Layout, ...] = ("residual", "overlay")


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One weight file of the source and its targets."""

    file: str
    size: int
    header: Header
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a factorize run will do.

    Attributes:
        layout: ``residual`` or ``overlay``.
        recipe: the name of the recipe that applies, asked for or by the model's family; None: the defaults for any model.
        choice: what was asked for.
        shards: in the order they are worked on.
        skipped: every tensor without a target, with the reason.
        notes: what the user should know before the run.
        bytes_read, bytes_written: over the whole run; written is an upper estimate.
        download_bytes: what a model from the hub still has to be fetched of.
        temporary_bytes: how much of that is on the disk at a time: all of it, in the hub's cache, unless it is streamed.
        memory: how many matrices are worked on at a time, and what that takes.
    """

    layout: Layout
    recipe: str | None
    choice: Choice
    shards: tuple[ShardPlan, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    download_bytes: int
    temporary_bytes: int
    memory: Memory

    @property
    def targets(self) -> list[Target]:
        return [target for shard in self.shards for target in shard.targets]

    @property
    def trainable(self) -> int:
        """Number of trainable scales; the most where an energy decides."""
        return sum(target.trainable for target in self.targets)


def make_plan(
    source: Source, choice: Choice, layout: Layout | None = None, resources: Resources | None = None, *, correction: bool = True
) -> Plan:
    """Plan a factorization without reading a weight; without ``resources`` for one core.

    Without a layout it is the residual one, or the overlay where a target is quantized.

    Raises:
        OptionError: the choice makes no sense for this model, or selects nothing.
        SourceError: the model is quantized in a way that is not supported.
        FormatError: the headers contradict each other, the index or the config.
    """
    headers = {shard: source.header(shard) for shard in source.selection.shards}
    check_index(source, headers)
    names = _all_names(headers, source.name)
    check_choice(choice, names)
    config = source.config()
    recipe = find_recipe(choice.recipe) if choice.recipe is not None else recipe_for_family(config)
    model = Model(config, recipe, read_quantization(config, headers, source.name))
    shards, skipped = [], []
    for file, header in headers.items():
        targets: list[Target] = []
        for entry in header.tensors:
            for fate in choose(entry, file, choice, model):
                if isinstance(fate, Skipped):
                    skipped.append(fate)
                else:
                    targets.append(fate)
        shards.append(ShardPlan(file, source.size(file), header, tuple(targets)))
    every = [target for shard in shards for target in shard.targets]
    if not every:
        raise _nothing_selected(source.name, choice, recipe, skipped)
    if choice.max_rank is not None and not any(target.energy is not None for target in every):
        raise OptionError(
            "a largest rank goes with an energy", got=f"max-rank {choice.max_rank} without one", hint="--energy 0.5"
        )
    layout = _layout(layout, every)
    if layout == "overlay" and not correction:
        raise OptionError(
            "an overlay has no correction to leave out", hint="drop --no-correction: its weights stay as they are"
        )
    weights = sum(shard.size for shard in shards)
    twice = {
        target.tensor: target.stored_bytes for target in every if target.energy is not None and target.view.kind == "stack"
    }
    others = sum(source.size(file) for file in source.selection.others)
    factors = sum(target.factor_bytes + _described_bytes(target) for target in every)
    written = others + factors
    if layout == "residual":
        written += weights + (int(CORRECTION_BYTES * sum(target.entries for target in every)) if correction else 0)
    room = source.room_to_fetch()
    return Plan(
        layout=layout,
        recipe=recipe.name if recipe else None,
        choice=choice,
        shards=tuple(shards),
        skipped=tuple(skipped),
        notes=(
            *_rank_notes(every),
            *_wanted_notes(skipped, len(every)),
            *_recipe_notes(choice, recipe, names),
            *_split_notes(choice, every),
        ),
        bytes_read=weights + sum(twice.values()),
        bytes_written=written,
        download_bytes=source.bytes_to_fetch(),
        temporary_bytes=room[1] if room else 0,
        memory=share_out(
            [need_to_factorize(target) for target in every], resources or Resources(), kept=collected_bytes(every)
        ),
    )


def _layout(asked: Layout | None, targets: list[Target]) -> Layout:
    quantized = [target for target in targets if target.scaled is not None]
    if not quantized:
        return asked or "residual"
    if asked == "residual":
        raise OptionError(
            f"{len(quantized)} of {len(targets)} targets are FP8, which has no residual layout",
            got=f"{quantized[0].tensor}, {quantized[0].dtype}",
            hint="--layout overlay: the weights stay as they are, and the factors are those of the dequantized weights",
        )
    return "overlay"


def _all_names(headers: dict[str, Header], model: str) -> list[str]:
    owner: dict[str, str] = {}
    for shard, header in headers.items():
        for entry in header.tensors:
            if entry.name in owner:
                raise FormatError(f"{model}: {entry.name!r} is in two shards", got=f"{owner[entry.name]} and {shard}")
            owner[entry.name] = shard
    return list(owner)


def _nothing_selected(model: str, choice: Choice, recipe: Recipe | None, skipped: list[Skipped]) -> OptionError:
    if choice.include:
        asked = [f"{s.tensor} ({s.reason})" for s in skipped if matches(s.tensor, choice.include)]
        return OptionError(f"nothing that --include matches in {model} can be factorized", got="; ".join(asked[:5]))
    matrices = [s for s in skipped if not s.reason.startswith(("a vector", "no floating"))]
    near = [f"{s.tensor} ({s.reason})" for s in matrices[:5]]
    if recipe is not None:
        return OptionError(
            f"the recipe {recipe.name} takes no tensor of {model}",
            got="; ".join(near) or f"{len(skipped)} tensors, none of them a matrix of floating-point numbers",
            hint="surgery recipes lists the others; --include GLOB takes any weight by name",
        )
    return OptionError(
        f"no tensor of {model} is a target",
        got="; ".join(near) or f"{len(skipped)} tensors, none of them a matrix of floating-point numbers",
        expected="weights of linear layers inside transformer blocks",
        hint="--include GLOB takes any weight by name" if matrices else None,
    )


def _rank_notes(targets: list[Target]) -> list[str]:
    exact = [target for target in targets if target.energy is None]
    clamped = [target for target in exact if target.rank < target.asked]
    if not clamped:
        return []
    first = clamped[0]
    if len(clamped) == len(targets):
        largest = max(min(target.matrices[1:]) for target in targets)
        raise OptionError(
            f"rank {first.asked} is larger than every target",
            expected=f"at most {largest}, the largest smaller side of a target",
        )
    return [
        f"rank {first.asked} is larger than {len(clamped)} of {len(targets)} targets and is cut to their smaller side there "
        f"(first: {first.key} {list(first.matrices[1:])}, rank {first.rank})"
    ]


def _wanted_notes(skipped: list[Skipped], targets: int) -> list[str]:
    """What would be a target but for its dtype or its number of dimensions."""
    wanted = [item for item in skipped if item.wanted]
    by_reason: dict[str, list[str]] = {}
    for item in wanted:
        by_reason.setdefault(item.reason, []).append(item.tensor)
    return [
        f"{reason}: {len(tensors)} of {targets + len(wanted)} that would be targets are passed over (first: {tensors[0]})"
        for reason, tensors in by_reason.items()
    ]


def _recipe_notes(choice: Choice, recipe: Recipe | None, names: list[str]) -> list[str]:
    """Rules that match nothing, in a recipe of the user's own: probably a slip."""
    if recipe is None or choice.recipe is None or choice.recipe in builtin_recipes():
        return []
    used = {id(rule) for name in names if (rule := recipe.rule_for(name))}
    return [
        f"recipe {recipe.name}: rule {i + 1} ({rule.text}) decides on no tensor of this model"
        for i, rule in enumerate(recipe.rules)
        if id(rule) not in used
    ]


def _split_notes(choice: Choice, targets: list[Target]) -> list[str]:
    if not choice.split or any(target.view.slice for target in targets):
        return []
    return ["--split changes nothing here: no target is known to fuse several projections"]


def _described_bytes(target: Target) -> int:
    """Upper estimate of what a target takes in headers, manifest and scales besides its numbers."""
    return 8 * len(target.key) + 4096 + target.matrices[0] * (64 * target.rank + 2048)
