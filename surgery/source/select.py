"""Which files of a model are its weights, which go along, and which stay behind: by their names, and by what configs name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import translate
from pathlib import PurePosixPath

from surgery.errors import FormatError, ReadError, SourceError, SurgeryError, few
from surgery.escapes import has_surrogates, quoted
from surgery.files.json_files import decode_json
from surgery.files.paths import check_relative_path, file_key
from surgery.names import (
    CONFIG_FILE,
    JOURNAL_DIR,
    MANIFEST_FILE,
    OUR_FILES,
    RESERVED_SUFFIX,
    RUN_FILE,
    SURGERY_DIR,
    is_litter,
    is_reserved,
)
from surgery.source.shards import SUFFIX, choose_shards, is_index

#: Weights in other formats. None of them is ever opened.
OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml",
    ".ot", ".npz", ".npy", ".tflite", ".mlmodel", ".pb", ".tar", ".zip", ".gz",
)  # fmt: skip

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
#: Small arrays that code of a model may read beside its weights.
_ARRAYS = (".npz", ".npy")
_MODULES_FILE = "modules.json"
_PIPELINE_FILE = "model_index.json"
_ALPHABET_FILE = "alphabet.json"
_ADAPTER_FILE = "adapter_config.json"


def _names(*globs: str) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, globs)), re.IGNORECASE)


#: Files at the top of a model that loaders look for by name, and may find the names of others in.
_CONFIGS = _names(
    CONFIG_FILE, "configuration.json", "generation_config*.json", "*processor_config.json", "*tokenizer_config.json",
    _MODULES_FILE, "router_config.json", "config_sentence_transformers.json", "sentence_*_config.json", "open_clip_config.json",
    _PIPELINE_FILE, "scheduler_config.json", "speaker_embeddings_path.json",
)  # fmt: skip
#: The same of all that is no config, and of card and licences.
_KNOWN = _names(
    "hf_quant_config.json", "quant*_config.json", "params.json", "chat_template*.json", "*.jinja",
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*.tokenizer", "*.model", "*.model.v[0-9]*", "*.spm",
    "*.tiktoken", "tekken*.json", "*vocab*.json", "*vocab*.txt", "vocab.*", "*.vocab", "*merges*.txt", "*.bpe", "*.codes",
    "dict*.txt", "encoder.json", "emoji.json", "byte_maps.json", "normalizer.json", "word_shape.json",
    "word_pronunciation.json", _ALPHABET_FILE, "*.py", "requirements.txt", "modelcard.json",
)  # fmt: skip
_CARD = re.compile(
    r"(readme|citation|authors|[^/]*(licen[cs]e|copying|notice|(usage|use)[_-]?policy|terms[_-]of[_-]use|acceptable[_-]use))"
    r"([^/]*\.(md|txt|rst|html?|pdf|cff)|[^/.]*(\d[\d.]*)?)",
    re.IGNORECASE,
)
_ADAPTER = _names(
    _ADAPTER_FILE, "adapter_*.safetensors", "adapter_*.bin", "adapter_*.index.json", "*adapters.safetensors",
    "*adapters.npz", "pytorch_lora_weights.*",
)  # fmt: skip
#: Folders that loaders look into, and for what.
_KNOWN_FOLDERS = {"additional_chat_templates": _names("*.jinja"), "custom_generate": _names("*.py", "requirements.txt")}
_OF_A_RUN = _names(
    "training_args.*", "trainer_state.json", "optimizer*.bin", "optimizer*.pt", "optimizer*.pth", "optimizer*.safetensors",
    "scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state*", "random_states_*", "events.out.tfevents.*", "*_results.json",
    "*.distcp", "zero_to_fp32.py", "*.log", "checkpoint-*[0-9]", "global_step*[0-9]", "wandb", "runs", "logs", "mlruns",
    "lightning_logs",
)  # fmt: skip
#: What programs call a file while they fetch it, or keep beside it.
_DOWNLOADS = (".incomplete", ".tmp", ".part", ".crdownload", ".download", ".aria2")
_LEFTOVERS = (RESERVED_SUFFIX, *_DOWNLOADS, ".bak", ".orig", ".old", ".swp", ".lock", "~")
_SPARE = "an unfinished file or a spare copy"
#: A file that was fetched or copied again, as browsers and file managers call it: model (1).safetensors.
_COPY = re.compile(r"(?P<name>.+?)(?: ?\(\d+\)| - Copy(?: \(\d+\))?| copy(?: \d+)?)(?P<suffix>\.[^. ]+)")
#: Where the hub's client keeps what it fetches into a folder of one's own.
_FETCHED = ".cache/huggingface/download"
_OTHER_FORMAT = "weights in another format"
_CONVERT = "AutoModel.from_pretrained(MODEL).save_pretrained(FOLDER) writes safetensors"
_UNREAD = "no loader looks for it"
_QUOTED = re.compile(r"""\"([^"\n\\]*)\"|'([^'\n\\]*)'""")
#: Possessive, and a bracket need not be closed: each character of whatever code is looked at a few times.
_IMPORT = re.compile(r"^[^\S\n]*+(?:from\s++\.++([\w.]*+)\s++import\s++(\([^)]*+|[^\n]*+)|import\s++\.([\w.]++))", re.MULTILINE)

