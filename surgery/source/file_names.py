"""Kinds of files in a model's folder, by their names alone: weights, configs, other files of loaders, and what is left out."""

from __future__ import annotations

import re
from fnmatch import translate

from surgery.names import CONFIG_FILE, RESERVED_SUFFIX, is_litter
from surgery.source.weight_files import SUFFIX, is_index

#: Suffixes of weights in other formats. Such files are never opened.
OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml",
    ".ot", ".npz", ".npy", ".tflite", ".mlmodel", ".pb", ".tar", ".zip", ".gz",
)  # fmt: skip

#: Suffixes of PyTorch's weights that are pickles.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
#: Suffixes of arrays, which a model's code may read beside its weights.
ARRAYS = (".npz", ".npy")
MODULES_FILE = "modules.json"
PIPELINE_FILE = "model_index.json"
ALPHABET_FILE = "alphabet.json"
ADAPTER_FILE = "adapter_config.json"


def name_patterns(*globs: str) -> re.Pattern[str]:
    """An expression that matches, ignoring case, what any of the globs matches."""
    return re.compile("|".join(map(translate, globs)), re.IGNORECASE)


#: Configs at the top of a model: loaders look for them by name, and they may name further files.
CONFIGS = name_patterns(
    CONFIG_FILE, "configuration.json", "generation_config*.json", "*processor_config.json", "*tokenizer_config.json",
    MODULES_FILE, "router_config.json", "config_sentence_transformers.json", "sentence_*_config.json", "open_clip_config.json",
    PIPELINE_FILE, "scheduler_config.json", "speaker_embeddings_path.json",
)  # fmt: skip
#: Other files at the top that loaders look for by name: tokenizers, templates, code.
_KNOWN = name_patterns(
    "hf_quant_config.json", "quant*_config.json", "params.json", "chat_template*.json", "*.jinja",
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*.tokenizer", "*.model", "*.model.v[0-9]*", "*.spm",
    "*.tiktoken", "tekken*.json", "*vocab*.json", "*vocab*.txt", "vocab.*", "*.vocab", "*merges*.txt", "*.bpe", "*.codes",
    "dict*.txt", "encoder.json", "emoji.json", "byte_maps.json", "normalizer.json", "word_shape.json",
    "word_pronunciation.json", ALPHABET_FILE, "*.py", "requirements.txt", "modelcard.json",
)  # fmt: skip
#: The card of a model, in small letters.
CARD = "readme.md"
#: Cards, licences and the like.
CARDS = re.compile(
    r"(readme|citation|authors|[^/]*(licen[cs]e|copying|notice|(usage|use)[_-]?policy|terms[_-]of[_-]use|acceptable[_-]use))"
    r"([^/]*\.(md|txt|rst|html?|pdf|cff)|[^/.]*(\d[\d.]*)?)",
    re.IGNORECASE,
)
#: Files of adapters, under the names that several libraries give them.
ADAPTERS = name_patterns(
    ADAPTER_FILE, "adapter_*.safetensors", "adapter_*.bin", "adapter_*.index.json", "*adapters.safetensors",
    "*adapters.npz", "pytorch_lora_weights.*",
)  # fmt: skip
#: Folders that loaders look into -> the files that they look for there.
KNOWN_FOLDERS = {
    "additional_chat_templates": name_patterns("*.jinja"),
    "custom_generate": name_patterns("*.py", "requirements.txt"),
}
#: Files and folders that training runs leave beside a model.
OF_A_RUN = name_patterns(
    "training_args.*", "trainer_state.json", "optimizer*.bin", "optimizer*.pt", "optimizer*.pth", "optimizer*.safetensors",
    "scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state*", "random_states_*", "events.out.tfevents.*", "*_results.json",
    "*.distcp", "zero_to_fp32.py", "*.log", "checkpoint-*[0-9]", "global_step*[0-9]", "wandb", "runs", "logs", "mlruns",
    "lightning_logs",
)  # fmt: skip
#: Suffixes of files that are being downloaded, or that a download program keeps beside them.
DOWNLOADS = (".incomplete", ".tmp", ".part", ".crdownload", ".download", ".aria2")
_LEFTOVERS = (RESERVED_SUFFIX, *DOWNLOADS, ".bak", ".orig", ".old", ".swp", ".lock", "~")
#: Reasons why a file is left out.
SPARE = "an unfinished file or a spare copy"
OTHER_FORMAT = "weights in another format"


def is_read_by_loaders(name: str) -> bool:
    """Whether loaders look for a file of this name: weights, index, config, tokenizer, code, card and the like.

    Files that only the config of a particular model names are not among them.
    """
    folder, _, file = name.rpartition("/")
    if folder:
        return folder in KNOWN_FOLDERS and KNOWN_FOLDERS[folder].fullmatch(file) is not None
    return name.endswith(SUFFIX) or is_index(name) or (why_left_out(name) is None and is_known_name(name))


def why_left_out(name: str) -> str | None:
    """Why a file or folder of this name is never copied into a result; None if it may be."""
    if name.startswith("."):
        return "hidden"
    if is_litter(name):
        return "left by a file manager"
    if name.endswith(_LEFTOVERS):
        return SPARE
    if OF_A_RUN.fullmatch(name):
        return "left by a training run"
    if name.endswith(OTHER_WEIGHTS) and not name.endswith(ARRAYS):
        return OTHER_FORMAT
    return None


def is_known_name(name: str) -> bool:
    """Whether a file at the top of a model is copied into a result for its name alone; weights and indexes are not asked."""
    return any(names.fullmatch(name) for names in (CONFIGS, _KNOWN, CARDS))
