"""Memory of training scales and cores, beside the frozen model, LoRA and full training of the same.

    python benchmarks/training_memory.py --hidden 512 --layers 4 --length 512 --batch 4 --rank 16

A random Llama from a configuration, one training step of each way, the same input, without gradient checkpointing. The
input requires a gradient, as with layers trained before it, so that all layers of the frozen model hand one on.

The rows "of 64", with ``--rank 16``, are of 16 directions that have been chosen of 64.

``saved`` counts the storages that autograd keeps for the backward pass, each once, without parameters and buffers: exact.
``peak`` is the most that was allocated at any time of forward, backward and Adam's first step, which makes its
state, on top of what was there before the step: torch's own count of its allocations on the CPU. Needs transformers and peft.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

import surgery

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_model(folder: Path, args: argparse.Namespace, dtype: torch.dtype) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=7 * args.hidden // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
        vocab_size=1024,
        max_position_embeddings=args.length,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def with_lora(model: Any, rank: int, *, in_float32: bool) -> Any:
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEAR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls what transformers is about to rename
        return peft.get_peft_model(model, config, autocast_adapter_dtype=in_float32)


def inputs(model: Any, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    ids = torch.randint(1024, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    return {"inputs_embeds": embedded, "labels": ids}


def saved_bytes(model: Any, args: argparse.Namespace) -> int:
    there = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # kept alive, so that no other storage gets its address

    batch = inputs(model, args)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(kept.values())


def peak_bytes(model: Any, args: argparse.Namespace) -> int:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters) if parameters else None
    batch = inputs(model, args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(**batch).loss.backward()
        if optimizer:
            optimizer.step()
    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def report(folder: Path, args: argparse.Namespace, dtype: torch.dtype) -> None:
    write_model(folder / "model", args, dtype)
    manifest = surgery.factorize(folder / "model", folder / "factorized", rank=args.rank).manifest
    surgery.factorize(folder / "model", folder / "wide", rank=4 * args.rank, layout="overlay")
    tokens, targets = args.batch * args.length, len(manifest.targets)
    rank_k = tokens * args.rank * dtype.itemsize
    widths = [target.shape[1] for target in manifest.targets]
    print(
        f"\n{str(dtype).removeprefix('torch.')}: {targets} targets, {tokens} tokens; an activation of rank {args.rank} is "
        f"{rank_k / 1e6:.3f} MB, the inputs of a target are {sum(widths) / len(widths) * tokens * dtype.itemsize / 1e6:.1f} MB "
        f"on average\n"
    )
    print("| | trainable | saved, MB | over frozen, MB | per target, in activations of that rank | peak, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    frozen = 0
    wide = f"{args.rank} of {4 * args.rank}"
    attached = ("scales", "core", "orthogonal", f"scales, {wide}", f"core, {wide}", f"orthogonal, {wide}")
    for name in ("frozen", *attached, "LoRA", "LoRA, adapters in bfloat16", "full"):
        if "bfloat16" in name and dtype is not torch.bfloat16:
            continue
        model = load(folder / "model", dtype)
        if name == "frozen":
            model.requires_grad_(False)
        elif name in attached:
            train, _, chosen = name.partition(", ")
            scales = surgery.attach(model, folder / ("wide" if chosen else "factorized"), train=train)
            if chosen:
                model(**inputs(model, args)).loss.backward()
                scales.choose(keep=args.rank)
        elif name.startswith("LoRA"):
            model = with_lora(model, args.rank, in_float32=name == "LoRA")
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        saved = saved_bytes(model, args)
        frozen = frozen or saved
        extra = saved - frozen
        print(
            f"| {name} | {trainable} | {saved / 1e6:.2f} | {extra / 1e6:.2f} | {extra / targets / rank_k:.3f} | "
            f"{peak_bytes(model, args) / 1e6:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    for dtype in (torch.bfloat16, torch.float32):
        with tempfile.TemporaryDirectory(prefix="surgery-bench-") as folder:
            report(Path(folder), args, dtype)


if __name__ == "__main__":
    main()
