"""Turn trained scales into a LoRA adapter, load it with PEFT, and print how vLLM serves it.

    python examples/peft_adapter.py SCALES                            # trained by another example, on the small model
    python examples/peft_adapter.py SCALES MODEL FACTORIZED ADAPTER   # any other model

MODEL is the original model, to which the adapter belongs. What an adapter cannot express is refused, with the reason.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery

DEMO_MODEL = Path(surgery.__file__).parent / "demo" / "model"

parser = argparse.ArgumentParser()
parser.add_argument("scales")
parser.add_argument("model", nargs="?", default=str(DEMO_MODEL))
parser.add_argument("factorized", nargs="?", default="factorized")
parser.add_argument("adapter", nargs="?", default="adapter")
options = parser.parse_args()

# The same as: surgery export FACTORIZED SCALES --to peft -o ADAPTER
report = surgery.export(options.factorized, options.scales, options.adapter)
print(f"{report.modules} modules, rank {report.rank}")

model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(options.model)
ids = tokenizer("The quick brown fox", return_tensors="pt").input_ids
with torch.no_grad():
    original = model(ids).logits
    adapted_model = PeftModel.from_pretrained(model, options.adapter)
    adapted = adapted_model(ids).logits
    merged = adapted_model.merge_and_unload()(ids).logits
print(f"largest change of a logit: {(adapted - original).abs().max():.4f}")
print(f"merged against unmerged:   {(merged - adapted).abs().max():.1e}")

allowed = next(rank for rank in (1, 8, 16, 32, 64, 128, 256, 320, 512) if rank >= report.rank)
print(f"vllm serve {options.model} --enable-lora --max-lora-rank {allowed} --lora-modules tuned={options.adapter}")
