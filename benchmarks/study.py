"""Does full fine-tuning amplify the top of the spectrum? On the model that comes with surgery, with text of another kind.

    python benchmarks/study.py OUT            # some minutes on two cores; OUT/report/index.html

The base is a byte-level Llama that was trained from nothing on Python source code (tools/train_demo_model.py). Here all
of its weights are trained on English prose, and ``surgery spectra`` looks at both. docs/study.md tells what came out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from surgery.cli.main import main
from surgery.demo.run import CONTEXT, MODEL, load, mean_loss, prose

BATCH = 16


def fine_tune(out: Path, steps: int, learning_rate: float, weight_decay: float, seed: int) -> tuple[float, float]:
    """Train all weights and save the model in float32; held-out losses before and after, nats per byte."""
    text, held_out = prose()
    model = load(MODEL)
    before = mean_loss(model, held_out)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
        ids = text[starts + torch.arange(CONTEXT)]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.eval()
    model.save_pretrained(out)
    return before, mean_loss(model, held_out)


def draw(report: Path, folder: Path, names: Sequence[str]) -> None:
    """Pictures of the page as files of their own, for some groups of weights."""
    from surgery.report import plots
    from surgery.report.summary import groups_of

    found = json.loads((report / "spectra.json").read_text())
    groups = [group for group in groups_of(found["targets"]) if group.name in names]
    r = found["options"]["subspace"]
    folder.mkdir(parents=True, exist_ok=True)
    for kind, picture in (
        ("amplification", plots.amplification_picture(groups, r)),
        ("rotation", plots.rotation_picture(groups, r)),
    ):
        for panel in picture.panels:
            width, height = panel.size
            style = "color:#333;background:#fff"
            head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" style="{style}">'
            (folder / f"{kind}-{panel.group}.svg").write_text(f"{head}<title>{panel.description}</title>{panel.svg}</svg>\n")


parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--learning-rate", type=float, default=5e-4)
parser.add_argument("--weight-decay", type=float, default=0.0)
parser.add_argument("--pictures", type=Path, help="write some of the pictures here")
parser.add_argument("--seed", type=int, default=0)

if __name__ == "__main__":
    options = parser.parse_args()
    losses = fine_tune(options.out / "tuned", options.steps, options.learning_rate, options.weight_decay, options.seed)
    print(f"held-out loss: {losses[0]:.4f} before, {losses[1]:.4f} after")
    report = options.out / "report"
    models = str(MODEL), str(options.out / "tuned")
    main(["spectra", *models, "-o", str(report), "--top", "256", "--overwrite"], standalone_mode=False)
    if options.pictures is not None:
        draw(report, options.pictures, ("mlp.up_proj", "self_attn.o_proj", "self_attn.q_proj"))
    print(json.dumps(json.loads((report / "spectra.json").read_text())["findings"], indent=1))
