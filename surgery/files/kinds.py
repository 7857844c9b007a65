"""What a file is that is no safetensors file, told by its first bytes. Nothing in it is run, unpickled or unpacked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from surgery.escapes import quoted

#: How much of a file is looked at.
HEAD_BYTES = 512

_AGAIN = "fetch or save it again"
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
    """What a file is, as in "it is a GGUF file", and what to do."""

    what: str
    hint: str


def other_kind(head: bytes, size: int, path: Path) -> OtherKind | None:
    """What a file is that turned out not to be safetensors; None if its first bytes do not tell.

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
    """The command that makes safetensors of tensors by name, running nothing that is in the file."""
    name = path.with_suffix(".safetensors").name
    new = path.with_name(name if name != path.name else f"{path.stem}-converted.safetensors")
    # Opened before it is given to torch.load, which would take a name that ends in .safetensors at its word.
    code = (
        "import safetensors.torch, torch; "
        f'safetensors.torch.save_file(torch.load(open({_literal(path)}, "rb"), weights_only=True), {_literal(new)})'
    )
    return f"convert it once: python -c {quoted(code)}"


def _literal(path: Path) -> str:
    """A path as Python and a shell's single quotes take it."""
    return json.dumps(str(path), ensure_ascii=False)
