"""Several senses in one sequence: a picture, a sound and a sentence about both, in a decoder with experts.

Each sequence is an image of a drawn shape, a tone, and a caption in bytes. The decoder learns to write the
caption; held-out pictures and tones are drawn anew, with other noise, places, sizes, pitches and loudness.
"""

import math

import torch
from torch import Tensor

from moe import Decoder, DecoderConfig
from moe.modalities import Audio, Image, Interleaved, Modality, ModalityConfig, Text, collate, interleave

SENSES = ModalityConfig(patch_size=6, sampling_rate=4000, n_fft=256, hop_length=256, num_mel_bins=24)
SHAPES, TONES = ("square", "cross", "bar", "slash"), ("low", "high", "rising", "falling")


def draw(shape: str) -> Tensor:
    """A shape (12 12) with values in 0..1, of a random size at a random place, with noise."""
    radius = torch.randint(3, 6, ())
    y, x = torch.meshgrid(*(torch.arange(12) - torch.randint(5, 7, ()) for _ in "yx"), indexing="ij")
    distance = torch.maximum(x.abs(), y.abs())
    strokes = {
        "square": distance == radius,
        "cross": (x == 0) | (y == 0),
        "bar": y == 0,
        "slash": x == -y,
    }
    return 0.8 * (strokes[shape] & (distance <= radius)) + 0.2 * torch.rand(12, 12)


def play(tone: str) -> Tensor:
    """A waveform of a quarter of a second, of a random pitch and loudness, with noise."""
    time = torch.arange(1000) / SENSES.sampling_rate
    low, high = 200 + 200 * torch.rand(2)[0], 900 + 600 * torch.rand(2)[0]
    start, end = {"low": (low, low), "high": (high, high), "rising": (low, high), "falling": (high, low)}[
        tone
    ]
    phase = start * time + (end - start) * time.square() / (2 * time[-1])
    return (0.1 + 0.8 * torch.rand(1)) * torch.sin(2 * math.pi * phase) + 0.01 * torch.randn(1000)


def scene() -> tuple[list[Image | Audio | Text], str]:
    """The items of a prompt, and the caption that follows them."""
    shape, tone = SHAPES[int(torch.randint(4, ()))], TONES[int(torch.randint(4, ()))]
    prompt = [Image(draw(shape)), Text(" "), Audio(play(tone).clamp(-1, 1), SENSES.sampling_rate), Text(": ")]
    return prompt, f"a {shape} and a {tone} tone."


def sequences(count: int) -> list[Interleaved]:
    """Prompts with their captions."""
    scenes = [scene() for _ in range(count)]
    return [interleave([*prompt, Text(caption)], SENSES) for prompt, caption in scenes]


torch.manual_seed(0)
decoder = Decoder(
    DecoderConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=False,
        initializer_range=0.06,
        embedding_initializer_range=0.5,
        modalities=SENSES,
    )
)
optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=200)
losses: list[float] = []
for step in range(200):
    batch = collate(sequences(16))
    x = decoder.embed(*batch.inputs)  # (b s d), whatever the sense of a token
    loss = decoder.loss(None, batch.targets, inputs_embeds=x, mask=batch.padding)  # of text
    loss.total.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    losses.append(loss.cross_entropy.item())
    if step % 50 == 0:
        print(f"step {step:3}: {losses[-1]:.3f} nats a byte of text")
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

held_out = [scene() for _ in range(20)]
senses = interleave(held_out[0][0], SENSES).modality.tolist()
print("a prompt:", *(Modality(sense).name.lower() for sense in senses))
right = 0
for prompt, caption in held_out:
    ids = decoder.generate(interleave(prompt, SENSES), max_new_tokens=40, temperature=0, stop=ord("."))
    written = bytes(ids[0].tolist()).rpartition(b": ")[2].decode(errors="replace")
    right += written == caption
    print(f"{'right' if written == caption else 'wrong'}: {written}")
print(f"{right} of {len(held_out)} held-out captions are right; guessing gives {len(held_out) / 16:.1f}")
