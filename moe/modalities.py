"""Text, images, video and sound in one sequence.

    sequence = interleave([Text("what is this? "), Image(pixels), Text("a cat")], config)
    batch = collate([sequence, ...])
    x = decoder.embed(*batch.inputs)
    loss = decoder.loss(None, batch.targets, inputs_embeds=x, mask=batch.padding)

An item becomes tokens where it stands, and nothing is put between items: what should mark the beginning or
the end of one is text. Tokens of a sequence are the decoder's positions, whatever their sense.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from moe.mel import log_mel
from moe.modality_config import Modality, ModalityConfig
from moe.modality_embedder import ModalityEmbedder
from moe.modality_items import Audio, Image, Item, Text, Video, patches
from moe.modality_sequence import Interleaved, ModalityBatch, collate

if TYPE_CHECKING:
    from moe.modality_items import Encode

__all__ = [
    "Audio",
    "Image",
    "Interleaved",
    "Item",
    "Modality",
    "ModalityBatch",
    "ModalityConfig",
    "ModalityEmbedder",
    "Text",
    "Video",
    "collate",
    "interleave",
    "log_mel",
    "patches",
]


def interleave(
    items: Iterable[Item],
    config: ModalityConfig,
    encode: "Encode" = bytes,
    *,
    vocab_size: int | None = None,
) -> Interleaved:
    """One sequence of the items, in order.

    encode: the ids of UTF-8 bytes, for items of text; without one, the bytes themselves.
    vocab_size: ids of text must be below it; without it, the decoder checks them.

    Raises:
        ValueError: no items, or one that is refused, with its index: see each item's `tokens`.
    """
    parts: list[Interleaved] = []
    for index, item in enumerate(items):
        try:
            parts.append(_tokens(item, config, encode, vocab_size))
        except ValueError as error:
            raise ValueError(f"item {index} ({type(item).__name__}): {error}") from None
    if not parts:
        raise ValueError("a sequence needs at least one item.")
    return Interleaved.concatenate(parts)


def _tokens(item: Item, config: ModalityConfig, encode: "Encode", vocab_size: int | None) -> Interleaved:
    if not isinstance(item, Item):  # a str is no item: it could be text, or the name of a file
        raise ValueError("items are Text, Image, Video and Audio; wrap it in one of them.")
    tokens = item.tokens(config, encode)
    if vocab_size is not None and int(tokens.ids.max()) >= vocab_size:
        raise ValueError(
            f"id {int(tokens.ids.max())} is outside the vocabulary: ids go from 0 to {vocab_size - 1}."
        )
    return tokens
