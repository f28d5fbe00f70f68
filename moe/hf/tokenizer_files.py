"""A tokenizer of a run as the files that transformers reads, and the way back."""

import json
from pathlib import Path
from typing import Any

from moe.train.files import write_bytes
from moe.train.settings import BYTE_VOCABULARY
from moe.train.tokenizer import END_OF_TEXT, TOKENIZER_FILE, BPETokenizer, ByteTokenizer, Tokenizer

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
}


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into the folder."""
    text = tokenizer.json if isinstance(tokenizer, BPETokenizer) else json.dumps(bytes_as_bpe())
    write_bytes(folder / TOKENIZER_FILE, text.encode("utf-8"))
    write_bytes(folder / "tokenizer_config.json", (json.dumps(TOKENIZER_CONFIG, indent=2) + "\n").encode())


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a folder that transformers reads, for a run of ours.

    Raises:
        FileNotFoundError: the folder has no tokenizer.json.
        ValueError: it is not byte-level, it has no <|endoftext|>, or it has more tokens than the model.
        ImportError: the tokenizers package is not installed.
    """
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing, and a run needs a tokenizer. Copy it there, or convert with --to model."
        )
    text = file.read_text(encoding="utf-8")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}). Copy it again.") from None
    if data == bytes_as_bpe() and vocab_size == BYTE_VOCABULARY:
        return ByteTokenizer()
    special = [token["content"] for token in data.get("added_tokens", [])]
    if "ByteLevel" not in json.dumps([data.get("pre_tokenizer"), data.get("decoder")]):
        raise ValueError(f"{file} is no byte-level tokenizer, which a run needs. Convert with --to model.")
    if END_OF_TEXT not in special:
        raise ValueError(f"{file} has no token {END_OF_TEXT}, which ends a text. Convert with --to model.")
    tokenizer = BPETokenizer(text)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{file} has {tokenizer.vocab_size} tokens, more than vocab_size={vocab_size}.")
    return tokenizer


def bytes_as_bpe() -> dict[str, Any]:
    """tokenizer.json of bytes: byte-level BPE without merges, whose last byte, in no UTF-8, ends a text.

    Ids are the bytes themselves.
    """
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters()[:-1])}
    end = {"id": BYTE_VOCABULARY - 1, "content": END_OF_TEXT, "special": True}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | plain],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "unk_token": None, "vocab": vocabulary, "merges": []},
    }


def _byte_characters() -> list[str]:
    """The character by which byte-level tokenizers (GPT-2) write each byte: itself, or one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
