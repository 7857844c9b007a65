"""Train the scales of a causal language model in a plain PyTorch loop.

    python examples/plain_loop.py                          # the small model that comes with surgery
    python examples/plain_loop.py MODEL FACTORIZED OUT     # any other model: a repo id or a folder

FACTORIZED is the folder that `surgery factorize MODEL -o FACTORIZED` writes; the script makes it if it is missing. OUT
gets the scales.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics  # Python's help texts stand in for your data

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery

DEMO_MODEL = Path(surgery.__file__).parent / "demo" / "model"

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default=str(DEMO_MODEL))
parser.add_argument("factorized", nargs="?", default="factorized")
parser.add_argument("out", nargs="?", default="trained")
parser.add_argument("--steps", type=int, default=40)
options = parser.parse_args()

if not Path(options.factorized).exists():
    surgery.factorize(options.model, options.factorized, rank=16)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(device)
scales = surgery.attach(model, options.factorized)

tokenizer = AutoTokenizer.from_pretrained(options.model)
tokens = tokenizer("\n".join(topics.values()), return_tensors="pt", verbose=False).input_ids[0]
blocks = tokens[: len(tokens) // 128 * 128].view(-1, 128)
blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]
held_out, blocks = blocks[:16].to(device), blocks[16:]


def loss_of(ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


with torch.no_grad():
    before = loss_of(held_out).item()
model.train()
# Train half of the directions of each weight: those on which the loss depends most, by the gradients of some batches.
for start in range(0, 64, 8):
    loss_of(blocks[start : start + 8].to(device)).backward()
scales.choose(keep=8)
# The parameters are g - 1 in float32. Weight decay would pull them towards the untouched model.
optimizer = torch.optim.AdamW(scales.parameters(), lr=2e-2, weight_decay=0)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
for step in range(options.steps):
    start = step * 8 % (len(blocks) - 7)
    loss = loss_of(blocks[start : start + 8].to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    print(f"step {step + 1}: loss {loss.item():.3f}")
model.eval()
with torch.no_grad():
    print(f"held-out loss: {before:.4f} before, {loss_of(held_out).item():.4f} after")

file = Path(options.out) / "scales.safetensors"
file.parent.mkdir(parents=True, exist_ok=True)
scales.save(file)
print(f"surgery fold {options.factorized} {file} -o folded")
