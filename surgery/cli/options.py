"""Options that several commands have in common. No torch here: --help must not wait for it."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import click

from surgery.arguments import as_path
from surgery.cli.text import tell
from surgery.format.options import Options


class _PathType(click.Path):
    """A path with its ``~`` expanded, which a shell does only at the beginning of a word, and so not in ``--out=~/x``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return as_path(value, _called(param))


class _ModelType(click.Path):
    """A local folder with its ``~`` expanded, or a repo id or a name as it is. A shell completes paths."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return str(as_path(value, _called(param))) if value.startswith("~") else value


def _called(param: click.Parameter | None) -> str:
    """A parameter as its users know it."""
    if isinstance(param, click.Option):
        return max(param.opts, key=len)
    return "the path" if param is None else param.human_readable_name


PATH = _PathType()
MODEL = _ModelType()


quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress, no notes; errors only.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of text.")
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps."
)
devices_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="DEVICE",
    help="auto, cpu, cuda, cuda:N or mps; several: cuda:0,cuda:1; all: every CUDA device.",
)
revision_option = click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
stream_option = click.option(
    "--stream", is_flag=True, help="Keep at most two weight files of a hub model on the disk at a time."
)
subfolder_option = click.option("--subfolder", metavar="PATH", help="Subfolder with the model, as in a diffusion pipeline.")
rounding_option = click.option(
    "--rounding",
    type=click.Choice(["nearest", "directions"]),
    help="nearest: round each number to the nearest one. directions: round such that the update arrives in its own "
    "directions.  [default: directions for quantized weights and where nearest would lose more than 0.5 % of a weight's "
    "update; else nearest]",
)
dequantize_option = click.option(
    "--dequantize", is_flag=True, help="Write quantized weights as bfloat16, and drop the quantization from config.json."
)
engine_option = click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="local: on this machine; ray: on a Ray cluster, one task for each weight file.",
)
profile_option = click.option("--profile", is_flag=True, help="Print where the time went, by thread and stage.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an earlier result in the output folder.")
overwrite_file_option = click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
factorized_option = click.option(
    "--factorized",
    type=PATH,
    metavar="FOLDER",
    help="For an adapter made by export --to peft-trainable: the factorized folder that it was exported from.",
)
overlay_base_option = click.option(
    "--base", type=MODEL, metavar="MODEL", help="For an overlay: the model it was made from, if not the one the manifest names."
)


_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?)\s*([KMGT]I?)?B?", re.IGNORECASE)


def _bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A number of bytes such as 8GB, 7.5GiB or 500000000."""
    if value is None:
        return None
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise click.BadParameter(f"{value!r} is no size such as 8GB, 500MB or 7.5GiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


#: Adds an option, or several, to a command.
Decorator = Callable[[Callable[..., None]], Callable[..., None]]

_DEFAULTS = Options()
#: Field of ``Options`` -> makes the option of the command line that fills it.
_FIELD_OPTIONS: Mapping[str, Callable[..., Decorator]] = {
    "rank": partial(
        click.option,
        "--rank",
        type=int,
        metavar="K",
        help="How many singular directions to keep of each matrix.  [default: 16]",
    ),
    "energy": partial(
        click.option,
        "--energy",
        type=float,
        metavar="X",
        help="Instead of a rank: keep this share (0 to 1) of each matrix's squared norm.",
    ),
    "max_rank": partial(
        click.option,
        "--max-rank",
        type=int,
        metavar="K",
        help="With --energy: the largest number of directions of a matrix.  [default: 256]",
    ),
    "recipe": partial(
        click.option,
        "--recipe",
        type=MODEL,
        metavar="NAME|FILE",
        help="Which weights are taken, and how they are viewed as matrices; see surgery recipes.  [default: the recipe of the "
        "model's family, if there is one]",
    ),
    "split": partial(
        click.option,
        "--split/--no-split",
        default=None,
        help="Split fused weights (qkv, gate_up) into their projections.  [default: no]",
    ),
    "correction": partial(
        click.option,
        "--correction/--no-correction",
        default=_DEFAULTS.correction,
        help="Store the correction, which makes residuals lossless (0.06 to 0.15 bytes per weight).  [default: correction]",
    ),
    "include": partial(
        click.option,
        "--include",
        multiple=True,
        metavar="GLOB",
        help="Take the weights whose names match, and no others (repeatable).",
    ),
    "exclude": partial(
        click.option, "--exclude", multiple=True, metavar="GLOB", help="Never take tensors that match (repeatable)."
    ),
    "seed": partial(click.option, "--seed", default=_DEFAULTS.seed, show_default=True, help="Seed of the SVD's random start."),
    "tolerance": partial(
        click.option,
        "--tolerance",
        default=_DEFAULTS.tolerance,
        show_default=True,
        help="The SVD stops when all residuals, divided by the largest singular value, are at most this.",
    ),
    "prove": partial(
        click.option,
        "--prove",
        is_flag=True,
        help="Prove for each matrix that no larger singular value was missed; takes longer.",
    ),
}


def fills_options(*parts: str | Decorator, words: Mapping[str, str] | None = None) -> Decorator:
    """Add options to a command, in this order, and hand it one ``Options`` as ``options``.

    Args:
        parts: names of fields of ``Options``, whose values are passed to the command in that object; and, between them, further
            options, whose values are passed one by one.
        words: field -> its help text in this command, where it differs from that in others.
    """
    names = [part for part in parts if isinstance(part, str)]
    words = words or {}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def filled(*args: Any, **given: Any) -> None:
            command(*args, options=Options(**{name: given.pop(name) for name in names}), **given)

        adorned: Callable[..., None] = filled
        for part in reversed(parts):
            if isinstance(part, str):
                part = _FIELD_OPTIONS[part](**({"help": words[part]} if part in words else {}))
            adorned = part(adorned)
        return adorned

    return decorate


def memory_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for the memory that a run may use."""
    host = "Limit for the host memory, such as 8GB.  [default: half of what is free]"
    limit = click.option("--max-memory", callback=_bytes, metavar="SIZE", help=host)
    device = "Limit for the memory of each GPU.  [default: four fifths of it]"
    of_device = click.option("--max-device-memory", callback=_bytes, metavar="SIZE", help=device)
    return limit(of_device(command))


def push_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for uploading a result to the hub."""
    repo = click.option(
        "--push-to-hub", metavar="REPO", help="Also upload the result to this hub repository, file by file while it is made."
    )
    public = click.option(
        "--private/--public", default=True, show_default=True, help="Visibility of the repository, if it is created."
    )
    return repo(public(command))


def notes_and_quiet(command: Callable[..., None]) -> Callable[..., None]:
    """Show warnings of libraries as notes of one line, or not at all with --quiet, and turn off the hub client's bars."""

    @wraps(command)
    def wrapper(*args: Any, quiet: bool, **kwargs: Any) -> None:
        # The hub client reads this when it is imported. Its bars and ours would write over each other.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with warnings.catch_warnings(record=True) as caught:
            try:
                command(*args, quiet=quiet, **kwargs)
            finally:
                for message in dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught):
                    tell(f"note: {message}", quiet=quiet)

    return wrapper
