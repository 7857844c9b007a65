"""The folder of a model, on a disk or on the hub, seen through its listing, before it is decided which files to take."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from surgery.errors import FormatError, ReadError, SurgeryError
from surgery.files.paths import check_relative_path
from surgery.names import MANIFEST_FILE, SURGERY_DIR
from surgery.source.file_names import ADAPTERS, why_left_out
from surgery.source.weight_files import SUFFIX

#: Called with a folder of the model (``""``: its top), gives the names in it; names of folders end in a slash.
Listing = Callable[[str], list[str]]


def listing_of(names: Iterable[str]) -> Listing:
    """The listing of a model, from the paths of all its files."""
    folders: dict[tuple[str, ...], set[str]] = {}
    for name in names:
        parts = name.split("/")  # "/a" is in a folder without a name, and not at the top
        for depth in range(len(parts)):
            slash = "/" if depth + 1 < len(parts) else ""
            folders.setdefault(tuple(parts[:depth]), set()).add(parts[depth] + slash)
    return lambda folder: sorted(folders.get(tuple(folder.split("/")) if folder else (), ()))


def path_in(folder: str, name: str) -> str:
    """The path of an entry in the listing of a folder, without a slash at its end."""
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
        """The names in one of its folders (``""``: its top); those of folders end in a slash.

        Raises:
            FormatError: a name that ``check_relative_path`` refuses.
        """
        names = self._listing(folder)
        for name in names:
            check_relative_path(path_in(folder, name), self.where)
        return names

    def peek(self, folder: str) -> list[str]:
        """``names``, but an empty list for a folder that cannot be listed or has a name that is refused."""
        try:
            return self.names(folder)
        except SurgeryError:
            return []

    def text(self, file: str) -> str:
        """The text of a config or of code; empty if it cannot be read. Whoever needs the file reports what is wrong with it."""
        try:
            return self.read_text(file)
        except (FormatError, ReadError):
            return ""

    def is_folder(self, folder: str) -> bool:
        """Whether there is a folder of this path."""
        parent, _, name = folder.rpartition("/")
        return (not parent or self.is_folder(parent)) and f"{name}/" in self.names(parent)

    def model_folders(self) -> list[str]:
        """The folders with safetensors weights of a model, at most two levels deep."""
        folders = [
            folder for folder in self.folders if why_left_out(folder) is None and folder not in ("original", SURGERY_DIR)
        ]
        for folder in list(folders):
            folders += [f"{folder}/{name[:-1]}" for name in self.peek(folder) if name.endswith("/") and name[0] != "."]
        return sorted(folder for folder in folders if self.is_model(folder))

    def is_model(self, folder: str) -> bool:
        """Whether a folder holds safetensors weights, not only of an adapter, and is not a factorized checkpoint."""
        names = self.peek(folder)
        is_ours = f"{SURGERY_DIR}/" in names and MANIFEST_FILE.rpartition("/")[2] in self.peek(f"{folder}/{SURGERY_DIR}")
        return not is_ours and any(
            name.endswith(SUFFIX) and why_left_out(name) is None and not ADAPTERS.fullmatch(name) for name in names
        )
