"""How long PEFT takes to put an adapter beside a model, for each kind that trains scales or begins with the factors.

    python benchmarks/peft_at_load.py --sizes 512,1024,2048,4096
    python benchmarks/peft_at_load.py --start

A Llama of one layer with hidden size n, of which one matrix (n, n) is factorized, in bfloat16. Timed is what a trainer calls:
``PeftModel.from_pretrained`` with an adapter that ``surgery export`` has written: ``peft-trainable``, whose TinyLoRA makes a
full SVD of the matrix and then takes the factors from the file, and for ``peft-pissa``, a plain LoRA on the residual; and
``get_peft_model`` with PEFT's own PiSSA (a full SVD as well) and with ``surgery.peft.SpectralConfig``. What each takes without
the matrix, on the smallest size, is not taken off. Medians of ``--repeats``, all kinds in turn.

``--start``: how far from the original model, the demo's, a LoRA on the residual begins, ours and PEFT's own PiSSA, on 400 bytes
of Python: logits against those of the original in the same dtype.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import surgery  # noqa: E402
from benchmarks.checkpoints import llm_like  # noqa: E402
from surgery.peft import SpectralConfig  # noqa: E402

RANK = 16


def save_model(folder: Path, n: int) -> None:
    """A Llama of one layer with one matrix (n, n) like a real one."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=n, intermediate_size=64, num_hidden_layers=1, num_attention_heads=n // 64
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.layers[0].self_attn.q_proj.weight.copy_(llm_like(n, n, torch.Generator().manual_seed(0)))
    model.save_pretrained(folder)


def kinds(folder: Path) -> dict[str, tuple[str, Callable[[Any], Any]]]:
    """Kind -> which model it is put beside, and how."""
    lora = {"r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}

    def continued(name: str) -> Callable[[Any], Any]:
        return lambda model: peft.PeftModel.from_pretrained(model, folder / name, is_trainable=True)

    return {
        "peft-trainable": ("m", continued("peft-trainable")),
        "peft-pissa": ("f", continued("peft-pissa")),
        "SpectralConfig": ("m", lambda model: peft.get_peft_model(model, SpectralConfig(factorized=str(folder / "f")))),
        "PEFT's PiSSA": ("m", lambda model: peft.get_peft_model(model, peft.LoraConfig(**lora, init_lora_weights="pissa"))),
        "PEFT's LoRA": ("m", lambda model: peft.get_peft_model(model, peft.LoraConfig(**lora))),
    }


def print_start() -> None:
    """Where ``peft-pissa`` and PEFT's own PiSSA begin."""
    demo = ROOT / "surgery/demo/model"
    ids = torch.tensor([list(Path(argparse.__file__).read_bytes()[:400])])
    load = transformers.AutoModelForCausalLM.from_pretrained
    print("| dtype | kind | mean | largest | KL |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as made, torch.no_grad():
        surgery.factorize(demo, Path(made) / "f", rank=RANK)
        surgery.export(Path(made) / "f", None, Path(made) / "a", to="peft-pissa")
        names = [one.tensor.removesuffix(".weight") for one in surgery.inspect(Path(made) / "f").targets]
        pissa = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, init_lora_weights="pissa")
        for dtype in (torch.bfloat16, torch.float32):
            original = load(demo, dtype=dtype)(ids).logits.float()
            ours = peft.PeftModel.from_pretrained(load(Path(made) / "f", dtype=dtype), Path(made) / "a")
            for name, model in (("peft-pissa", ours), ("PEFT's PiSSA", peft.get_peft_model(load(demo, dtype=dtype), pissa))):
                logits = model.eval()(ids).logits.float()
                log_p, log_q = original.log_softmax(-1), logits.log_softmax(-1)
                divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
                off = (logits - original).abs()
                print(f"| {dtype} | {name} | {off.mean():.4f} | {off.max():.3f} | {divergence:.1e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="512,1024,2048")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--start", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.start:
        print_start()
        return
    print(f"{torch.get_num_threads()} threads, PEFT {peft.__version__}; seconds, medians of {options.repeats}")
    names: list[str] = []
    for size in map(int, options.sizes.split(",")):
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            save_model(folder / "m", size)
            surgery.factorize(folder / "m", folder / "f", rank=RANK, include=["*q_proj*"])
            for to in ("peft-trainable", "peft-pissa"):
                surgery.export(folder / "f", None, folder / to, to=to)
            found: dict[str, list[float]] = {}
            for _ in range(options.repeats):
                for name, (of, put) in kinds(folder).items():
                    model = transformers.AutoModelForCausalLM.from_pretrained(folder / of, dtype=torch.bfloat16)
                    start = time.perf_counter()
                    put(model)
                    found.setdefault(name, []).append(time.perf_counter() - start)
            if not names:
                names = [*found]
                print("| matrix | " + " | ".join(names) + " |\n|" + " --- |" * (1 + len(names)))
            print(
                f"| {size} x {size} | " + " | ".join(f"{statistics.median(found[name]):.2f}" for name in names) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
