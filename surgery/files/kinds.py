"""Recognizing files that are not safetensors by their first bytes. Nothing in them is run, unpickled or unpacked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from surgery.escapes import quoted

#: Bytes from the start of a file that are looked at.
HEAD_BYTES = 512

_AGAIN = "fetch or save it again"
#: First bytes -> what the file is, and what to do.
_KINDS = (
    (b"version https://git-lfs", "a git-lfs pointer and not the file it stands for", "git lfs pull in its repository"),
    (b"GGUF", "a GGUF file", "give the safetensors that it was made from; the card of its model names them"),
    (b"\x89HDF", "an HDF5 file", "save it as safetensors"),
    (b"\x93NUMPY", "a NumPy array", "save it as safetensors"),
    (b"\x1f\x8b", "a gzip archive", "unpack it, and give what is in it"),
    (b"\x00\x05\x16\x07", "what macOS keeps beside a file (AppleDouble)", "give the file of that name without ._ before it"),
)


@dataclass(frozen=True, slots=True)
class OtherKind:
    """A kind of file that is not safetensors.

    Attributes:
        what: its name with an article, such as "a GGUF file".
        hint: what to do with such a file.
    """

    what: str
    hint: str


def other_kind(head: bytes, size: int, path: Path) -> OtherKind | None:
    """The kind of a file that is not safetensors; None if its first bytes do not tell, or look like safetensors.

    Args:
        head: its first ``HEAD_BYTES`` bytes, or all there are.
        size: of the file, in bytes.
        path: of the file, for the command that converts it.
    """
    if size == 0:
        return OtherKind("an empty file", _AGAIN)
    if head[8:9] == b"{":  # a length and a header: safetensors, whatever is wrong with it
        return None
    if not any(head):
        return OtherKind("a file that begins with nothing but zeros: its download or copy was not finished", _AGAIN)
    for magic, what, hint in _KINDS:
        if head.startswith(magic):
            return OtherKind(what, hint)
    if head.startswith(b"PK\3\4"):
        if b".npy" in head:
            return OtherKind("a NumPy archive (npz)", "save it as safetensors")
        if b"data.pkl" not in head:
            return OtherKind("a zip archive", "unpack it, and give what is in it")
        return OtherKind("a file of torch.save, which is never opened", _conversion(path))
    if head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return OtherKind("a pickle, as of torch.save, which is never opened", _conversion(path))
    text = head.lstrip()
    if text[:9].lower() == b"<!doctype" or text[:5].lower() == b"<html":
        return OtherKind("a web page and not the file that its address stands for", "fetch it with: hf download")
    if text.startswith((b"{", b"[")):
        return OtherKind("a JSON file", "give the safetensors file that it goes with")
    return None


def _conversion(path: Path) -> str:
    """The command that converts a pickle of tensors by name to safetensors, without running any code in it."""
    name = path.with_suffix(".safetensors").name
    new = path.with_name(name if name != path.name else f"{path.stem}-converted.safetensors")
    # torch.load is given an open file: of a path that ends in .safetensors it would expect that format.
    code = (
        "import safetensors.torch, torch; "
        f'safetensors.torch.save_file(torch.load(open({_literal(path)}, "rb"), weights_only=True), {_literal(new)})'
    )
    return f"convert it once: python -c {quoted(code)}"


def _literal(path: Path) -> str:
    """A path as a Python string literal in double quotes, which can stand inside single quotes of a shell."""
    return json.dumps(str(path), ensure_ascii=False)
