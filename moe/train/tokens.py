"""A corpus as tokens on disk: written once, verified, and memory-mapped ever after.

One folder a corpus, under the user's cache folder, named by what it was made of (the digest of the split
documents, the tokenizer): train.bin, validation.bin and manifest.json. It appears whole or not at all.
Tokenising reads a few MB at a time, and training maps the files, so a corpus may be larger than memory.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from moe.atomic import atomic_folder
from moe.checkpoint import read_json
from moe.train.corpus import Corpus, Document, digest_file, find_corpus, read_pieces
from moe.train.files import write_bytes, write_json
from moe.train.settings import RunConfig
from moe.train.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer

SPLITS = ("train", "validation")
CACHE_VARIABLE = "SPARSE_MOE_CACHE"
STALE_SECONDS = 3600  # a tokeniser that is alive writes far more often


@dataclass(frozen=True, slots=True, eq=False)
class TokenisedCorpus:
    """Two memory-mapped token files, every document closed by end_of_text, and what is known about them.

    manifest: "digest" of the corpus, "tokenizer" identity, and for each split its files, bytes and tokens.
    """

    train: np.memmap
    validation: np.memmap
    tokenizer: Tokenizer
    manifest: dict[str, Any]


def load_tokens(
    config: RunConfig, *, tokenizer: Tokenizer | None = None, log: Callable[[str], None] = lambda line: None
) -> TokenisedCorpus:
    """Find the corpus of a run and give its tokens, from the cache where they are there and intact.

    A `tokenizer` given is used as it is (a run that is resumed); else one is made: bytes, or a BPE of
    `model.vocab_size` learnt from the training split.

    Raises:
        ValueError, OSError: as `find_corpus`; a corpus shorter than one sequence; a file that changes
            meanwhile; a tokenizer with more tokens than the model.
        ImportError: BPE without the tokenizers package.
    """
    corpus = find_corpus(config.data)
    cache = cache_folder(config.data.cache)
    _make_folder(cache)
    tokenizer = tokenizer or _make_tokenizer(config, corpus, cache, log)
    _check_vocabulary(tokenizer, config.model.vocab_size)
    folder = cache / f"tokens-{_key(corpus.digest, tokenizer.identity)}"
    if not is_intact(folder):
        size = sum(document.size for document in corpus.train + corpus.validation)
        log(f"tokenising {size / 1e6:.1f} MB of {corpus.root}")
        write_tokens(corpus, tokenizer, folder)
    manifest = read_json(folder / "manifest.json")
    for name in SPLITS:
        _check_length(name, manifest[name]["tokens"], config.data.sequence_length, corpus.root)
    train, validation = (map_tokens(folder, manifest, name) for name in SPLITS)
    return TokenisedCorpus(train, validation, tokenizer, manifest)


def cache_folder(configured: str | None) -> Path:
    """Where tokenised corpora are kept: as configured, else $SPARSE_MOE_CACHE, else the user's own."""
    if configured or os.environ.get(CACHE_VARIABLE):
        return Path(configured or os.environ[CACHE_VARIABLE]).expanduser()
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "sparse-moe"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-moe"


def _make_folder(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the cache folder {cache} cannot be made ({error.strerror}). "
            f"Name another one with data.cache or the variable {CACHE_VARIABLE}",
        ) from None


