"""Models from one kind of folder into another: runs and models of ours, Hugging Face folders, GGUF files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args
from warnings import catch_warnings, filterwarnings

import torch
from torch import Tensor

from moe.atomic import readable_folder
from moe.checkpoint import is_foreign
from moe.decoder import Decoder
from moe.train.metrics import Progress
from moe.train.optim import make_optimizer, optimizer_tensors
from moe.train.overrides import change
from moe.train.presets import PRESETS
from moe.train.run_folder import RunFolder, generator_tensors
from moe.train.runs import open_run
from moe.train.settings import RunConfig
from moe.train.tokenizer import BPETokenizer, Tokenizer, save_tokenizer

from .checkpoint import describe
from .tokenizer_files import read_tokenizer, write_tokenizer

Target = Literal["hub", "packed", "model", "run", "gguf"]
CARRIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A model that was opened. `kind` says of what: "run", "model" (ours) or "hugging face"."""

    path: Path
    kind: Literal["run", "model", "hugging face"]
    decoder: Decoder
    tokenizer: Tokenizer | None


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written: which architecture (by its `model_type`; ours is sparse_moe), how many tensors."""

    target: Path
    kind: Target
    architecture: str
    tensors: int
    notes: tuple[str, ...] = ()


def open_source(path: str | Path, *, checkpoint: str | None = None) -> Source:
    """Open a run folder, a model folder of ours, or a Hugging Face folder, on the CPU.

    Raises:
        FileNotFoundError, ValueError: nothing known here; as `open_run` and `Decoder.from_pretrained`.
    """
    path = readable_folder(path)
    if RunFolder(path).config_file.exists():
        run = open_run(path, checkpoint=checkpoint, device="cpu")
        return Source(path, "run", run.model, run.tokenizer)
    if checkpoint is not None:
        raise ValueError(f"{path} is no run folder, so it has no checkpoint {checkpoint!r}.")
    kind = "hugging face" if is_foreign(path) else "model"
    return Source(path, kind, Decoder.from_pretrained(path), None)


def default_target(source: Source) -> Target:
    """To the other side: a run for a Hugging Face folder, a Hugging Face folder for what is ours."""
    return "run" if source.kind == "hugging face" else "hub"


def convert(
    source: Source,
    target: str | Path,
    kind: Target,
    *,
    dtype: torch.dtype | None = None,
    overrides: Sequence[str] = (),
) -> Conversion:
    """Write what was opened into a new folder, or, for "gguf", into a file.

    hub, packed  a Hugging Face folder, with the tokenizer
    model        a folder of our own, for `Decoder.from_pretrained`
    run          a run folder whose training has not begun; `overrides` such as "data.folder=texts" are the
                 settings of the training that `sparse-moe train --resume` then does
    gguf         a file for llama.cpp

    Raises:
        FileExistsError: the target exists and is not empty.
        ValueError: no architecture that computes this model, no tokenizer for a run, or settings that do not
            fit together.
    """
    if kind not in get_args(Target):
        raise ValueError(f"{kind!r} must be one of {list(get_args(Target))}.")
    if overrides and kind != "run":
        raise ValueError(f"{overrides[0]!r} is a setting of a training; it needs --to run.")
    target = Path(target)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists. Give a new name, or remove it.")
    if dtype is not None:
        source = replace(source, decoder=source.decoder.to(dtype))
    if kind == "gguf":
        return _convert_to_gguf(source, target)
    if kind == "run":
        return _convert_to_run(source, target, overrides)
    if kind == "model":
        source.decoder.origin = None
        source.decoder.save_pretrained(target)
        _carry_files(source, target)
        return Conversion(target, kind, "sparse_moe", len(source.decoder.state_dict()))
    described = describe(source.decoder, kind)
    source.decoder.save_pretrained(target, layout=kind)
    _carry_files(source, target)
    return Conversion(target, kind, described.config["model_type"], len(described.places))


def compare(decoder: Decoder, folder: Path, ids: Tensor, *, dtype: torch.dtype = torch.float32) -> float:
    """Largest difference of logits between a decoder and transformers' model of a Hugging Face folder.

    ids (b s). Theirs is loaded in `dtype`, then both compute in float32, theirs with eager attention and
    experts.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ImportError(
            "to compare with transformers needs it: pip install '.[hf]' in a clone of the repository."
        ) from None
    with catch_warnings():
        filterwarnings("ignore", "Initializing zero-element tensors")  # shared experts of width 0
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        )
    with torch.no_grad():
        return (theirs.float().eval()(ids).logits - decoder.float()(ids).logits).abs().max().item()


def random_ids(decoder: Decoder, length: int = 64) -> Tensor:
    """Two sequences of ids (2 length), the same ones every time."""
    length = min(length, decoder.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, decoder.config.vocab_size, (2, length), generator=generator)


def _carry_files(source: Source, target: Path) -> None:
    """The tokenizer along with the model."""
    if source.tokenizer is not None:
        write_tokenizer(source.tokenizer, target)
    elif source.kind == "hugging face":
        for name in CARRIED:
            if (source.path / name).is_file():
                (target / name).write_bytes((source.path / name).read_bytes())


def _convert_to_run(source: Source, target: Path, overrides: Sequence[str]) -> Conversion:
    if source.kind == "run":
        raise ValueError(f"{source.path} is a run already. Copy the folder, or give another --to.")
    decoder = source.decoder.float()
    decoder.origin = None
    tokenizer = read_tokenizer(source.path, decoder.config.vocab_size)
    config = change(_untrained(decoder, tokenizer), None, overrides)
    if config.model != decoder.config:
        raise ValueError("model.* settings belong to the checkpoint and cannot be changed here.")
    run = RunFolder(target)
    run.start(config)
    save_tokenizer(tokenizer, target)
    optimizer = make_optimizer(decoder, config.optim)
    tensors = optimizer_tensors(decoder, optimizer) | generator_tensors(torch.device("cpu"))
    run.save_checkpoint(decoder, tensors, Progress(), config.train.keep_checkpoints)
    return Conversion(target, "run", "sparse_moe", len(decoder.state_dict()))


def _untrained(decoder: Decoder, tokenizer: Tokenizer) -> RunConfig:
    base = PRESETS["demo"]()
    kind = "bpe" if isinstance(tokenizer, BPETokenizer) else "bytes"
    optim = replace(base.optim, optimizer="adamw")  # as nearly all published weights were trained
    return replace(base, model=decoder.config, data=replace(base.data, tokenizer=kind), optim=optim)


def _convert_to_gguf(source: Source, target: Path) -> Conversion:
    from tempfile import TemporaryDirectory

    from .gguf import export_gguf

    with TemporaryDirectory(dir=target.parent) as folder:
        hub = convert(source, folder, "hub")
        written = export_gguf(hub.target, target)
    return Conversion(target, "gguf", written.architecture, written.tensors, written.notes)
