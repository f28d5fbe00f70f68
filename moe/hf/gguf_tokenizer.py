"""A tokenizer.json as metadata of a GGUF file: byte-level BPE, which llama.cpp calls gpt2."""

from pathlib import Path
from typing import Any

from moe.checkpoint import read_json

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType

# How llama.cpp calls the ways to cut a text into words, by the pattern in tokenizer.json; "" is GPT-2's own.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS: dict[str | None, str] = {
    "": "gpt-2",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
}


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> list[str]:
    """Add the tokens of the folder to a `gguf.GGUFWriter`; returns what had to be left out, in words.

    Without them the file holds a model of ids: llama.cpp runs it on numbers and writes no text.

    Raises:
        ValueError: a tokenizer with more tokens than the model.
    """
    import gguf

    file = folder / "tokenizer.json"
    reason = None if file.is_file() else "the folder has no tokenizer.json"
    tokenizer = {} if reason else read_json(file)
    reason = reason or _why_not_byte_level(tokenizer)
    if reason:
        writer.add_tokenizer_model("none")
        return [f"no tokenizer in the file: {reason}. llama.cpp runs the model on ids, and writes no text"]
    tokens, types = _tokens(tokenizer, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)
    pattern = _pattern(tokenizer)
    if pattern in CUTS:
        writer.add_tokenizer_pre(CUTS[pattern])
        return []
    return [
        f"llama.cpp is not told how to cut text into words: no name is known here for the pattern "
        f"{pattern!r}. Give it one with --override-kv tokenizer.ggml.pre=str:NAME"
    ]


def _why_not_byte_level(tokenizer: dict[str, Any]) -> str | None:
    kind = (tokenizer.get("model") or {}).get("type")
    if kind != "BPE":
        return f"tokenizer.json is of the kind {kind!r}, and only byte-level BPE is written"
    if not any(step.get("type") == "ByteLevel" for step in _steps(tokenizer)):
        return "the BPE of tokenizer.json is not byte-level"
    return None


def _steps(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    cutter = tokenizer.get("pre_tokenizer") or {}
    return cutter.get("pretokenizers") or [cutter]


def _pattern(tokenizer: dict[str, Any]) -> str | None:
    """The pattern that cuts words; "" for GPT-2's own, None for several or none."""
    steps = _steps(tokenizer)
    patterns = [(step.get("pattern") or {}).get("Regex") for step in steps if step.get("type") == "Split"]
    if any(step.get("type") == "ByteLevel" and step.get("use_regex", True) for step in steps):
        patterns.append("")
    return patterns[0] if len(patterns) == 1 else None


def _tokens(tokenizer: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The text and the kind of every id; ids without a text get a name that no text has."""
    words = {number: (word, NORMAL) for word, number in tokenizer["model"]["vocab"].items()}
    for added in tokenizer.get("added_tokens") or []:
        words[added["id"]] = (added["content"], CONTROL if added.get("special") else USER_DEFINED)
    if words and max(words) >= vocab_size:
        raise ValueError(
            f"tokenizer.json goes up to id {max(words)}, but the model has vocab_size={vocab_size}: "
            f"the two do not belong together."
        )
    named = [words.get(number, (f"[PAD{number}]", UNUSED)) for number in range(vocab_size)]
    return [word for word, _ in named], [kind for _, kind in named]
