"""What to say of a folder or a file that holds something else than scales."""

from __future__ import annotations

import re
from pathlib import Path

from surgery.errors import ScalesError, few
from surgery.escapes import quoted
from surgery.format.header import Header
from surgery.format.manifest import Manifest
from surgery.names import (
    ADAPTER_CONFIG,
    ATTACHED_NAME,
    CHECKPOINT_FILE,
    CONFIG_FILE,
    SCALES_METADATA_KEY,
    is_of_lora,
)

_PROJECT = "surgery project FACTORIZED MODEL -o scales.safetensors finds the scales that come closest to a fine-tuned model"
#: Files in which trainings keep tensors.
_OF_TENSORS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".npy")
_FACTORS = re.compile(r".+\.(U|s|V|correction(\.\d+)?)")
_OF_A_MODEL = re.compile(r"(.*[._])?(norm\d*|layernorm|ln_(\d|f))\.weight|.+\.bias")


def no_scales_in(folder: Path) -> ScalesError:
    """The error for a folder in which no scales file has been found."""
    if (folder / ADAPTER_CONFIG).is_file():
        hint = (
            f"surgery fold FACTORIZED {quoted(folder)} takes it if PEFT has trained scales or cores in it; "
            "a LoRA is folded beside scales, with --lora"
        )
        return ScalesError(f"{folder} is the folder of an adapter, and no scales file", expected="a scales file", hint=hint)
    if (folder / CONFIG_FILE).is_file():
        return ScalesError(f"{folder} is the folder of a model, and holds no scales", expected="a scales file", hint=_PROJECT)
    if below := adapters_below(folder):
        return ScalesError(
            f"{folder} is a folder that holds no scales, but folders of adapters",
            got=few(one.name for one in reversed(below)),
            expected="one of them",
            hint=f"give the one that is meant, such as {quoted(below[-1])}",
        )
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    files = [folder / name for name in names if name.endswith(_OF_TENSORS) and (folder / name).is_file()]
    return ScalesError(
        f"{folder} is a folder that holds no scales",
        got=few(names) or "an empty folder",
        expected=f"a scales file, or a folder with a {CHECKPOINT_FILE}",
        hint=f"if it is what is meant, give the file: {files[0]}" if files else None,
    )


def adapters_below(folder: Path) -> list[Path]:
    """The folders in a folder that hold an adapter, as trainers save checkpoints, and PEFT adapters of other names.

    In the order of the numbers in their names.
    """
    found = sorted(file.parent for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
    shown = (one for one in found if not one.name.startswith("."))
    return sorted(shown, key=lambda one: [int(number) for number in re.findall(r"\d+", one.name)])


def refuse_other_tensors(header: Header, path: Path, manifest: Manifest | None = None) -> None:
    """Refuse a file of tensors that are known to be something else than scales.

    Args:
        header, path: of the file.
        manifest: of the checkpoint that the scales are for, where it is known: its weights have other shapes than scales.

    Raises:
        ScalesError: they are the weights of an adapter or a model, parameters of a model with scales, or factors.
    """
    names = [entry.name for entry in header.tensors]
    owned = SCALES_METADATA_KEY in header.metadata
    targets = manifest.targets if manifest is not None else []
    # With all directions of a square weight a core has the weight's own shape.
    whole = {target.tensor: target.shape for target in targets if tuple(target.shape) != target.shape_of("core")}
    if not owned and any(map(is_of_lora, names)):
        what, hint = (
            "the weights of a LoRA adapter",
            f"surgery fold FACTORIZED SCALES --lora {quoted(path.parent)}, beside scales",
        )
    elif any(ATTACHED_NAME in name for name in names):
        what = "parameters of a model with scales, which hold g - 1"
        hint = 'the scales that surgery.attach gave write the file: scales.save("scales.safetensors")'
    elif not owned and names and all(map(_FACTORS.fullmatch, names)):
        what, hint = "factors", f"the scales beside them are {path.parent / CHECKPOINT_FILE}"
    elif any(list(entry.shape) == whole.get(entry.name) for entry in header.tensors) or (
        manifest is None and not owned and any(map(_OF_A_MODEL.fullmatch, names))
    ):
        what, hint = "the weights of a model", _PROJECT
    else:
        return
    raise ScalesError(f"{path} holds {what}, and no scales", got=f"such as {names[0]!r}", expected="a scales file", hint=hint)
