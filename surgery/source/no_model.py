"""Errors for a folder that is no model: a factorized checkpoint, a pipeline, an adapter, or weights in another format."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from surgery.errors import SourceError, few
from surgery.escapes import quoted
from surgery.files.json_files import decode_json
from surgery.names import CONFIG_FILE, JOURNAL_DIR, OUR_FILES, RUN_FILE, SURGERY_DIR
from surgery.quantized.original import original_of
from surgery.source.file_names import (
    ADAPTER_FILE,
    ARRAYS,
    CARD,
    DOWNLOADS,
    OF_A_RUN,
    OTHER_FORMAT,
    OTHER_WEIGHTS,
    PICKLES,
    PIPELINE_FILE,
    why_left_out,
)
from surgery.source.model_folder import ModelFolder

#: Where the hub's client keeps partial downloads into a local folder.
_FETCHED = ".cache/huggingface/download"
_CONVERT = "AutoModel.from_pretrained(MODEL).save_pretrained(FOLDER) writes safetensors"


class OnlyAdapter(SourceError):
    """What is to be a model holds an adapter, and no weights of a model.

    Attributes:
        base: the model that it was trained on, quoted for a shell; ``MODEL`` if its config names none.
    """

    base = "MODEL"


def refuse_our_own(model: ModelFolder) -> None:
    """Refuse a factorized checkpoint, or one that was being written when the command was interrupted.

    Raises:
        SourceError: the folder is one of these.
    """
    inside = [
        f"{folder}/{name}" for folder in (SURGERY_DIR, JOURNAL_DIR) if folder in model.folders for name in model.peek(folder)
    ]
    if RUN_FILE in inside:
        raise SourceError(
            f"{model.where} is an unfinished result",
            hint="repeat the command that writes it, which continues where it stopped, or give another model",
        )
    if any(map(OUR_FILES.fullmatch, inside)):
        raise SourceError(
            f"{model.where} is itself a factorized checkpoint",
            hint="fold it first, or give the original model",
        )


def refuse_pipeline(model: ModelFolder, weights: list[str], others: list[str]) -> None:
    """Refuse the top folder of a pipeline, which is no model itself, whether or not there are weights at its top.

    Args:
        model: the folder.
        weights: safetensors files at its top.
        others: files there that loaders know by name.

    Raises:
        SourceError: it is a pipeline; names the models in it.
    """
    if PIPELINE_FILE not in others or CONFIG_FILE in others:
        return
    folders = model.model_folders()
    raise SourceError(
        f"{model.where} is a pipeline of several models ({PIPELINE_FILE}), which lie in its subfolders",
        got=(", ".join(folders) or "no subfolder with safetensors weights")
        + (f"; and at the top {few(weights)}" if weights else ""),
        expected="one model",
        hint=f"take one of them: --subfolder {_likely(folders)}"
        if folders
        else "if they are in another format: DiffusionPipeline.from_pretrained(MODEL).save_pretrained(FOLDER)",
    )


def no_weights(model: ModelFolder, adapter: list[str]) -> SourceError:
    """The error for a folder without safetensors weights at its top: says what is there instead, and what to do.

    Args:
        model: the folder.
        adapter: the files of an adapter there.
    """
    if folders := model.model_folders():
        return SourceError(
            f"{model.where} has no weights at its top, but in its subfolders",
            got=", ".join(folders),
            hint=f"take one of them: --subfolder {_likely(folders)}",
        )
    if adapter:
        return _only_adapter(model, adapter)
    if checkpoints := [folder for folder in model.folders if OF_A_RUN.fullmatch(folder) and model.is_model(folder)]:
        checkpoints.sort(key=lambda folder: [int(number) for number in re.findall(r"\d+", folder)])
        return SourceError(
            f"{model.where} is the folder of a training run, which has its weights in checkpoints",
            got=few(reversed(checkpoints)),
            hint=f"take one of them: --subfolder {quoted(checkpoints[-1])}",
        )
    if inside := [folder for folder in model.folders if ADAPTER_FILE in model.peek(folder)]:
        return SourceError(
            f"{model.where} holds adapters in its subfolders, and no safetensors weights of a model",
            got=few(inside),
            hint="give the model that they were trained on; surgery merge MODEL ADAPTER puts an adapter into it",
        )
    halves = [name for name in model.files if name.endswith(DOWNLOADS)]
    if ".cache" in model.folders:
        halves += [f"{_FETCHED}/{name}" for name in model.peek(_FETCHED) if name.endswith(DOWNLOADS)]
    if halves:
        return SourceError(
            f"{model.where} has no safetensors weights, only downloads that were not finished",
            got=few(halves),
            hint="fetch the model again: hf download continues where it stopped",
        )
    inside = [f"{folder}/{name}" for folder in model.folders if why_left_out(folder) is None for name in model.peek(folder)]
    reasons = {name: why_left_out(PurePosixPath(name).name) for name in (*model.files, *inside)}
    arrays = [name for name, reason in reasons.items() if reason is None and name.endswith(ARRAYS)]
    others = [name for name, reason in reasons.items() if reason == OTHER_FORMAT] + arrays
    for suffixes, kind, hint in (
        (PICKLES, "a pickle checkpoint, which is never opened", f"convert it once: {_CONVERT}"),
        ((".gguf", ".ggml"), "GGUF", f"give {original_of(model.where, _card(model))}; llama.cpp converts what is made of it"),
        ((".onnx", ".onnx_data"), "ONNX", "give the model that it was exported from; its card names it"),
        (OTHER_WEIGHTS, "weights in another format", f"give the model in safetensors; of Flax or TensorFlow: {_CONVERT}"),
    ):
        if found := [name for name in others if name.endswith(suffixes)]:
            return SourceError(f"{model.where} has no safetensors weights, only {kind}", got=few(found), hint=hint)
    names = [*model.files, *(f"{folder}/" for folder in model.folders)]
    return SourceError(f"{model.where} has no safetensors weights", got=few(names) or "no files", expected="*.safetensors")


def _card(model: ModelFolder) -> str:
    """The text of its card; empty if there is none."""
    return next((model.text(name) for name in model.files if name.casefold() == CARD), "")


def _only_adapter(model: ModelFolder, adapter: list[str]) -> OnlyAdapter:
    """The error for a folder that has only an adapter; names the model that it was trained on, if its config does."""
    try:
        config = decode_json(model.text(ADAPTER_FILE)) if ADAPTER_FILE in adapter else None
    except ValueError:
        config = None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    is_named = isinstance(base, str) and base != "" and base.isprintable()
    trained_on = quoted(base) if is_named else OnlyAdapter.base
    error = OnlyAdapter(
        f"{model.where} holds an adapter and no safetensors weights of a model",
        got=few(adapter) + (f"; base_model_name_or_path: {base!r}" if is_named else ""),
        hint=f"give the model that it was trained on{f', {trained_on}' if is_named else ''}; or what both make together: "
        f"surgery merge {trained_on} {quoted(model.where)} -o merged",
    )
    error.base = trained_on
    return error


def _likely(folders: list[str]) -> str:
    """The folder that is most likely meant, quoted for a shell: the model of a diffusion pipeline that people fine-tune."""
    return quoted(next((name for name in ("transformer", "unet") if name in folders), folders[0]))
