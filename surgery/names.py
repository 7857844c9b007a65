"""File names, tensor keys and dtype names of the on-disk contract (docs/format.md). No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

FORMAT_VERSION = 1

#: All our own files are in this subfolder, since loaders take any ``*.safetensors`` at the top.
SURGERY_DIR = "surgery"
MANIFEST_FILE = f"{SURGERY_DIR}/manifest.json"
SCALES_FILE = f"{SURGERY_DIR}/scales.safetensors"
#: The scales in each checkpoint folder of a Trainer, and beside the factors in a factorized one.
CHECKPOINT_FILE = "scales.safetensors"

CONFIG_FILE = "config.json"

#: Hidden, so that no loader looks into it; it exists only while a result is unfinished.
JOURNAL_DIR = ".surgery"
LOCK_FILE = f"{JOURNAL_DIR}/lock"
RUN_FILE = f"{JOURNAL_DIR}/run.json"
FILES_FILE = f"{JOURNAL_DIR}/files.json"
STREAM_DIR = f"{JOURNAL_DIR}/shards"
#: Where weight files of a second model are while they are needed.
TUNED_STREAM_DIR = f"{JOURNAL_DIR}/tuned-shards"
PARTIALS_DIR = f"{JOURNAL_DIR}/partials"
#: What finished jobs leave that a result is made of in the end, and that is no file of it.
PARTS_DIR = f"{JOURNAL_DIR}/parts"
#: Where a result is made that will replace an earlier one, and the list of the earlier one's files to be deleted then.
RESULT_DIR = f"{JOURNAL_DIR}/result"
REPLACED_FILE = f"{JOURNAL_DIR}/replaced.json"

#: What ``surgery spectra`` writes: the numbers, which are written last; the same as a table; and a page.
SPECTRA_FILE, SPECTRA_TABLE, SPECTRA_PAGE = "spectra.json", "spectra.csv", "index.html"

#: What ``surgery extract`` writes last beside an adapter: what was found, and of which run.
EXTRACTION_FILE = "extraction.json"

RESERVED_SUFFIX = ".partial"

#: What is trained of each target: a multiplier for each kept direction, or a small matrix between them.
Train = Literal["scales", "core"]
TRAINS: tuple[Train, ...] = ("scales", "core")
#: What several of them are called.
TRAINED: Mapping[Train, str] = {"scales": "scales", "core": "cores"}

#: The only metadata entry of a scales file, a JSON object. There is only one, since writers do not keep the order of several.
SCALES_METADATA_KEY = "surgery"

#: The attribute in which a module keeps its scales while a model is trained, or the beginning of the attribute's name.
ATTACHED_NAME = "surgery_scale"

#: The file by which a folder with an adapter is recognized, and the names of the matrices of PEFT, diffusers and kohya.
ADAPTER_CONFIG = "adapter_config.json"
#: PEFT's weights beside it, and what stands before the name of each module in them.
ADAPTER_WEIGHTS = "adapter_model.safetensors"
#: What older versions of PEFT saved instead.
PICKLED_ADAPTER = "adapter_model.bin"
#: The weights of a LoRA adapter as diffusers saves them.
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
#: The name that surgery gives to an adapter in kohya's layout, which has none of its own.
KOHYA_WEIGHTS = "adapter.safetensors"
PEFT_PREFIX = "base_model.model."
#: What an adapter of PEFT consists of.
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
#: Before the fingerprint of the factors in an adapter that is for a residual checkpoint: a comment in one of its patterns of
#: alphas, which are regular expressions. PEFT drops what it does not know from a config that it saves again, and keeps these.
RESIDUAL_OF = "(?#surgery-residual-of-"
#: The type of PEFT's adapters in which scales or cores are trained (``surgery.peft``).
SPECTRAL = "SPECTRAL"
#: PEFT's own type of the adapters that ``export`` writes to be trained.
TINYLORA = "TINYLORA"
_OF_LORA = re.compile(r"(^|[._])lora[._](embedding_)?(a|b|up|down)([._]|$)", re.IGNORECASE)

#: Bits per element by safetensors dtype name.
DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

#: What the packed numbers of quantized weights are called here (``surgery.quantized``), which are stored in other dtypes.
PACKED_BITS = {"MXFP4": 4, "NVFP4": 4, "INT4": 4, "INT8": 8}
#: Dtype of packed numbers -> the spacing next to 1 of a float whose roundings are as large, beside a weight, as those to it.
#: Of integers, for weights whose largest are three times as large as most.
PACKED_SPACINGS = {"MXFP4": 1 / 2, "NVFP4": 1 / 2, "INT4": 1 / 2, "INT8": 1 / 32}
#: What safetensors calls 8-bit floats with four bits of exponent.
FP8 = "F8_E4M3"
#: And those with five.
FP8_WIDE = "F8_E5M2"
#: Bits of one number of a weight, by its dtype.
WEIGHT_BITS = DTYPE_BITS | PACKED_BITS

#: The dtypes that weights and adapters are written in on demand, as torch and configs name them.
Dtype = Literal["bfloat16", "float16", "float32"]
#: What the format calls them.
DTYPES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

#: Dtypes whose weights can be factorized and recovered bit for bit.
FACTORIZABLE_DTYPES = ("BF16", "F16", "F32")


#: Files that a run writes into the subfolder, finished or not.
OUR_FILES = re.compile(
    rf"{SURGERY_DIR}/(factors-\d{{5,}}-of-\d{{5,}}\.safetensors|scales\.safetensors|manifest\.json)(\.partial)?"
)


#: Files that systems and file managers leave in any folder, such as ``._model.safetensors`` beside a file.
_LITTER = re.compile(r"\._.*|\.DS_Store|(eh)?thumbs\.db|desktop\.ini|__MACOSX|\.ipynb_checkpoints", re.IGNORECASE)


def is_litter(name: str) -> bool:
    """Whether a file was, by its path, left by a system or a file manager, or is in a folder that was."""
    return any(map(_LITTER.fullmatch, name.split("/")))


def is_reserved(name: str) -> bool:
    """Whether a path is reserved for our own files in a result, finished or not, so that no file of a model may have it."""
    name = name.casefold()  # some disks ignore case
    return name.split("/")[0] in (JOURNAL_DIR, SURGERY_DIR) or name.endswith(RESERVED_SUFFIX)


def factors_file(index: int, count: int) -> str:
    """Path of the factors of shard ``index`` (from 0) of ``count``, relative to the checkpoint."""
    return f"{SURGERY_DIR}/factors-{index + 1:05d}-of-{count:05d}.safetensors"


def part_file(index: int, count: int) -> str:
    """Path of what the job of shard ``index`` (from 0) of ``count`` leaves, relative to the output folder."""
    return f"{PARTS_DIR}/{index + 1:05d}-of-{count:05d}.safetensors"


def is_of_lora(name: str) -> bool:
    """Whether a tensor is part of a LoRA adapter, by its name."""
    return _OF_LORA.search(name) is not None


def target_key(tensor: str, part: str | None) -> str:
    """The name of a target: that of its tensor, followed by the slice in brackets if it is one."""
    return tensor if part is None else f"{tensor}[{part}]"


def factor_key(key: str, part: str) -> str:
    """Key of one part (``U``, ``s``, ``V`` or ``correction``) of a target's factors."""
    return f"{key}.{part}"


def correction_key(key: str, index: int | None) -> str:
    """Key of a target's correction; for a stack (``index`` is not None) of the correction of one of its matrices."""
    return factor_key(key, "correction") if index is None else factor_key(key, f"correction.{index}")


def glob_of_numbers(name: str) -> str:
    """A tensor's name with ``*`` for each number between dots: the same for those that differ in numbers alone."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def told_dtype(dtype: str) -> str:
    """What people call the dtype of a weight that may be quantized."""
    return "FP8" if dtype == FP8 else dtype
