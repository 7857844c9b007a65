"""Train the scales of a causal language model with transformers' Trainer.

    python examples/hf_trainer.py                          # the small model that comes with surgery
    python examples/hf_trainer.py MODEL FACTORIZED OUT     # any other model: a repo id or a folder
    python examples/hf_trainer.py ... --resume             # resume from the last checkpoint in OUT

FACTORIZED is the folder that `surgery factorize MODEL -o FACTORIZED` writes; the script makes it if it is missing. OUT
gets checkpoints of some kilobytes each and, at the end, the scales.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics  # Python's help texts stand in for your data

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import surgery

DEMO_MODEL = Path(surgery.__file__).parent / "demo" / "model"


class ScalesTrainer(surgery.SaveScales, Trainer):
    """Its checkpoints hold the scales, not the model."""


parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default=str(DEMO_MODEL))
parser.add_argument("factorized", nargs="?", default="factorized")
parser.add_argument("out", nargs="?", default="trained")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()

if not Path(options.factorized).exists():
    surgery.factorize(options.model, options.factorized, rank=16)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
scales = surgery.attach(model, options.factorized)

tokenizer = AutoTokenizer.from_pretrained(options.model)
tokens = tokenizer("\n".join(topics.values()), verbose=False).input_ids
blocks = [tokens[start : start + 128] for start in range(0, len(tokens) - 127, 128)]
examples = [{"input_ids": block, "labels": block} for block in blocks]

arguments = TrainingArguments(
    options.out,
    max_steps=options.steps,
    save_steps=max(1, options.steps // 2),
    per_device_train_batch_size=8,
    learning_rate=2e-2,
    weight_decay=0,  # the parameters are g - 1: decay would pull them towards the untouched model
    lr_scheduler_type="cosine",
    logging_steps=5,
    report_to="none",
)
trainer = ScalesTrainer(
    model,
    arguments,
    train_dataset=[example for i, example in enumerate(examples) if i % 200],
    eval_dataset=examples[::200],
    data_collator=default_data_collator,  # all blocks have the same length
    processing_class=tokenizer,
    scales=scales,
    # Train half of the directions of each weight: those on which the loss of some batches depends most.
    callbacks=[surgery.ChooseDirections(scales, keep=8)],
)
before = trainer.evaluate()["eval_loss"]
trainer.train(resume_from_checkpoint=options.resume)
print(f"held-out loss: {before:.4f} before, {trainer.evaluate()['eval_loss']:.4f} after")

trainer.save_model()
print(f"surgery fold {options.factorized} {Path(options.out) / 'scales.safetensors'} -o folded")