#: Gives the names in a folder of the model, ``""`` for the model's own; those of folders end in a slash.
Listing = Callable[[str], list[str]]


@dataclass(frozen=True, slots=True)
class Selection:
    """Paths relative to the model, in name order.

    Attributes:
        shards: safetensors files with the weights.
        index: the index that names them, if there is one.
        others: files that go along as they are (config, tokenizer, code ...).
        left_out: file -> why it stays behind; a folder of which nothing goes along is one entry, with a slash at its end.
        rivals: weight files that are left out, and may be those of another save of this model, by their names.
        notes: what the user should know about what is left out.
    """

    shards: tuple[str, ...]
    index: str | None
    others: tuple[str, ...]
    left_out: Mapping[str, str]
    rivals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def listing_of(names: Iterable[str]) -> Listing:
    """The listing of a model whose files are all known by name."""
    folders: dict[tuple[str, ...], set[str]] = {}
    for name in names:
        parts = name.split("/")  # "/a" is in a folder without a name, and not at the top
        for depth in range(len(parts)):
            slash = "/" if depth + 1 < len(parts) else ""
            folders.setdefault(tuple(parts[:depth]), set()).add(parts[depth] + slash)
    return lambda folder: sorted(folders.get(tuple(folder.split("/")) if folder else (), ()))


def is_read_by_loaders(name: str) -> bool:
    """Whether loaders look for a file of this name in any model: weights, index, config, tokenizer, code, card and the like.

    By the name alone: files that only the config of one model names are not among them.
    """
    folder, _, file = name.rpartition("/")
    if folder:
        return folder in _KNOWN_FOLDERS and _KNOWN_FOLDERS[folder].fullmatch(file) is not None
    return name.endswith(SUFFIX) or is_index(name) or (_stays(name) is None and _is_known(name))


def select_files(listing: Listing, read_text: Callable[[str], str], *, where: str) -> Selection:
    """Sort the files of a model. Folders of which nothing goes along are not looked into.

    Args:
        listing: names the files.
        read_text: gives the text of one of them; asked for the index, configs and code only.
        where: the model, for messages.

    Raises:
        SourceError: no safetensors weights, or those of several models.
        FormatError: a name that ``check_relative_path`` refuses; an index that is no index, or names a file that is missing or
            elsewhere; a numbered weight file that is missing.
    """
    return _Selector(listing, read_text, where).selection()


def select_plain_files(listing: Listing, read_text: Callable[[str], str], *, where: str) -> Selection:
    """``select_files`` of a listing with any names, a hub's or a disk's.

    A file or folder whose name ``check_relative_path`` refuses is left out with its reason, if no loader looks for it.

    Raises:
        SourceError, FormatError: see ``select_files``; such a name of what loaders look for, or one that is no text.
    """
    left_out: dict[str, str] = {}

    def is_taken(folder: str, name: str) -> bool:
        try:
            check_relative_path(_path(folder, name), where)
        except FormatError as error:
            if is_read_by_loaders(name) or has_surrogates(name):  # which no manifest could list
                hint = "give a copy of the model in which it has another name"
                raise FormatError(error.what, got=error.got, expected=error.expected, hint=hint) from None
            left_out[f"{folder}/{name}" if folder else name] = "a name that not every system allows"
            return False
        return True

    found = select_files(lambda folder: [name for name in listing(folder) if is_taken(folder, name)], read_text, where=where)
    return replace(found, left_out=dict(sorted({**found.left_out, **left_out}.items())))


