"""Which files of a model are its weights, which go along, and which stay behind: a pure function of names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from surgery.errors import FormatError, SourceError
from surgery.format.files import check_relative_path
from surgery.names import OUR_FILES

#: Weights in other formats. None of them is ever opened.
OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml",
    ".ot", ".npz", ".npy", ".tflite", ".mlmodel", ".pb", ".tar", ".zip", ".gz",
)  # fmt: skip

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Selection:
    """Paths relative to the model, in name order.

    Attributes:
        shards: safetensors files with the weights.
        index: the index that names them, if there is one.
        others: files that go along as they are (config, tokenizer, code ...).
        left_out: file -> why it stays behind.
    """

    shards: tuple[str, ...]
    index: str | None
    others: tuple[str, ...]
    left_out: Mapping[str, str]


def select_files(names: list[str], read_text: Callable[[str], str], *, where: str) -> Selection:
    """Sort the files of a model.

    Args:
        names: all files, relative with forward slashes.
        read_text: gives the text of one of them; asked for the index only.
        where: the model, for messages.

    Raises:
        SourceError: no safetensors weights.
        FormatError: a name that leaves the folder; an index that is no index, or names a file that is missing or elsewhere.
    """
    for name in names:
        check_relative_path(name, where)
    if any(OUR_FILES.fullmatch(name) for name in names):
        raise SourceError(
            f"{where} is itself a factorized checkpoint, finished or not",
            hint="fold it first, or give the original model",
        )
    left_out: dict[str, str] = {}
    others: list[str] = []
    weights: list[str] = []
    for name in sorted(names):
        path = PurePosixPath(name)
        if any(part.startswith(".") for part in path.parts[:-1]):
            left_out[name] = "in a hidden folder"
        elif path.suffix == ".partial":
            left_out[name] = "an unfinished file"
        elif path.name.endswith(OTHER_WEIGHTS):
            left_out[name] = "weights in another format"
        elif path.parts[0] == "original":
            left_out[name] = "the publisher's own copy of the weights"
        elif len(path.parts) == 1 and path.suffix == ".safetensors":
            weights.append(name)
        else:
            others.append(name)
    shards, index = _shards(
        weights, [name for name in others if name.endswith(INDEX_SUFFIX) and "/" not in name], read_text, where
    )
    if not shards:
        pickles = sorted(name for name in left_out if name.endswith(_PICKLES) and left_out[name] == "weights in another format")
        if pickles:
            raise SourceError(
                f"{where} has no safetensors weights, only a pickle checkpoint, which is never opened",
                got=", ".join(pickles[:3]),
                hint="convert it once: AutoModel.from_pretrained(MODEL).save_pretrained(FOLDER) writes safetensors",
            )
        folders = sorted({name.rpartition("/")[0] for name in others if name.endswith(".safetensors")})
        if folders:
            raise SourceError(
                f"{where} has no weights at its top, but in its subfolders",
                got=", ".join(folders),
                hint=f"take one of them: --subfolder {_likely(folders)}",
            )
        raise SourceError(
            f"{where} has no safetensors weights", got=", ".join(sorted(names)[:5]) or "no files", expected="*.safetensors"
        )
    for name in weights:
        if name not in shards:
            left_out[name] = f"not among the weights that {index or shards[0]} stands for"
    for name in list(others):
        if name.endswith(INDEX_SUFFIX) and "/" not in name and name != index:
            others.remove(name)
            left_out[name] = f"not among the weights that {index or shards[0]} stands for"
    return Selection(tuple(shards), index, tuple(others), left_out)


def _likely(folders: list[str]) -> str:
    """Of a diffusion pipeline the part that people fine-tune."""
    return next((name for name in ("transformer", "unet") if name in folders), folders[0])


def _shards(
    weights: list[str], indexes: list[str], read_text: Callable[[str], str], where: str
) -> tuple[list[str], str | None]:
    """The weight files, as transformers would choose them: a single file first, then the index."""
    weights = [name for name in weights if not name.startswith("adapter_")]
    for single in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        if single in weights:
            return [single], None
    index = next((name for name in ("model" + INDEX_SUFFIX, "diffusion_pytorch_model" + INDEX_SUFFIX) if name in indexes), None)
    index = index or (indexes[0] if indexes else None)
    if index is None:
        return weights, None
    named = sorted(set(index_entries(read_text(index), f"{where}/{index}").values()))
    for name in named:
        if name not in weights:
            raise FormatError(
                f"{where}/{index} names a shard that is not there",
                got=repr(name)[:200],
                expected=f"one of {len(weights)} safetensors files",
                hint="the model is incomplete: fetch the missing file",
            )
    return named, index


_READ_BY_LOADERS = re.compile(
    r"[^/]*config[^/]*\.json|(tokenizer|vocab|chat_template|special_tokens_map|added_tokens|modules|preprocessor)[^/]*\.(json|txt)"
    r"|[^/]*merges\.txt|[^/]*\.(py|jinja|model|tiktoken)|(README|LICENSE|NOTICE)(\.\w+)?"
)


def is_read_by_loaders(name: str) -> bool:
    """Whether loaders look for a file of this name in any model: weights, index, config, tokenizer, code, card and the like."""
    at_top = "/" not in name
    return at_top and (name.endswith((".safetensors", INDEX_SUFFIX)) or _READ_BY_LOADERS.fullmatch(name) is not None)


def index_entries(text: str, where: str) -> dict[str, str]:
    """Tensor name -> shard, from the text of an index.

    Raises:
        FormatError: no index, or one with paths outside the folder.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON ({error})") from None
    entries = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(entries, dict) or not entries or not all(isinstance(shard, str) for shard in entries.values()):
        raise FormatError(f"{where}: no weight_map of tensor names to shards")
    for shard in set(entries.values()):
        check_relative_path(shard, where)
    return entries
