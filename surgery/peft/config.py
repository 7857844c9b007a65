"""``SpectralConfig``: what PEFT is told of an adapter of scales or cores, and saves beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy
import torch
from peft import PeftConfig

from surgery.arguments import as_path
from surgery.errors import OptionError
from surgery.format.manifest import Manifest
from surgery.names import MANIFEST_FILE
from surgery.peft.installed import spectral_type
from surgery.progress import note
from surgery.training.ways import Way


@dataclass
class SpectralConfig(PeftConfig):
    """Config of an adapter of PEFT that trains the scales of a factorized checkpoint, or cores.

    The model may have been loaded from the original weights or from the factorized folder, as for ``surgery.attach``.

    Args:
        factorized: the folder that ``surgery.factorize`` has written. It is saved as an absolute path. On another
            machine, write the path of the folder there into ``adapter_config.json``, or pass another config to
            ``PeftModel.from_pretrained``.
        train: ``scales``, ``core`` or ``orthogonal``, as for ``surgery.attach``.
        choose: how many directions to train of each matrix: those that the loss depends on most in the first steps.
            None trains all.
        choose_steps: the number of first optimizer steps that only collect gradients. Then the directions are chosen,
            and training begins.
        modules_to_save: modules that are trained and saved whole beside the adapter, as in other methods of PEFT.
            ``surgery fold`` refuses such adapters.
        fingerprint: the fingerprint of the factors. Set when the adapter is made, and compared when it is loaded.
        absent: targets of the checkpoint that the trained model does not have. Set when the adapter is made.
        shapes: the shape of the scales of each target. Set when the adapter is made.
        chosen: the directions that have been chosen. Set during training.

    Raises:
        OptionError: a value is not valid.
    """

    factorized: str | None = field(default=None, metadata={"help": "The folder that surgery.factorize has written."})
    train: str = field(default="scales", metadata={"help": "What is trained: scales, core or orthogonal."})
    choose: int | None = field(default=None, metadata={"help": "How many directions to train of each matrix; None for all."})
    choose_steps: int = field(default=8, metadata={"help": "Steps that are looked at before directions are chosen."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})
    fingerprint: str | None = field(default=None, metadata={"help": "Of the factors; filled in."})
    absent: list[str] | None = field(default=None, metadata={"help": "Targets that the model does not have; filled in."})
    shapes: dict[str, list[int]] | None = field(default=None, metadata={"help": "Of the scales of each target; filled in."})
    chosen: dict[str, str] | None = field(default=None, metadata={"help": "The chosen directions of each target; filled in."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = spectral_type()
        if self.factorized is not None:
            self.factorized = str(as_path(self.factorized, "factorized").absolute())
        if self.train not in get_args(Way):
            raise OptionError("train makes no sense", got=repr(self.train), expected=" or ".join(map(repr, get_args(Way))))
        for name, value in (("choose", 1 if self.choose is None else self.choose), ("choose_steps", self.choose_steps)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{name} must be 1 or more", got=repr(value))

    @property
    def folder(self) -> Path:
        """The factorized folder.

        Raises:
            OptionError: none is given, or there is none at the path.
        """
        if self.factorized is None:
            raise OptionError("SpectralConfig needs a factorized checkpoint", expected="factorized=FOLDER")
        folder = Path(self.factorized)
        if not (folder / MANIFEST_FILE).is_file():
            raise OptionError(
                f"there is no factorized checkpoint in {folder}",
                got="a folder without " + MANIFEST_FILE if folder.is_dir() else "no folder",
                expected="the folder that the adapter was trained with"
                if self.fingerprint
                else "what surgery.factorize writes",
                hint='write the path of the folder on this machine under "factorized" into adapter_config.json, which '
                "trainers also read if they get only the adapter; or pass "
                "PeftModel.from_pretrained(..., config=SpectralConfig(factorized=FOLDER, train=...))"
                if self.fingerprint
                else None,
            )
        return folder

    def describe(self, manifest: Manifest, absent: list[str]) -> None:
        """Fill in what the checkpoint and the model tell.

        Args:
            manifest: of the factorized checkpoint.
            absent: keys of the targets that the model does not have.

        Raises:
            OptionError: the adapter belongs to other factors.
        """
        if self.fingerprint is not None:
            check_fingerprint(self.fingerprint, manifest.fingerprint, self.folder)
        self.fingerprint = manifest.fingerprint
        self.absent = absent
        self.shapes = {target.key: list(target.scales_shape) for target in manifest.targets}

    def keep_choice(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Note which directions (B, k), bool, of each target have been chosen."""
        self.chosen = {key: numpy.packbits(mask.numpy()).tobytes().hex() for key, mask in masks.items()}

    def choice(self, key: str, count: int, k: int) -> torch.Tensor:
        """Which directions of a target have been chosen, bool (count, k); all where that is not known.

        Raises:
            OptionError: what the config says makes no sense.
        """
        if self.chosen is None or key not in self.chosen:
            return torch.ones(count, k, dtype=torch.bool)
        try:
            packed = numpy.frombuffer(bytes.fromhex(self.chosen[key]), dtype=numpy.uint8)
            bits = numpy.unpackbits(packed, count=count * k).astype(bool).reshape(count, k)
        except (ValueError, TypeError):
            bits = numpy.zeros((1, 1), dtype=bool)
        counts = set(bits.sum(axis=1).tolist())
        if len(bits) != count or len(counts) > 1 or 0 in counts:
            raise OptionError(f"the choice of directions of {key!r} in the adapter's config is damaged")
        return torch.from_numpy(bits)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's method, with a note where directions were to be chosen and have not been.

        Args:
            save_directory: the folder.

        Warns:
            SurgeryWarning: no directions have been chosen yet.
        """
        if self.choose is not None and self.chosen is None and self.fingerprint is not None:
            note(
                f"no directions have been chosen (choose={self.choose}): that is done after {self.choose_steps} steps of an "
                "optimizer of torch that has these parameters; all directions are saved"
            )
        super().save_pretrained(save_directory, **kwargs)


def check_fingerprint(adapter: str, checkpoint: str, folder: Path) -> None:
    """Refuse an adapter of other factors. Raises OptionError, naming both fingerprints."""
    if adapter != checkpoint:
        raise OptionError(
            f"the adapter belongs to other factors than those in {folder}",
            got=f"an adapter of fingerprint {adapter}",
            expected=f"fingerprint {checkpoint}",
            hint="use the factorized folder that it was trained with",
        )