def _path(folder: str, name: str) -> str:
    """Of what a listing of a folder names."""
    return f"{folder}/{name.removesuffix('/')}" if folder else name.removesuffix("/")


class _Selector:
    def __init__(self, listing: Listing, read_text: Callable[[str], str], where: str) -> None:
        self._listing = listing
        self._read_text = read_text
        self._where = where
        top = self._names("")
        self._files = [name for name in top if not name.endswith("/")]
        self._folders = [name[:-1] for name in top if name.endswith("/")]
        self._others: list[str] = []
        self._left_out: dict[str, str] = {}

    def selection(self) -> Selection:
        self._refuse_our_own()
        weights: list[str] = []
        indexes: list[str] = []
        adapter: list[str] = []
        unknown: list[str] = []
        copies: list[str] = []
        for name in self._files:
            if _ADAPTER.fullmatch(name):
                adapter.append(name)
                self._left_out[name] = "an adapter"
            elif (reason := _stays(name)) is not None:
                self._left_out[name] = reason
            elif name.endswith(SUFFIX) and self._is_copy(name):
                copies.append(name)
                self._left_out[name] = _SPARE
            elif name.endswith(SUFFIX):
                weights.append(name)
            elif is_index(name):
                indexes.append(name)
            elif _is_known(name):
                self._others.append(name)
            else:
                unknown.append(name)
        self._refuse_pipeline(weights)
        chosen = choose_shards(weights, indexes, self._named_weights(), self._read_text, self._where)
        if not chosen.shards:
            raise self._no_weights(adapter)
        if halves := [name for name in chosen.shards if f"{name}.aria2" in self._files]:
            raise SourceError(
                f"{self._where}/{halves[0]} is not all there: its download was not finished",
                got=f"{halves[0]}.aria2 beside it",
                hint="finish the download",
            )
        self._left_out |= chosen.left_out
        self._others += [chosen.index] if chosen.index is not None else []
        self._take_what_is_named(unknown)
        if reserved := [name for name in self._others if is_reserved(name)]:
            raise SourceError(
                f"{self._where} needs files of its own in {SURGERY_DIR}/, where a result has its factors",
                got=few(reserved),
                hint="give that folder another name in a copy of the model, also where configs and code name it",
            )
        notes = []
        if unread := (*chosen.unread, *copies):
            notes.append(f"weight files that lie there and are not read: {few(unread)}")
        if adapter:
            notes.append(f"left out, since loaders would take the result for an adapter: {few(adapter)}")
        self._tell_apart([*chosen.shards, *self._others])
        others, left_out = tuple(sorted(self._others)), dict(sorted(self._left_out.items()))
        return Selection(chosen.shards, chosen.index, others, left_out, (*chosen.rivals, *copies), tuple(notes))

    def _is_copy(self, name: str) -> bool:
        """Whether a file is another copy of one that is there, by its name."""
        match = _COPY.fullmatch(name)
        return match is not None and match["name"] + match["suffix"] in self._files

    def _names(self, folder: str) -> list[str]:
        names = self._listing(folder)
        for name in names:
            check_relative_path(_path(folder, name), self._where)
        return names

    def _tell_apart(self, chosen: list[str]) -> None:
        """Of cards and licences that are one where a disk does not tell case or normal forms apart, only the first goes along.

        Raises:
            SourceError: others; or a file and a folder of one name.
        """
        seen: dict[str, str] = {}
        for file in sorted(chosen):
            for path in (*(f"{parent}/" for parent in reversed(PurePosixPath(file).parents[:-1])), file):
                before = seen.setdefault(file_key(path.removesuffix("/")), path)
                if before == path:
                    continue
                if path == file and _CARD.fullmatch(file) and _CARD.fullmatch(before):
                    self._others.remove(file)
                    self._left_out[file] = f"the same name as {before}, where case is not told apart"
                    break
                raise SourceError(
                    f"{self._where} has two files whose names are one on disks that do not tell case apart",
                    got=f"{before!r} and {path!r}",
                    hint="remove the one that is not meant, in a copy of the model",
                )

    def _text(self, file: str) -> str:
        """Of a config or of code; none if it is not sound, which is said by who reads it as what it is."""
        try:
            return self._read_text(file)
        except (FormatError, ReadError):
            return ""

    def _refuse_our_own(self) -> None:
        inside = [
            f"{folder}/{name}"
            for folder in (SURGERY_DIR, JOURNAL_DIR)
            if folder in self._folders
            for name in self._peek(folder)
        ]
        if RUN_FILE in inside:
            raise SourceError(
                f"{self._where} is an unfinished result",
                hint="repeat the command that writes it, which goes on where it stopped, or give another model",
            )
        if any(map(OUR_FILES.fullmatch, inside)):
            raise SourceError(
                f"{self._where} is itself a factorized checkpoint",
                hint="fold it first, or give the original model",
            )

    def _named_weights(self) -> str | None:
        """The weights that the config names, which transformers looks at before any other."""
        if CONFIG_FILE not in self._others:
            return None
        try:
            config = decode_json(self._text(CONFIG_FILE))
        except ValueError:
            return None
        named = config.get("transformers_weights") if isinstance(config, dict) else None
        return named if isinstance(named, str) else None

    # -- what goes along -------------------------------------------------------------------------------------------------

    def _take_what_is_named(self, unknown: list[str]) -> None:
        """Files and folders that no loader knows by name: those that a config or the model's code names go along."""
        modules = self._modules()
        packages, quoted = self._called() if unknown or set(self._folders) - modules else (set(), set())
        for name in unknown:
            if name in quoted:
                self._others.append(name)
            else:
                self._left_out[name] = _UNREAD
        for folder in self._folders:
            before = len(self._others)
            reason = _stays(folder) or ("the publisher's own copy of the weights" if folder == "original" else None)
            if reason is None:
                if folder in modules:
                    self._take_module(folder)
                elif folder in packages:
                    self._take_some(folder, _names("*.py"))
                elif folder in _KNOWN_FOLDERS:
                    self._take_some(folder, _KNOWN_FOLDERS[folder])
                self._take_called(folder, quoted)
            if len(self._others) == before:
                self._left_out[f"{folder}/"] = reason or _UNREAD

    def _modules(self) -> set[str]:
        """The folders that loaders look into whatever is in them: sentence-transformers' modules, each with a config and maybe
        weights; further tokenizers of transformers' processors; the n-grams that a decoder of speech has an alphabet for."""
        found = {
            string.split("/")[0]
            for file in (_MODULES_FILE, "router_config.json")
            if file in self._others
            for string in _strings(self._text(file))
        }
        found |= {folder for folder in self._folders if folder.endswith("_tokenizer")}
        found |= {"language_model"} if _ALPHABET_FILE in self._others else set()
        return found & set(self._folders)

    def _called(self) -> tuple[set[str], set[str]]:
        """Of the code that the configs name: the packages that it imports; and all strings in that code and in the configs."""
        quoted: set[str] = set()
        for file in self._others:
            if _CONFIGS.fullmatch(file):
                quoted |= _strings(self._text(file))
        imported = {string.rpartition("--")[2].split(".")[0] for string in quoted if "." in string}
        seen: set[str] = set()
        while todo := sorted(name for name in imported - seen if f"{name}.py" in self._others):
            for name in todo:
                seen.add(name)
                text = self._text(f"{name}.py")
                quoted |= _strings(text)
                for package, members, module in _IMPORT.findall(text):
                    found = [package or module] if package or module else re.findall(r"\w+", members)
                    imported |= {part.split(".")[0] for part in found}
        return imported & set(self._folders), quoted

    def _take_module(self, folder: str) -> None:
        files = list(self._walk(folder))
        with_weights = {PurePosixPath(file).parent for file in files if file.endswith(SUFFIX)}
        for file in files:
            path = PurePosixPath(file)
            # A module whose only weights are a pickle is nothing without it; it is copied, not opened.
            needed = path.suffix in _PICKLES and path.parent not in with_weights and not _OF_A_RUN.fullmatch(path.name)
            reason = None if needed else _stays(path.name)
            if reason is None:
                self._others.append(file)
            else:
                self._left_out[file] = reason

    def _take_some(self, folder: str, names: re.Pattern[str]) -> None:
        for file in self._walk(folder):
            name = PurePosixPath(file).name
            if names.fullmatch(name) and not is_litter(name):
                self._others.append(file)

    def _take_called(self, folder: str, quoted: set[str]) -> None:
        """Files in a folder that are named by their path; an adapter in a folder that is named."""
        if folder in quoted and _ADAPTER_FILE in self._peek(folder):
            self._take_some(folder, _ADAPTER)
        wanted = {string for string in quoted if string.startswith(f"{folder}/")} - set(self._others)
        parents = {string.rpartition("/")[0] for string in wanted}
        there = {f"{parent}/{name}" for parent in sorted(parents) if self._is_folder(parent) for name in self._names(parent)}
        self._others += [file for file in sorted(wanted & there) if _stays(PurePosixPath(file).name) is None]

    def _is_folder(self, folder: str) -> bool:
        parent, _, name = folder.rpartition("/")
        return (not parent or self._is_folder(parent)) and f"{name}/" in self._names(parent)

    def _walk(self, folder: str) -> Iterator[str]:
        """The files in a folder and in the folders in it, but for those that never go along."""
        for name in self._names(folder):
            if not name.endswith("/"):
                yield f"{folder}/{name}"
            elif (reason := _stays(name[:-1])) is None:
                yield from self._walk(f"{folder}/{name[:-1]}")
            else:
                self._left_out[f"{folder}/{name}"] = reason

    # -- where the model is not ------------------------------------------------------------------------------------------

    def _subfolders(self) -> list[str]:
        """Folders with safetensors weights, at most two deep."""
        folders = [folder for folder in self._folders if _stays(folder) is None and folder not in ("original", SURGERY_DIR)]
        for folder in list(folders):
            folders += [f"{folder}/{name[:-1]}" for name in self._peek(folder) if name.endswith("/") and name[0] != "."]
        return sorted(folder for folder in folders if self._is_model(folder))

    def _is_model(self, folder: str) -> bool:
        """Whether a folder holds weights of a model, and is no result of ours."""
        names = self._peek(folder)
        is_ours = f"{SURGERY_DIR}/" in names and MANIFEST_FILE.rpartition("/")[2] in self._peek(f"{folder}/{SURGERY_DIR}")
        return not is_ours and any(
            name.endswith(SUFFIX) and _stays(name) is None and not _ADAPTER.fullmatch(name) for name in names
        )

    def _peek(self, folder: str) -> list[str]:
        """What is in a folder that may not be looked into."""
        try:
            return self._names(folder)
        except SurgeryError:
            return []

    def _refuse_pipeline(self, weights: list[str]) -> None:
        """Refuse the top of a pipeline that is no model itself, whether or not a file of the whole pipeline lies there."""
        if _PIPELINE_FILE not in self._others or CONFIG_FILE in self._others:
            return
        folders = self._subfolders()
        raise SourceError(
            f"{self._where} is a pipeline of several models ({_PIPELINE_FILE}), which lie in its subfolders",
            got=(", ".join(folders) or "no subfolder with safetensors weights")
            + (f"; and at the top {few(weights)}" if weights else ""),
            expected="one model",
            hint=f"take one of them: --subfolder {_likely(folders)}"
            if folders
            else "if they are in another format: DiffusionPipeline.from_pretrained(MODEL).save_pretrained(FOLDER)",
        )

    def _no_weights(self, adapter: list[str]) -> SourceError:
        if folders := self._subfolders():
            return SourceError(
                f"{self._where} has no weights at its top, but in its subfolders",
                got=", ".join(folders),
                hint=f"take one of them: --subfolder {_likely(folders)}",
            )
        if adapter:
            return self._only_adapter(adapter)
        if checkpoints := [folder for folder in self._folders if _OF_A_RUN.fullmatch(folder) and self._is_model(folder)]:
            checkpoints.sort(key=lambda folder: [int(number) for number in re.findall(r"\d+", folder)])
            return SourceError(
                f"{self._where} is the folder of a training run, which has its weights in checkpoints",
                got=few(reversed(checkpoints)),
                hint=f"take one of them: --subfolder {quoted(checkpoints[-1])}",
            )
        if inside := [folder for folder in self._folders if _ADAPTER_FILE in self._peek(folder)]:
            return SourceError(
                f"{self._where} holds adapters in its subfolders, and no safetensors weights of a model",
                got=few(inside),
                hint="give the model that they were trained on; surgery fold --lora adds an adapter",
            )
        halves = [name for name in self._files if name.endswith(_DOWNLOADS)]
        if ".cache" in self._folders:
            halves += [f"{_FETCHED}/{name}" for name in self._peek(_FETCHED) if name.endswith(_DOWNLOADS)]
        if halves:
            return SourceError(
                f"{self._where} has no safetensors weights, only downloads that were not finished",
                got=few(halves),
                hint="fetch the model again: hf download goes on where it stopped",
            )
        inside = [f"{folder}/{name}" for folder in self._folders if _stays(folder) is None for name in self._peek(folder)]
        reasons = {name: _stays(PurePosixPath(name).name) for name in (*self._files, *inside)}
        arrays = [name for name, reason in reasons.items() if reason is None and name.endswith(_ARRAYS)]
        others = [name for name, reason in reasons.items() if reason == _OTHER_FORMAT] + arrays
        for suffixes, kind, hint in (
            (_PICKLES, "a pickle checkpoint, which is never opened", f"convert it once: {_CONVERT}"),
            ((".gguf", ".ggml"), "GGUF", "give the model that it was made from; its card names it"),
            ((".onnx", ".onnx_data"), "ONNX", "give the model that it was exported from; its card names it"),
            (OTHER_WEIGHTS, "weights in another format", f"give the model in safetensors; of Flax or TensorFlow: {_CONVERT}"),
        ):
            if found := [name for name in others if name.endswith(suffixes)]:
                return SourceError(f"{self._where} has no safetensors weights, only {kind}", got=few(found), hint=hint)
        names = [*self._files, *(f"{folder}/" for folder in self._folders)]
        return SourceError(f"{self._where} has no safetensors weights", got=few(names) or "no files", expected="*.safetensors")

    def _only_adapter(self, adapter: list[str]) -> SourceError:
        try:
            config = decode_json(self._text(_ADAPTER_FILE)) if _ADAPTER_FILE in adapter else None
        except ValueError:
            config = None
        base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
        is_named = isinstance(base, str) and base != "" and base.isprintable()
        model = quoted(base) if is_named else "MODEL, the one that it was trained on"
        return SourceError(
            f"{self._where} holds an adapter and no safetensors weights of a model",
            got=few(adapter) + (f"; base_model_name_or_path: {base!r}" if is_named else ""),
            hint=f"surgery factorize {model}; with the trained scales: surgery fold FACTORIZED SCALES --lora "
            f"{quoted(self._where)}. Or merge it first, with merge_and_unload() of PEFT, and factorize what that gives",
        )


