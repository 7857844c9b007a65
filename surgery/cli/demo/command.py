"""The command ``demo``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from surgery.cli.bar import Bar
from surgery.cli.demo.text import demo_text
from surgery.cli.options import PATH, device_option, json_option, notes_and_quiet, overwrite_option, quiet_option
from surgery.cli.printing import print_json
from surgery.cli.text import say, whole
from surgery.escapes import quoted
from surgery.names import SPECTRA_FILE, SPECTRA_PAGE
from surgery.progress import phase

# Modules that import torch are imported inside the commands: --help must not wait for them.


@click.command(short_help="Do the whole job on a small built-in model.")
@click.option("-o", "--out", type=PATH, help="Keep the demo's folders here; without it nothing is kept.")
@click.option("--rank", default=16, show_default=True, help="Singular directions to keep of each target.")
@click.option("--steps", default=60, show_default=True, type=click.IntRange(min=1), help="Training steps.")
@device_option
@overwrite_option
@json_option
@quiet_option
@notes_and_quiet
def demo(out: Path | None, rank: int, steps: int, device: str, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Do the whole job on the built-in model: factorize, train the scales, fold, compare.

    The model is a small Llama that has learned Python source code. Its scales are trained on English prose. The output shows
    what that changes: the loss, each word of two sentences, and the scales.

    With -o the models before and after stay in a folder, with a report of their spectra. The README.md in it says what to do
    with them.
    """
    say(
        f"A small Llama has learned Python source code. The demo takes the {rank} leading singular directions of each of its "
        "matrices, trains one scale for each direction on English prose, the topics of Python's help(), and folds the trained "
        "scales back into standard weights.",
        quiet=quiet or as_json,
    )
    say("", quiet=quiet or as_json)
    bar = Bar(quiet=quiet)
    with phase(bar, "starting"):
        from surgery.demo.run import run_demo

    report = run_demo(out, rank=rank, steps=steps, device=device, overwrite=overwrite, progress=bar)
    if as_json:
        print_json(report)
        return
    click.echo(demo_text(report))
    for line in ["", *_next_steps(out)]:
        say(line, quiet=quiet)


def _next_steps(out: Path | None) -> list[str]:
    """What one does with the folder that the demo left, each in one line with its command last."""
    if out is None:
        return [f"to keep the models and a report of their spectra, and to serve the result: {whole('surgery demo -o demo')}"]
    from surgery.demo.folder import FACTORIZED, FOLDED, README, REPORT, SCALES

    folded, report = out / FOLDED, out / REPORT
    page = next(path for path in (report / SPECTRA_PAGE, report / SPECTRA_FILE) if path.exists())
    name = json.dumps(str(folded), ensure_ascii=False)  # in double quotes, as the shell has the single ones
    write = f'from transformers import pipeline as p; print(p("text-generation", {name})("A list", max_new_tokens=80))'
    factorized, scales, adapter = (quoted(out / one) for one in (FACTORIZED, SCALES, "adapter"))
    commands = {
        "transformers writes with the folded model": f"python -c {quoted(write)}",
        "vLLM serves the folded model": f"vllm serve {quoted(folded)}",
        "converted for llama-server": f"python llama.cpp/convert_hf_to_gguf.py {quoted(folded)} --outfile demo.gguf",
        "the same as an adapter of the original": f"surgery export {factorized} {scales} --to peft -o {adapter}",
    }
    return [
        f"the singular values before and after: {whole(page)}",
        *(f"{what}: {whole(command)}" for what, command in commands.items()),
        f"what is kept, and more to try: {whole(out / README)}",
    ]
