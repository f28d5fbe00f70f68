"""Text to tokens and back: plain bytes, or byte-level BPE from the optional `tokenizers` package.

Both know how many bytes each token stands for, so that bits per byte are computed from real bytes.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moe.train.files import write_bytes
from moe.train.settings import BYTE_VOCABULARY, RunConfig

END_OF_TEXT_BYTE = 0xFF
END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What training, sampling and evaluation ask of a tokenizer.

    vocab_size   v, the number of ids
    end_of_text  the id that closes every document
    token_bytes  (v) how many bytes of text each id stands for; 0 for end_of_text
    identity     a word that changes whenever the ids would
    """

    vocab_size: int
    end_of_text: int
    token_bytes: NDArray[np.int64]
    identity: str

    def encode(self, text: bytes) -> NDArray[np.integer]: ...  # noqa: D102
    def decode(self, ids: Sequence[int]) -> bytes: ...  # noqa: D102


class ByteTokenizer:
    """One byte, one token; 0xFF ends a text, because it occurs in no UTF-8.

    So the vocabulary is exactly 256 and a corpus needs one byte of disk a token. In a corpus read with
    encoding="bytes" a byte 0xFF of a file cannot be told from the end of a text.
    """

    vocab_size = BYTE_VOCABULARY
    end_of_text = END_OF_TEXT_BYTE
    identity = "bytes"

    def __init__(self) -> None:
        self.token_bytes = np.ones(self.vocab_size, np.int64)
        self.token_bytes[self.end_of_text] = 0

    def encode(self, text: bytes) -> NDArray[np.uint8]:
        """The bytes themselves."""
        return np.frombuffer(text, np.uint8)

    def decode(self, ids: Sequence[int]) -> bytes:
        """The text of the ids, without end_of_text."""
        return bytes(i for i in ids if i != self.end_of_text)


class BPETokenizer:
    """Byte-level byte-pair encoding (the `tokenizers` package); any text round-trips exactly.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self, text: str) -> None:
        """Read the JSON text of a tokenizer.json."""
        self._inner = _tokenizers().Tokenizer.from_str(text)
        self._inner.encode_special_tokens = True  # a text that spells <|endoftext|> is text
        self.json = text
        self.identity = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.vocab_size = self._inner.get_vocab_size()
        self.end_of_text = self._inner.token_to_id(END_OF_TEXT)
        words = [self._inner.id_to_token(i) for i in range(self.vocab_size)]
        self.token_bytes = np.array(
            [len(word) for word in words], np.int64
        )  # one character stands for one byte
        self.token_bytes[self.end_of_text] = 0

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn the merges of at most `vocab_size` tokens from the texts."""
        package = _tokenizers()
        inner = package.Tokenizer(package.models.BPE())
        inner.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner.to_str())

    def encode(self, text: bytes) -> NDArray[np.uint32]:
        """The ids of UTF-8 text."""
        return np.array(self._inner.encode(text.decode("utf-8")).ids, np.uint32)

    def decode(self, ids: Sequence[int]) -> bytes:
        """The text of the ids, without end_of_text; incomplete characters become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=True).encode("utf-8")


TOKENIZER_FILE = "tokenizer.json"


def load_tokenizer(config: RunConfig, folder: Path) -> Tokenizer:
    """The tokenizer of the run in this folder.

    Raises:
        FileNotFoundError: a BPE run without its tokenizer.json.
    """
    if config.data.tokenizer == "bytes":
        return ByteTokenizer()
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the tokens of this run mean nothing without it.")
    return BPETokenizer(file.read_text(encoding="utf-8"))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json into the folder; bytes need none."""
    if isinstance(tokenizer, BPETokenizer):
        write_bytes(folder / TOKENIZER_FILE, tokenizer.json.encode("utf-8"))


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "data.tokenizer=\"bpe\" needs the tokenizers package: pip install '.[train]' in a clone of the "
            'repository, or train on bytes with data.tokenizer="bytes".'
        ) from None
    return tokenizers
