"""A long context: read once, asked many times. And a global layer that finds a place before any training.

The decoder has two sliding layers and a full one without positions, which begins as an induction head: a
byte looks for what followed bytes like those just before it. Prefill reads 100,000 bytes in pieces, with the
last layer's keys and values alone; three questions then share that one reading.
"""

import torch

from moe import Decoder, DecoderConfig
from moe.prefill import prefill

torch.manual_seed(0)
decoder = Decoder(
    DecoderConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        layer_types="LLG",  # sliding, sliding, full
        sliding_window=32,
        no_rope_layers=(1, 1, 0),  # the full layer has no positions
        use_ssmax=True,  # and logits that grow with the logarithm of the number of keys
        use_qk_norm=True,
        attention_multiplier=0.2,
        canon_set=("AC", "AC", "AB"),  # short causal convolutions
        attention_init="induction",
        initializer_range=0.07,
        embedding_initializer_range=0.5,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
    )
).eval()

text = torch.randint(97, 123, (100_000,), dtype=torch.uint8)  # letters without sense
questions = [b"key of the cellar: ", b"the horse is called ", b"the colour of rain = "]
places = [10_000, 50_000, 90_000]
for question, place in zip(questions, places, strict=True):
    text[place : place + len(question)] = torch.tensor(list(question), dtype=torch.uint8)

read = prefill(decoder, text[None])
print(f"read {read.cache.length:,} bytes in {read.seconds:.1f} s: {read.path}")
print(f"the cache has {read.cache.nbytes:,} bytes")

shared = read.cache.fork(rows=1).shared(2)  # keys and values of the full layer
assert shared is not None
for question, place in zip(questions, places, strict=True):
    end = place + len(question)
    fork = read.cache.fork(rows=1)  # continues the text, and shares its memory
    with torch.no_grad():
        looked = decoder.hidden(torch.tensor([list(question)]), cache=fork, at=1).attended
    logits = (looked.queries[0, :, -1] @ shared[0][0, 0].T).mean(0)  # of 100,000 keys, over both heads
    found = int(logits.argmax())
    print(f"{question.decode()!r} looks at byte {found}, what follows it is at {end}")
