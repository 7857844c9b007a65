"""The folder that the demo leaves: what is in it, and the page that says what to do with it."""

from __future__ import annotations

from pathlib import Path

from surgery.errors import OVERWRITE, OutputError
from surgery.files.file_writer import copy_file, write_file

ORIGINAL, FACTORIZED, SCALES, FOLDED, REPORT, README = (
    "original",
    "factorized",
    "scales.safetensors",
    "folded",
    "report",
    "README.md",
)
_README = """\
# What surgery demo left

Run the commands below in this folder. Each works as it stands here, if what its comment names is installed.

| | |
| --- | --- |
| `original/` | the model before: a Llama of 1.1 million weights that reads bytes and has learned Python source code |
| `factorized/` | its matrices as singular directions and residuals, written by `surgery factorize` |
| `scales.safetensors` | the trained scales, one number for each direction |
| `folded/` | the model after: the scales folded into standard weights, written by `surgery fold` |
| `report/` | the singular values of both models, written by `surgery spectra` |

## Look at it

```sh
surgery inspect factorized                    # the matrices, and how accurate the directions are
surgery scales show scales.safetensors --top 5
python -m webbrowser report/index.html        # surgery spectra writes this page if matplotlib is installed
```

The loss of a text of your own, in nats per byte, before and after (needs transformers):

```sh
python - <<'END'
import torch, transformers
text = "If the name is not found, an error is raised."
ids = torch.tensor([list(text.encode())])
for folder in ("original", "folded"):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    print(folder, model(input_ids=ids, labels=ids).loss.item())
END
```

## Change it

```sh
# Untouched scales give the original files back, byte for byte.
surgery fold factorized factorized/surgery/scales.safetensors -o untouched
cmp original/model-00001-of-00002.safetensors untouched/model-00001-of-00002.safetensors

# Half of what was trained.
surgery blend scales.safetensors factorized/surgery/scales.safetensors --weights 0.5,0.5 -o half.safetensors
surgery fold factorized half.safetensors -o half
```

## Serve it

The folded model is a folder like that of the original. Any server that takes the original takes the folded model.

```sh
python -c "from transformers import pipeline as p; print(p('text-generation', 'folded')('A list is', max_new_tokens=80))"
vllm serve folded                                                                # vLLM
python llama.cpp/convert_hf_to_gguf.py folded --outfile folded.gguf              # llama.cpp; then: llama-server -m folded.gguf
```

The same as an adapter, for a server that holds the original model once:

```sh
surgery export factorized scales.safetensors --to peft -o adapter
vllm serve original --enable-lora --max-lora-rank {max_rank} --lora-modules tuned=adapter
```

The model is tiny. What it writes looks like English or Python and has no meaning.
"""
#: The values that vLLM takes for ``--max-lora-rank``.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def check_folder(out: Path, model: Path, *, overwrite: bool) -> bool:
    """Refuse a folder that the demo must not write to, before any work.

    Args:
        out: the folder; it need not exist.
        model: the folder of the built-in model, which is copied to ``out``.
        overwrite: whether an earlier demo may be replaced.

    Returns:
        Whether files are there that may be replaced: those of a demo that was stopped, or with ``overwrite`` of any demo.

    Raises:
        OutputError: the folder holds a demo, or other files under the demo's names.
    """
    readme = out / README
    if readme.exists() and not _starts_with(readme, _README[: _README.index("\n")].encode()):
        raise OutputError(f"{readme} is there already, and the demo did not write it", hint="-o chooses another folder")
    for path in model.iterdir():
        copy = out / ORIGINAL / path.name
        if path.is_file() and copy.exists() and not (copy.is_file() and copy.read_bytes() == path.read_bytes()):
            raise OutputError(f"{copy} is there already, and is not the demo's", hint="-o chooses another folder")
    there = [path for name in (FACTORIZED, SCALES, FOLDED, REPORT, ORIGINAL, README) if (path := out / name).exists()]
    # The README comes last: without it an earlier demo was stopped, and this one goes on.
    was_stopped = (out / FACTORIZED).is_dir() and not readme.exists()
    if there and not was_stopped and not overwrite:
        raise OutputError(f"{there[0]} is there already", hint=f"{OVERWRITE} replaces an earlier demo")
    return bool(there)


def _starts_with(path: Path, beginning: bytes) -> bool:
    return path.is_file() and path.read_bytes().startswith(beginning)


def copy_original(out: Path, model: Path) -> None:
    """Copy the built-in model to the folder."""
    (out / ORIGINAL).mkdir(exist_ok=True)
    for path in sorted(model.iterdir()):
        if path.is_file():
            copy_file(path, out / ORIGINAL / path.name, path.name)


def write_readme(out: Path, rank: int) -> None:
    """Write the README, which comes last; ``rank`` is that of the demo's targets."""
    max_rank = next((one for one in _VLLM_RANKS if one >= rank), rank)
    write_file(out / README, _README.format(max_rank=max_rank).encode())