def _stays(name: str) -> str | None:
    """Why a file or folder of this name never goes along; None if it may."""
    if name.startswith("."):
        return "hidden"
    if is_litter(name):
        return "left by a file manager"
    if name.endswith(_LEFTOVERS):
        return _SPARE
    if _OF_A_RUN.fullmatch(name):
        return "left by a training run"
    if name.endswith(OTHER_WEIGHTS) and not name.endswith(_ARRAYS):
        return _OTHER_FORMAT
    return None


def _is_known(name: str) -> bool:
    return any(names.fullmatch(name) for names in (_CONFIGS, _KNOWN, _CARD))


def _strings(text: str) -> set[str]:
    """All strings in JSON or Python, without a ``./`` before them."""
    try:
        found, todo = [], [json.loads(text)]
        while todo:
            value = todo.pop()
            if isinstance(value, str):
                found.append(value)
            elif isinstance(value, (dict, list)):
                todo += [*value, *value.values()] if isinstance(value, dict) else value
    except (ValueError, RecursionError):
        found = [double or single for double, single in _QUOTED.findall(text)]
    return {string.removeprefix("./") for string in found}


def _likely(folders: list[str]) -> str:
    """Of a diffusion pipeline the part that people fine-tune, for a shell."""
    return quoted(next((name for name in ("transformer", "unet") if name in folders), folders[0]))
