"""A Hugging Face checkpoint as one GGUF file, for llama.cpp: pip install '.[hf]' brings the `gguf` package.

    export_gguf("folder", "model.gguf")

A family is exported as the architecture of llama.cpp that computes the same; where llama.cpp computes
something else, the export is refused. Tensors are read as views of the files and written one at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.atomic import atomic_file
from moe.checkpoint import CONFIG_NAME, load_tensors, read_json, readable_folder
from moe.hf.gguf_families import Config
from moe.hf.gguf_limits import find_family
from moe.hf.gguf_settings import context_length, rope_factors, rope_parameters, settings, sliding_window
from moe.hf.gguf_tensors import LAYER, Piece, pieces, same
from moe.hf.gguf_tokenizer import add_tokenizer
from moe.hf.gguf_writer import Entry, add_settings, file_type, write_tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class GGUFExport:
    """What `export_gguf` wrote: the architecture of llama.cpp, the number of tensors, what was left out."""

    file: Path
    architecture: str
    tensors: int
    notes: tuple[str, ...]


def export_gguf(folder: str | Path, file: str | Path, *, dtype: torch.dtype | None = None) -> GGUFExport:
    """Write the checkpoint in `folder` (config.json and safetensors, hub or packed layout) as a GGUF file.

    dtype: float32, float16 or bfloat16 for matrices; None keeps what is stored. Norms, biases and routers are
    float32, as llama.cpp wants them; MXFP4 blocks stay as they are, bit for bit.
    The file is the old one or the new one at any moment.

    Raises:
        ImportError: the gguf package is not installed.
        FileNotFoundError: no config or no weights.
        ValueError: a family or a setting that llama.cpp does not have, tensors that have no name there (all
            are listed), a config that contradicts the tensors, a dtype that is none of these or too narrow.
        OSError: no space left on disk, or another failure of the file system; an old file is intact.
    """
    gguf = _package()
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype} must be {', '.join(map(str, DTYPES))} or None.")
    folder = readable_folder(folder)
    config = _read_config(folder)
    family = find_family(config)
    tensors, notes = _select(load_tensors(folder), config)
    _check_sizes(tensors, config)
    head_dim = _head_dim(tensors, config)
    arch = gguf.MODEL_ARCH[family.arch]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    named = list(_named(pieces(tensors, config, family), names, family.arch))
    if (factors := rope_factors(config, head_dim)) is not None:
        named.insert(0, ("rope_freqs.weight", Piece("rope_freqs", (factors,), same)))
    entries = [Entry.of(name, piece, dtype) for name, piece in named]
    metadata = settings(config, family, head_dim)
    with atomic_file(file) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[arch])
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(folder.name)
        add_settings(gguf, writer, metadata)
        writer.add_file_type(gguf.LlamaFileType[file_type(entries)])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        notes += add_tokenizer(writer, folder, config["vocab_size"])
        write_tensors(gguf, writer, entries)
    return GGUFExport(Path(file), writer.arch, len(entries), tuple(notes))


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError(
            "the export needs the gguf package: pip install gguf, or '.[hf]' in a clone of the repository."
        ) from None
    return gguf


def _read_config(folder: Path) -> Config:
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist. Give the folder of a Hugging Face checkpoint.")
    return read_json(file)


def _select(tensors: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that are exported, and notes on the others and on what llama.cpp lacks."""
    layer_of = {key: int(found[1]) for key in tensors if (found := LAYER.match(key))}
    later = {layer for layer in layer_of.values() if layer >= config["num_hidden_layers"]}
    notes = [f"layer {layer} is left out: it predicts a token further ahead" for layer in sorted(later)]
    if sliding_window(config):
        notes.append(
            f"llama.cpp slides no window here, so the context ends with it: {context_length(config)}"
        )
    if rope_parameters(config).get("truncate") is False:
        notes.append("llama.cpp rounds the range of yarn (truncate=true), so positions differ a little")
    dropped = ("rotary_emb.inv_freq", *(["lm_head.weight"] if config.get("tie_word_embeddings") else []))
    kept = {
        key: tensor
        for key, tensor in tensors.items()
        if not key.endswith(dropped) and layer_of.get(key) not in later
    }
    return kept, notes


def _named(found: Iterator[Piece], names: Any, arch: str) -> Iterator[tuple[str, Piece]]:
    """Each piece with its name in the file.

    Raises:
        ValueError: all pieces that have none, in one message.
    """
    nameless: list[str] = []
    for piece in found:
        name = names.get_name(piece.key, try_suffixes=(".weight", ".bias"))
        if name is None:
            nameless.append(piece.key)
        else:
            yield name, piece
    if nameless:
        listing = "\n  ".join(nameless)
        raise ValueError(f"llama.cpp's architecture {arch} has no name for these tensors:\n  {listing}")


def _check_sizes(tensors: Mapping[str, Tensor], config: Config) -> None:
    """Refuse a config that contradicts the tensors."""
    stated = [("num_hidden_layers", len({found[1] for key in tensors if (found := LAYER.match(key))}))]
    if (embedding := tensors.get("model.embed_tokens.weight")) is not None:
        stated += zip(("vocab_size", "hidden_size"), embedding.shape, strict=True)
    if (rows := _query_rows(tensors, config)) and config.get("head_dim"):
        stated.append(("head_dim", rows // config["num_attention_heads"]))
    for name, size in stated:
        if config[name] != size:
            raise ValueError(
                f"config.json says {name}={config[name]}, but the tensors have {size}: "
                f"the two do not belong together."
            )


def _head_dim(tensors: Mapping[str, Tensor], config: Config) -> int:
    """The width of a head, as the query projection has it: the default of config.json differs by family."""
    return (_query_rows(tensors, config) or config["hidden_size"]) // config["num_attention_heads"]


def _query_rows(tensors: Mapping[str, Tensor], config: Config) -> int | None:
    """Rows of the query projection; None for latent attention, where head_dim means something else."""
    query = tensors.get("model.layers.0.self_attn.q_proj.weight")
    return None if query is None or config.get("kv_lora_rank") else query.shape[0]
