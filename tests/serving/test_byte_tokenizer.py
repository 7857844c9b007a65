"""The demo model's tokenizer: what llama.cpp's converter asks of one of this kind, and what llama.cpp then makes of a text.

That llama.cpp itself does so is tested where it is installed (test_llama_cpp.py).
"""

from __future__ import annotations

import json
import random
from pydoc_data.topics import topics
from typing import Any

import transformers

from surgery.demo.run import MODEL

TOKENIZER: dict[str, Any] = json.loads((MODEL / "tokenizer.json").read_text())
CONFIG: dict[str, Any] = json.loads((MODEL / "tokenizer_config.json").read_text())


def _texts() -> list[str]:
    """All prose that the demo trains on, and any characters but U+2581, which is how a space is written inside."""
    dice = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x2581), (0x2582, 0xD800), (0xE000, 0x110000)]
    mixed = ["".join(chr(dice.randrange(*dice.choice(ranges))) for _ in range(200)) for _ in range(50)]
    return [*topics.values(), *mixed, "", "  two  spaces ", "\0 \1\2", "<0x41> <s> </s> <unk>", "\r\n\t"]


def test_every_text_is_its_bytes() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    assert (len(tokenizer), tokenizer.all_special_ids) == (256, [])
    for text in _texts():
        ids = tokenizer(text, verbose=False)["input_ids"]
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text


def test_it_is_of_the_kind_that_is_converted_as_it_is() -> None:
    """A BPE with byte fallback and a decoder of several steps is taken for Llama's, whatever is in it; any other is looked up
    by a hash of what it makes of one text. A ``tokenizer.model`` or ``tekken.json`` would be taken before it."""
    assert TOKENIZER["model"]["type"] == "BPE"
    assert TOKENIZER["model"]["byte_fallback"]
    assert TOKENIZER["decoder"]["type"] == "Sequence"
    assert not [path.name for path in MODEL.iterdir() if path.name in ("tokenizer.model", "tekken.json")]
    # Without these two llama.cpp puts a token and a space before every text.
    assert (CONFIG["add_bos_token"], CONFIG["add_prefix_space"]) == (False, False)


def test_what_llama_cpp_makes_of_a_text_is_its_bytes() -> None:
    """Its way with a vocabulary of this kind without merges: a character is its token or those of its bytes, a space U+2581."""
    vocabulary: dict[str, int] = TOKENIZER["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(256))
    assert not TOKENIZER["model"]["merges"]
    # It would also merge tokens whose texts together are a token's text.
    assert not [name for name in vocabulary if len(name) > 1 and not (len(name) == 6 and name.startswith("<0x"))]
    for text in _texts():
        ids: list[int] = []
        for character in text.replace(" ", "▁"):
            of_bytes = [f"<0x{byte:02X}>" for byte in character.encode()]
            ids += [vocabulary[name] for name in ([character] if character in vocabulary else of_bytes)]
        assert ids == list(text.encode())