def write_tokens(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenise both splits into a new folder.

    Raises:
        ValueError: a file changed since it was listed.
        OSError: no space left on disk; nothing half-written stays.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    manifest: dict[str, Any] = {"digest": corpus.digest, "tokenizer": tokenizer.identity, "dtype": dtype.name}
    _remove_stale(folder)
    own = folder.with_name(f".{folder.name}.{os.getpid()}")  # another process may be writing the same corpus
    with atomic_folder(own) as temporary:
        for name in SPLITS:
            manifest[name] = _write_split(getattr(corpus, name), tokenizer, temporary / f"{name}.bin", dtype)
        write_json(temporary / "manifest.json", manifest)
    _publish(own, folder)


def _publish(own: Path, folder: Path) -> None:
    """Give the folder its name, unless another process was first with an intact one."""
    if folder.exists() and not is_intact(folder):
        shutil.rmtree(folder)
    try:
        own.rename(folder)
    except OSError:
        shutil.rmtree(own)
        if not is_intact(folder):
            raise


def _remove_stale(folder: Path) -> None:
    """Remove what killed tokenisers left of this folder: `.NAME.PID` and `..NAME.PID.tmp-XXXXXXXX`."""
    for left in list(folder.parent.glob(f"*{folder.name}.*")):
        try:
            newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
        except OSError:
            continue  # another process is renaming it
        if time.time() - newest > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer that holds every id."""
    return np.dtype(
        next(kind for kind in (np.uint8, np.uint16, np.uint32) if vocab_size - 1 <= np.iinfo(kind).max)
    )


def map_tokens(folder: Path, manifest: dict[str, Any], name: str) -> np.memmap:
    """The tokens of a split, mapped into memory and read as they are used."""
    return np.memmap(folder / f"{name}.bin", dtype=manifest["dtype"], mode="r")


def is_intact(folder: Path) -> bool:
    """Whether the folder holds both token files with the SHA-256 that its manifest states."""
    try:
        manifest = read_json(folder / "manifest.json")
        for name in SPLITS:
            with (folder / f"{name}.bin").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != manifest[name]["sha256"]:
                    return False
    except (OSError, ValueError, KeyError):
        return False
    return True


def _write_split(
    documents: Iterable[Document], tokenizer: Tokenizer, file: Path, dtype: np.dtype
) -> dict[str, Any]:
    total = hashlib.sha256()
    files = count = size = 0
    end = np.array([tokenizer.end_of_text])
    with file.open("wb") as out:
        for document in documents:
            pieces = _checked_pieces(document)
            for ids in chain(_encode(pieces, tokenizer), (end,)):
                block = ids.astype(dtype).tobytes()
                out.write(block)
                total.update(block)
                count += len(ids)
            files, size = files + 1, size + document.size
    return {"files": files, "bytes": size, "tokens": count, "sha256": total.hexdigest()}


def _encode(pieces: Iterable[bytes], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    return (tokenizer.encode(piece) for piece in pieces)


def _checked_pieces(document: Document) -> Iterator[bytes]:
    """The pieces of a document; when all went by, the file is compared with what it was when listed.

    Raises:
        ValueError: it changed.
    """
    total = hashlib.sha256()
    for piece in read_pieces(document):
        total.update(piece)
        yield piece
    same_size = document.path.stat().st_size == document.file_size
    whole = document.size == document.file_size
    if not same_size or document.digest != (total.hexdigest() if whole else digest_file(document.path)[0]):
        raise ValueError(f"{document.path} changed while it was read. Start again.")


def _make_tokenizer(config: RunConfig, corpus: Corpus, cache: Path, log: Callable[[str], None]) -> Tokenizer:
    if config.data.tokenizer == "bytes":
        return ByteTokenizer()
    size = config.model.vocab_size
    file = cache / f"bpe-{_key(corpus.digest, str(size))}.json"
    if not file.is_file():
        log(f"learning a tokenizer of {size} tokens from {sum(d.size for d in corpus.train) / 1e6:.1f} MB")
        texts = (piece.decode("utf-8") for document in corpus.train for piece in _checked_pieces(document))
        write_bytes(file, BPETokenizer.train(texts, size).json.encode("utf-8"))
    return BPETokenizer(file.read_text(encoding="utf-8"))


def _key(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:24]


def _check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than model.vocab_size={vocab_size}: "
            f"every token needs a row of the embedding. Raise model.vocab_size or use another tokenizer."
        )


def _check_length(name: str, tokens: int, sequence: int, root: Path) -> None:
    if tokens <= sequence:
        raise ValueError(
            f"the {name} split of {str(root)!r} has {tokens} tokens, shorter than one sequence: "
            f"data.sequence_length={sequence} needs {sequence + 1}. Add text or shorten the sequence."
        )
