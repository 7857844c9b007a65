"""Sorting the files of a model into weights, files to copy and files to leave out, by their names and what configs name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from surgery.errors import FormatError, SourceError, few
from surgery.escapes import has_surrogates
from surgery.files.json_files import decode_json
from surgery.files.paths import check_relative_path, file_key
from surgery.names import CONFIG_FILE, SURGERY_DIR, is_litter, is_reserved
from surgery.source.file_names import (
    ADAPTER_FILE,
    ADAPTERS,
    ALPHABET_FILE,
    CARDS,
    CONFIGS,
    KNOWN_FOLDERS,
    MODULES_FILE,
    OF_A_RUN,
    PICKLES,
    SPARE,
    is_known_name,
    is_read_by_loaders,
    name_patterns,
    why_left_out,
)
from surgery.source.model_folder import Listing, ModelFolder, path_in
from surgery.source.no_model import no_weights, refuse_our_own, refuse_pipeline
from surgery.source.weight_files import SUFFIX, choose_shards, is_index

#: The name that browsers and file managers give to a second copy of a file: model (1).safetensors.
_COPY = re.compile(r"(?P<name>.+?)(?: ?\(\d+\)| - Copy(?: \(\d+\))?| copy(?: \d+)?)(?P<suffix>\.[^. ]+)")
_UNREAD = "no loader looks for it"
_QUOTED = re.compile(r"""\"([^"\n\\]*)\"|'([^'\n\\]*)'""")
#: Relative imports in Python. Possessive, and without a closing bracket: any text is searched in linear time.
_IMPORT = re.compile(r"^[^\S\n]*+(?:from\s++\.++([\w.]*+)\s++import\s++(\([^)]*+|[^\n]*+)|import\s++\.([\w.]++))", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Selection:
    """The files of a model, sorted by their use. Paths are relative to the model and in the order of their names.

    Attributes:
        shards: the weight files.
        index: the index that names them; None if there is none.
        others: files that are copied unchanged (config, tokenizer, code ...).
        left_out: file -> why it is left out; a folder that is left out as a whole is one entry, with a slash at its end.
        rivals: weight files that are left out and may, by their names, be from another save of this model.
        notes: for the user, about files that are left out.
    """

    shards: tuple[str, ...]
    index: str | None
    others: tuple[str, ...]
    left_out: Mapping[str, str]
    rivals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def select_files(listing: Listing, read_text: Callable[[str], str], *, where: str) -> Selection:
    """Sort the files of a model. Folders that are left out as a whole are not listed.

    Args:
        listing: gives the names in each folder of the model.
        read_text: gives the text of a file; called for the index, configs and code only.
        where: the model, for messages.

    Raises:
        SourceError: there are no safetensors weights, or those of several models.
        FormatError: a name is refused by ``check_relative_path``; an index is damaged, or names a file that is missing or
            elsewhere; a numbered weight file is missing.
    """
    return _Selector(ModelFolder(listing, read_text, where)).selection()


def select_plain_files(listing: Listing, read_text: Callable[[str], str], *, where: str) -> Selection:
    """``select_files`` for a listing that may hold names of any kind.

    A file or folder whose name ``check_relative_path`` refuses is left out, unless loaders look for it.

    Raises:
        SourceError, FormatError: as for ``select_files``. A name is only refused if loaders look for that file, or if it is
            no Unicode text.
    """
    left_out: dict[str, str] = {}

    def is_taken(folder: str, name: str) -> bool:
        try:
            check_relative_path(path_in(folder, name), where)
        except FormatError as error:
            if is_read_by_loaders(name) or has_surrogates(name):  # which no manifest could list
                hint = "give a copy of the model in which it has another name"
                raise FormatError(error.what, got=error.got, expected=error.expected, hint=hint) from None
            left_out[f"{folder}/{name}" if folder else name] = "a name that not every system allows"
            return False
        return True

    found = select_files(lambda folder: [name for name in listing(folder) if is_taken(folder, name)], read_text, where=where)
    return replace(found, left_out=dict(sorted({**found.left_out, **left_out}.items())))


class _Selector:
    """Sorts the files of one model; used once."""

    def __init__(self, model: ModelFolder) -> None:
        self._model = model
        self._others: list[str] = []
        self._left_out: dict[str, str] = {}

    def selection(self) -> Selection:
        """Sort all files. Raises as ``select_files``."""
        refuse_our_own(self._model)
        weights: list[str] = []
        indexes: list[str] = []
        adapter: list[str] = []
        unknown: list[str] = []
        copies: list[str] = []
        for name in self._model.files:
            if ADAPTERS.fullmatch(name):
                adapter.append(name)
                self._left_out[name] = "an adapter"
            elif (reason := why_left_out(name)) is not None:
                self._left_out[name] = reason
            elif name.endswith(SUFFIX) and self._is_copy(name):
                copies.append(name)
                self._left_out[name] = SPARE
            elif name.endswith(SUFFIX):
                weights.append(name)
            elif is_index(name):
                indexes.append(name)
            elif is_known_name(name):
                self._others.append(name)
            else:
                unknown.append(name)
        refuse_pipeline(self._model, weights, self._others)
        chosen = choose_shards(weights, indexes, self._named_weights(), self._model.read_text, self._model.where)
        if not chosen.shards:
            raise no_weights(self._model, adapter)
        if halves := [name for name in chosen.shards if f"{name}.aria2" in self._model.files]:
            raise SourceError(
                f"{self._model.where}/{halves[0]} is not all there: its download was not finished",
                got=f"{halves[0]}.aria2 beside it",
                hint="finish the download",
            )
        self._left_out |= chosen.left_out
        self._others += [chosen.index] if chosen.index is not None else []
        self._take_what_is_named(unknown)
        if reserved := [name for name in self._others if is_reserved(name)]:
            raise SourceError(
                f"{self._model.where} needs files of its own in {SURGERY_DIR}/, where a result has its factors",
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
        """Whether a file is, by its name, a second copy of another file in the folder."""
        match = _COPY.fullmatch(name)
        return match is not None and match["name"] + match["suffix"] in self._model.files

    def _tell_apart(self, chosen: list[str]) -> None:
        """Make sure that no two files to copy are the same file on a disk that ignores case or Unicode normal forms.

        Of such cards and licences only the first is copied.

        Raises:
            SourceError: two other files are, or a file and a folder.
        """
        seen: dict[str, str] = {}
        for file in sorted(chosen):
            for path in (*(f"{parent}/" for parent in reversed(PurePosixPath(file).parents[:-1])), file):
                before = seen.setdefault(file_key(path.removesuffix("/")), path)
                if before == path:
                    continue
                if path == file and CARDS.fullmatch(file) and CARDS.fullmatch(before):
                    self._others.remove(file)
                    self._left_out[file] = f"the same name as {before}, where case is not told apart"
                    break
                raise SourceError(
                    f"{self._model.where} has two files whose names are one on disks that do not tell case apart",
                    got=f"{before!r} and {path!r}",
                    hint="remove the one that is not meant, in a copy of the model",
                )

    def _named_weights(self) -> str | None:
        """The weight file or index that the config names as ``transformers_weights``, which transformers prefers to others."""
        if CONFIG_FILE not in self._others:
            return None
        try:
            config = decode_json(self._model.text(CONFIG_FILE))
        except ValueError:
            return None
        named = config.get("transformers_weights") if isinstance(config, dict) else None
        return named if isinstance(named, str) else None

    # -- files and folders that are copied because something names them ---------------------------------------------------

    def _take_what_is_named(self, unknown: list[str]) -> None:
        """Sort files and folders that no loader looks for: those that a config or the model's code names are copied."""
        modules = self._modules()
        packages, quoted = self._named_by_code() if unknown or set(self._model.folders) - modules else (set(), set())
        for name in unknown:
            if name in quoted:
                self._others.append(name)
            else:
                self._left_out[name] = _UNREAD
        for folder in self._model.folders:
            before = len(self._others)
            reason = why_left_out(folder) or ("the publisher's own copy of the weights" if folder == "original" else None)
            if reason is None:
                if folder in modules:
                    self._take_module(folder)
                elif folder in packages:
                    self._take_matching(folder, name_patterns("*.py"))
                elif folder in KNOWN_FOLDERS:
                    self._take_matching(folder, KNOWN_FOLDERS[folder])
                self._take_named_paths(folder, quoted)
            if len(self._others) == before:
                self._left_out[f"{folder}/"] = reason or _UNREAD

    def _modules(self) -> set[str]:
        """The folders that are copied as a whole, since loaders may read any file in them.

        These are modules of sentence-transformers, each with a config and perhaps weights; further tokenizers of
        transformers' processors; and the n-grams of a speech decoder, which has its alphabet at the top.
        """
        found = {
            string.split("/")[0]
            for file in (MODULES_FILE, "router_config.json")
            if file in self._others
            for string in _strings(self._model.text(file))
        }
        found |= {folder for folder in self._model.folders if folder.endswith("_tokenizer")}
        found |= {"language_model"} if ALPHABET_FILE in self._others else set()
        return found & set(self._model.folders)

    def _named_by_code(self) -> tuple[set[str], set[str]]:
        """Follow the code that the configs name.

        Returns:
            The folders that the code imports as packages, and all strings in the code and in the configs.
        """
        quoted: set[str] = set()
        for file in self._others:
            if CONFIGS.fullmatch(file):
                quoted |= _strings(self._model.text(file))
        imported = {string.rpartition("--")[2].split(".")[0] for string in quoted if "." in string}
        seen: set[str] = set()
        while todo := sorted(name for name in imported - seen if f"{name}.py" in self._others):
            for name in todo:
                seen.add(name)
                text = self._model.text(f"{name}.py")
                quoted |= _strings(text)
                for package, members, module in _IMPORT.findall(text):
                    found = [package or module] if package or module else re.findall(r"\w+", members)
                    imported |= {part.split(".")[0] for part in found}
        return imported & set(self._model.folders), quoted

    def _take_module(self, folder: str) -> None:
        """Take all files in a folder, except those that are always left out."""
        files = list(self._walk(folder))
        with_weights = {PurePosixPath(file).parent for file in files if file.endswith(SUFFIX)}
        for file in files:
            path = PurePosixPath(file)
            # A module whose only weights are a pickle cannot be loaded without it. It is copied, never opened.
            needed = path.suffix in PICKLES and path.parent not in with_weights and not OF_A_RUN.fullmatch(path.name)
            reason = None if needed else why_left_out(path.name)
            if reason is None:
                self._others.append(file)
            else:
                self._left_out[file] = reason

    def _take_matching(self, folder: str, names: re.Pattern[str]) -> None:
        for file in self._walk(folder):
            name = PurePosixPath(file).name
            if names.fullmatch(name) and not is_litter(name):
                self._others.append(file)

    def _take_named_paths(self, folder: str, quoted: set[str]) -> None:
        """Take the files in a folder that something names by their path, and the adapter in a folder that is named."""
        if folder in quoted and ADAPTER_FILE in self._model.peek(folder):
            self._take_matching(folder, ADAPTERS)
        wanted = {string for string in quoted if string.startswith(f"{folder}/")} - set(self._others)
        parents = {string.rpartition("/")[0] for string in wanted}
        there = {
            f"{parent}/{name}"
            for parent in sorted(parents)
            if self._model.is_folder(parent)
            for name in self._model.names(parent)
        }
        self._others += [file for file in sorted(wanted & there) if why_left_out(PurePosixPath(file).name) is None]

    def _walk(self, folder: str) -> Iterator[str]:
        """The files in a folder, at any depth, without those in folders that are always left out."""
        for name in self._model.names(folder):
            if not name.endswith("/"):
                yield f"{folder}/{name}"
            elif (reason := why_left_out(name[:-1])) is None:
                yield from self._walk(f"{folder}/{name[:-1]}")
            else:
                self._left_out[f"{folder}/{name}"] = reason


def _strings(text: str) -> set[str]:
    """All strings in a text of JSON or Python; a ``./`` at the start of one is dropped."""
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
