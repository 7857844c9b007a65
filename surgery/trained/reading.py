"""What was trained of a factorized checkpoint, in whatever form a trainer has left it: a scales file, or an adapter of PEFT."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from surgery.errors import OptionError, ScalesError
from surgery.escapes import quoted
from surgery.files.json_files import read_json_object
from surgery.format.header import TensorEntry
from surgery.format.manifest import Manifest
from surgery.format.scales.path import scales_file
from surgery.format.scales.reading import ScalesFile, Trained, check_scales, read_scales_alone, read_trained
from surgery.format.scales.writing import untouched
from surgery.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHECKPOINT_FILE, SPECTRAL, TINYLORA
from surgery.trained.residual_lora import read_residual_lora
from surgery.trained.spectral import SpectralFile, read_spectral
from surgery.trained.tinylora import read_tinylora
from surgery.updates.adapter_update import AdapterUpdate
from surgery.updates.protocol import ScalesUpdate


def adapter_kind(path: Path) -> str | None:
    """What PEFT calls the kind of an adapter, such as ``LORA``; None for what is no folder of an adapter.

    A folder that holds a scales file as well is that of a training of scales, with adapters beside them.

    Raises:
        FormatError, ReadError: its config cannot be read.
    """
    config = path / ADAPTER_CONFIG
    if not config.is_file() or (path / CHECKPOINT_FILE).is_file():
        return None
    return str(read_json_object(config, str(config)).get("peft_type"))


def trained_path(path: Path) -> Path:
    """What is meant by a path: the folder of an adapter, also by the weights in it, or a scales file.

    Raises:
        ScalesError: a folder with neither, or with several scales files.
        FormatError, ReadError: the config of an adapter cannot be read.

    Warns:
        SurgeryWarning: see ``surgery.format.scales.path.scales_file``.
    """
    if path.name == ADAPTER_WEIGHTS and adapter_kind(path.parent) in (TINYLORA, SPECTRAL):
        return path.parent
    return scales_file(path) if adapter_kind(path) is None else path


def read_update(
    path: Path, factorized: Path, manifest: Manifest, entries: Callable[[], Mapping[str, TensorEntry]]
) -> tuple[dict[str, torch.Tensor], AdapterUpdate]:
    """Read what is to be added to the original weights: scales or cores, and what a LoRA does that began with the factors.

    Args:
        path: as for ``read_any_trained``, or the folder of an adapter that ``export`` has written as ``peft-pissa``.
        factorized, manifest: the checkpoint.
        entries: gives those of all tensors of the source, by name.

    Returns:
        The scales or cores, by the key of each target, and the update of the LoRA; one of both is untouched.

    Raises:
        OptionError, ScalesError, FormatError, ReadError, MissingExtra, SourceError: see ``read_any_trained`` and
            ``read_residual_lora``.
    """
    if adapter_kind(path) != "LORA":
        return read_any_trained(path, factorized, manifest).values, AdapterUpdate({}, ())
    update = read_residual_lora(path, factorized, manifest, entries())
    return dict(ScalesUpdate.untouched(manifest.targets).values), update


def read_any_trained(path: Path, factorized: Path, manifest: Manifest) -> Trained:
    """Read the scales or cores of a factorized checkpoint.

    Args:
        path: a scales file, a folder that holds one, or the folder of an adapter that was trained: one that ``export`` has
            written as ``peft-trainable``, or one of ``surgery.peft``.
        factorized, manifest: the checkpoint.

    Raises:
        ScalesError: an adapter of another kind.
        ScalesError, OptionError, FormatError, ReadError: see ``surgery.format.scales.reading.read_trained``.
        MissingExtra, SourceError: for an adapter of TinyLoRA, see ``surgery.models.skeleton``.

    Warns:
        SurgeryWarning: see ``surgery.format.scales.reading.read_trained``.
    """
    kind = adapter_kind(path)
    if kind is None:
        return read_trained(path, manifest)
    if kind == TINYLORA:
        return read_tinylora(path, factorized, manifest)
    if kind == SPECTRAL:
        return _of_checkpoint(read_spectral(path), path, manifest)
    raise _unknown(path, kind, factorized)


def _of_checkpoint(file: SpectralFile, path: Path, manifest: Manifest) -> Trained:
    """An adapter of ``surgery.peft`` held against a checkpoint; targets that the trained model did not have are untouched."""
    if file.fingerprint != manifest.fingerprint:
        raise ScalesError(
            f"{path} was trained with other factors",
            got=f"fingerprint {file.fingerprint}",
            expected=f"fingerprint {manifest.fingerprint}",
            hint="use the factorized folder that it was trained with" + (f", {file.factorized}" if file.factorized else ""),
        )
    absent = {one.key: one.shape_of(file.train) for one in manifest.targets if one.key in file.absent}
    filled = {key: untouched(torch.empty(shape), file.train).expand(shape) for key, shape in absent.items()}
    return Trained(check_scales(file.values | filled, manifest), file.train, file.beside)


def read_alone(path: Path, factorized: Path | None = None) -> ScalesFile:
    """Read scales or cores without the checkpoint that they belong to.

    Args:
        path: as for ``read_any_trained``.
        factorized: the checkpoint; only an adapter of TinyLoRA needs it, whose file does not name the targets.

    Raises:
        ScalesError: an adapter of another kind.
        OptionError: one that needs the checkpoint.
        SurgeryError: see ``read_any_trained``.
    """
    kind = adapter_kind(path)
    if kind is None:
        return read_scales_alone(path)
    if kind == SPECTRAL:
        return read_spectral(path)
    if kind == TINYLORA and factorized is None:
        raise OptionError(
            f"{path} does not say which weights its numbers belong to",
            got="an adapter of TinyLoRA",
            hint="name the folder that it was exported from: --factorized FACTORIZED",
        )
    if factorized is None:
        raise _unknown(path, kind)
    manifest = Manifest.read(factorized)
    trained = read_any_trained(path, factorized, manifest)
    return ScalesFile(trained.values, manifest.fingerprint, trained.train, trained.beside)


def _unknown(path: Path, kind: str, factorized: Path | str = "FACTORIZED") -> ScalesError:
    return ScalesError(
        f"{path} is no adapter of scales or cores",
        got=f"peft_type {reprlib.repr(kind)}",
        expected="a scales file, an adapter of surgery.peft, or one that surgery export has written to be trained",
        hint=f"surgery merge {quoted(factorized)} {quoted(path)} takes a LoRA that was trained on the residual; surgery fold "
        "FACTORIZED SCALES --lora one that was trained beside scales"
        if kind == "LORA"
        else None,
    )
