"""One line gives a Hugging Face model our layers: OLMoE, tiny and random, trained with our balancing loss.

Nothing is copied: the layers hold the model's own Parameters, the logits stay what they were, and the model
saves in its own format. What is new is that every routing can be seen, and be part of the loss.

pip install '.[hf]' in a clone of the repository; python examples/07_olmoe_with_our_layers.py
"""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

import moe
from moe.hf import record_routings, replace_moe_layers

if find_spec("transformers") is None:
    print("skipped: this example needs transformers; pip install '.[hf]' in a clone")
    sys.exit()

from transformers import OlmoeConfig, OlmoeForCausalLM

STEPS, BATCH, LENGTH = 60, 8, 64
TEXT = torch.tensor(list(Path(torch.__file__).read_bytes()[:200_000]))


def batch(step: int) -> Tensor:
    """Bytes of a Python file (b s), other ones at each step."""
    starts = torch.randint(len(TEXT) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([TEXT[start : start + LENGTH] for start in starts])


def train(coefficient: float) -> tuple[float, dict[str, moe.Routing]]:
    """The last loss of a run with this weight of the balancing loss, and how an unseen batch is routed."""
    torch.manual_seed(0)
    model = OlmoeForCausalLM(config)
    replace_moe_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        ids = batch(step)
        with record_routings(model) as routings:
            loss = model(ids, labels=ids).loss
        balance = moe.load_balancing_loss(list(routings.values()))
        optimizer.zero_grad()
        (loss + coefficient * balance).backward()
        optimizer.step()
    with record_routings(model) as routings, torch.no_grad():
        loss = model(batch(STEPS), labels=batch(STEPS)).loss
    return loss.item(), routings


def unevenness(routings: dict[str, moe.Routing]) -> float:
    """The largest load over the mean load, minus 1, in the worst layer: 0 is even."""
    return max(moe.max_violation(routing.tokens_per_expert()).item() for routing in routings.values())


config = OlmoeConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_experts=8,
    num_experts_per_tok=2,
    pad_token_id=None,
    eos_token_id=None,
)
model = OlmoeForCausalLM(config).eval()
with torch.no_grad():
    before = model(batch(0)).logits
    replaced = replace_moe_layers(model)
    after = model(batch(0)).logits
print(f"replaced {', '.join(replaced)}")
print(f"the logits changed by at most {(after - before).abs().max().item():.1e}\n")

with tempfile.TemporaryDirectory() as folder:  # their format, their keys
    model.save_pretrained(folder)
    again = OlmoeForCausalLM.from_pretrained(folder)
    weight = again.state_dict()["model.layers.0.mlp.gate.weight"]
    assert torch.equal(weight, replaced["model.layers.0.mlp"].router.weight)

(loose_loss, loose), (even_loss, even) = train(0.0), train(0.05)
for title, loss, routings in (("no", loose_loss, loose), ("our", even_loss, even)):
    print(f"after {STEPS} steps with {title} balancing loss: loss {loss:.2f}")
    for name, routing in routings.items():
        print(f"  {name}  tokens of each expert {routing.tokens_per_expert().tolist()}")
print(f"MaxVio with our balancing loss: {unevenness(loose):.2f} -> {unevenness(even):.2f}")
