"""Train a small MoE language model in a script of one's own: bytes of Python's standard library, no trainer.

The whole loop is here: batches, loss, the optimizer's step, the bias that balances the experts, a sample.

python examples/03_train_tiny.py
"""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

import moe

STEPS, BATCH, LENGTH = 300, 16, 64


def library_bytes() -> tuple[Tensor, Tensor]:
    """The modules of the standard library as bytes, split by file: every tenth is held out."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = [torch.tensor(list(path.read_bytes()), dtype=torch.uint8) for path in paths]
    held_out = [text for number, text in enumerate(texts) if number % 10 == 9]
    kept = [text for number, text in enumerate(texts) if number % 10 != 9]
    return torch.cat(kept), torch.cat(held_out)


def batch(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows: ids (b s), and targets (b s), the same bytes one further on."""
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=generator)
    windows = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()]).long()
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def bits_per_byte(model: moe.Decoder, text: Tensor) -> float:
    """Mean cross-entropy over ten fixed batches, in bits: a token is a byte here."""
    generator = torch.Generator().manual_seed(1)
    losses = [model.loss(*batch(text, generator)).cross_entropy.item() for _ in range(10)]
    return sum(losses) / len(losses) / math.log(2)


torch.manual_seed(0)
config = moe.DecoderConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    moe_intermediate_size=64,
    num_experts=8,
    num_experts_per_tok=2,
    scoring_func="sigmoid",
    use_selection_bias=True,
    routed_scaling_factor=2.0,
)
model = moe.Decoder(config)
count = moe.count_parameters(config)
train, held_out = library_bytes()
print(f"{count.total:,} parameters, {count.active:,} active per token; {len(train):,} bytes to learn from")
before = bits_per_byte(model, held_out)

routers = [module for module in model.modules() if isinstance(module, moe.Router)]
generator = torch.Generator().manual_seed(0)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.1)
for step in range(1, STEPS + 1):
    loss = model.loss(*batch(train, generator))
    optimizer.zero_grad()
    loss.total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    loads = [routing.tokens_per_expert() for routing in loss.routings]
    for router, load in zip(routers, loads, strict=True):
        moe.update_selection_bias(router, load, rate=1e-2)  # 1e-3 in long runs
    if step % 50 == 0:
        worst = max(float(moe.max_violation(load)) for load in loads)
        print(f"step {step}/{STEPS}  loss {loss.cross_entropy.item():.3f} nats/byte  MaxVio {worst:.2f}")

print(f"validation bits per byte {before:.2f} -> {bits_per_byte(model, held_out):.2f}")
prompt = torch.tensor([list(b"def ")])
ids = model.generate(prompt, max_new_tokens=160, top_p=0.95, seed=0)
print("a sample:\n" + bytes(ids[0].tolist()).decode(errors="replace"))
