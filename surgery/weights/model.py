"""The weights of a model in a folder or on the hub, plain or quantized."""

from __future__ import annotations

from pathlib import Path

from surgery.quantized.recognize import Quantization
from surgery.source.origin import damaged_copy
from surgery.source.protocol import Source, WeightFiles
from surgery.weights.protocol import FindQuantization, Weights


class ModelWeights(Weights):
    """The weights of a model, dequantized where they are quantized.

    Args:
        files: its weight files.
        find_quantization: see ``Weights``.
        name: of the model, put before the names of its files in messages; empty where a message names the model anyway.
    """

    def __init__(self, files: WeightFiles, find_quantization: FindQuantization = Quantization, name: str = "") -> None:
        super().__init__(files, find_quantization)
        self._name = name

    def check(self, shard: str, sha256: str) -> None:
        """Refuse a weight file whose sha256 is not the one that the hub tells.

        Raises:
            SourceError: names the command that fetches it again.
        """
        expected = self.files.sha256(shard)
        if expected not in (None, sha256):
            name = f"{self._name}/{shard}" if self._name else shard
            raise damaged_copy(name, self.files.again(shard), f"sha256 {sha256}", f"sha256 {expected}")


class StudiedWeights(ModelWeights):
    """The weights of a model that ``spectra`` or ``project`` reads: only weight files with targets are read as a whole.

    Those are hashed while they are read. Other files, read for parts of quantized weights alone, are checked when they are
    fetched.
    """

    def __init__(self, source: Source, find_quantization: FindQuantization) -> None:
        super().__init__(source, find_quantization, source.name)
        self._source = source

    def _path_of_parts(self, shard: str) -> Path:
        return self._source.fetch(shard)
