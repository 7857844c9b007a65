"""Train the small language model that ships in ``surgery/demo/model``.

    python tools/train_demo_model.py --steps 4000 --out surgery/demo/model

Llama architecture, a tokenizer of bytes, bfloat16, two shards and an index. The text is the source code of
the Python standard library, which every Python installation carries; the test suites, generated tables and
``pydoc_data`` are left out (``surgery demo`` trains on the latter, English reference prose, so the model must
not have seen it).

The result depends on the Python version whose library is read and on the machine's arithmetic, so a second
run gives a similar model, not the same bytes. About 25 minutes on two cores.
"""

import argparse
import json
import math
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM

SKIPPED_DIRS = {"test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "site-packages", "__pycache__"}
CONTEXT = 256


def corpus() -> torch.Tensor:
    """The library's source as one uint8 tensor, files in name order, separated by a zero byte."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not SKIPPED_DIRS & set(path.relative_to(root).parts[:-1]) and not path.name.startswith("_sysconfigdata")
    )
    data = b"\0".join(path.read_bytes() for path in files)
    print(f"{len(files)} files, {len(data) / 1e6:.1f} MB", file=sys.stderr)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def save_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one token per byte, the token's id being the byte's value.

    It is of SentencePiece's kind, with byte fallback, which llama.cpp's converter takes as it is; a byte-level BPE is one that
    it has to know. There are no merges. A printable character is its own token, a space is written as U+2581, as this kind
    has it, every other byte is ``<0xNN>``. The one text that does not become its UTF-8 bytes is U+2581 itself: a space.
    """
    name = {byte: f"<0x{byte:02X}>" for byte in range(256)} | {byte: chr(byte) for byte in range(ord("!"), ord("~") + 1)}
    name[ord(" ")] = "▁"
    tokenizer = Tokenizer(models.BPE(vocab={name[byte]: byte for byte in range(256)}, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,  # llama.cpp adds a token and a space before texts of this kind, unless told not to
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    data = corpus()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
    )
    warmup = min(100, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * step / args.steps))),
    )
    running, start = 0.0, time.monotonic()
    for step in range(args.steps):
        offsets = torch.randint(len(data) - CONTEXT, (args.batch, 1))
        ids = data[offsets + torch.arange(CONTEXT)].long()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  loss {running / 100:.4f}  {time.monotonic() - start:.0f} s", file=sys.stderr)
            running = 0.0
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out, max_shard_size="1200KB")
    save_byte_tokenizer(args.out)


if __name__ == "__main__":
    main()
