"""Train the scales of a causal language model as an adapter of PEFT, with TRL's unchanged SFTTrainer.

    python examples/peft_trainer.py                          # the small model that comes with surgery
    python examples/peft_trainer.py MODEL FACTORIZED OUT     # any other model: a repo id or a folder

FACTORIZED is the folder that `surgery factorize MODEL -o FACTORIZED` writes; the script makes it if it is missing. OUT
gets an adapter of some kilobytes. PeftModel.from_pretrained and transformers load it after `import surgery.peft`.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics  # Python's help texts stand in for your data

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import surgery.peft

DEMO_MODEL = Path(surgery.__file__).parent / "demo" / "model"

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default=str(DEMO_MODEL))
parser.add_argument("factorized", nargs="?", default="factorized")
parser.add_argument("out", nargs="?", default="trained")
parser.add_argument("--steps", type=int, default=40)
options = parser.parse_args()

if not Path(options.factorized).exists():
    surgery.factorize(options.model, options.factorized, rank=16)
tokenizer = AutoTokenizer.from_pretrained(options.model)
if tokenizer.eos_token is None:  # as for the demo model, whose tokens are the 256 bytes
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
paragraphs = [text for name in sorted(topics) for text in topics[name].split("\n\n") if len(text) > 100]
data = Dataset.from_dict({"text": paragraphs[:2000]}).train_test_split(test_size=64, seed=0)

trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(options.model, dtype="auto"),
    SFTConfig(
        options.out,
        max_steps=options.steps,
        max_length=128,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        weight_decay=0,  # the parameters are g - 1: decay would pull them towards the untouched model
        lr_scheduler_type="cosine",
        logging_steps=5,
        bf16=torch.cuda.is_available(),
        report_to="none",
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    processing_class=tokenizer,
    peft_config=surgery.peft.SpectralConfig(factorized=options.factorized, task_type="CAUSAL_LM"),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"held-out loss: {before:.4f} before, {trainer.evaluate()['eval_loss']:.4f} after")

trainer.save_model()  # writes the adapter; the next line writes the scales alone, for surgery fold
surgery.peft.scales_of(trainer.model).save(Path(options.out) / "scales.safetensors")
print(f"surgery fold {options.factorized} {Path(options.out) / 'scales.safetensors'} -o folded")
