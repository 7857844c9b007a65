"""The folder of a model by its listing, on a disk or on the hub, before it is known which of its files are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from surgery.errors import FormatError, ReadError, SurgeryError
from surgery.files.paths import check_relative_path
from surgery.names import MANIFEST_FILE, SURGERY_DIR
from surgery.source.file_names import ADAPTERS, why_left_out
from surgery.source.weight_files import SUFFIX

#: Gives the names in a folder of the model, ``""`` for the model's own; those of folders end in a slash.
Listing = Callable[[str], list[str]]


def listing_of(names: Iterable[str]) -> Listing:
    """The listing of a model whose files are all known by name."""
    folders: dict[tuple[str, ...], set[str]] = {}
    for name in names:
        parts = name.split("/")  # "/a" is in a folder without a name, and not at the top
        for depth in range(len(parts)):
            slash = "/" if depth + 1 < len(parts) else ""
            folders.setdefault(tuple(parts[:depth]), set()).add(parts[depth] + slash)
    return lambda folder: sorted(folders.get(tuple(folder.split("/")) if folder else (), ()))


def path_in(folder: str, name: str) -> str:
    """The path of what a listing of a folder names."""
    return f"{folder}/{name.removesuffix('/')}" if folder else name.removesuffix("/")


class ModelFolder:
    """A folder that holds a model, or is to hold one.

    Args:
        listing: names what is in it.
        read_text: gives the text of one of its files.
        where: what it is called, for messages.

    Attributes:
        files: the names of the files at its top.
        folders: those of the folders there, without a slash.

    Raises:
        FormatError: a name that ``check_relative_path`` refuses.
    """

    def __init__(self, listing: Listing, read_text: Callable[[str], str], where: str) -> None:
        self._listing = listing
        self.read_text = read_text
        self.where = where
        top = self.names("")
        self.files = [name for name in top if not name.endswith("/")]
        self.folders = [name[:-1] for name in top if name.endswith("/")]

    def names(self, folder: str) -> list[str]:
        """What is in one of its folders, ``""`` for its top; those of folders end in a slash.

        Raises:
            FormatError: a name that ``check_relative_path`` refuses.
        """
        names = self._listing(folder)
        for name in names:
            check_relative_path(path_in(folder, name), self.where)
        return names

    def peek(self, folder: str) -> list[str]:
        """The same, and nothing of a folder that may not be looked into."""
        try:
            return self.names(folder)
        except SurgeryError:
            return []

    def text(self, file: str) -> str:
        """Of a config or of code; none if it is not sound, which is said by who reads it as what it is."""
        try:
            return self.read_text(file)
        except (FormatError, ReadError):
            return ""

    def is_folder(self, folder: str) -> bool:
        """Whether there is a folder of this path."""
        parent, _, name = folder.rpartition("/")
        return (not parent or self.is_folder(parent)) and f"{name}/" in self.names(parent)

    def model_folders(self) -> list[str]:
        """Folders with safetensors weights, at most two deep."""
        folders = [
            folder for folder in self.folders if why_left_out(folder) is None and folder not in ("original", SURGERY_DIR)
        ]
        for folder in list(folders):
            folders += [f"{folder}/{name[:-1]}" for name in self.peek(folder) if name.endswith("/") and name[0] != "."]
        return sorted(folder for folder in folders if self.is_model(folder))

    def is_model(self, folder: str) -> bool:
        """Whether a folder holds weights of a model, and is no result of ours."""
        names = self.peek(folder)
        is_ours = f"{SURGERY_DIR}/" in names and MANIFEST_FILE.rpartition("/")[2] in self.peek(f"{folder}/{SURGERY_DIR}")
        return not is_ours and any(
            name.endswith(SUFFIX) and why_left_out(name) is None and not ADAPTERS.fullmatch(name) for name in names
        )
