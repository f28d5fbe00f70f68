"""Balance a Hugging Face model without a loss: Qwen3-MoE, tiny and random, with a selection bias of ours.

The bias (2408.15664) takes part in the choice of experts and in nothing else. Qwen3-MoE was made without one;
`add_selection_bias` adds it to the layers that replace its blocks, and it is moved against the load after
each step. The report at the end says, layer by layer, how even the load is.

pip install '.[hf]' in a clone of the repository; python examples/08_qwen3_moe_balanced_by_a_bias.py
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import moe
from moe.hf import record_routings, replace_moe_layers

if find_spec("transformers") is None:
    print("skipped: this example needs transformers; pip install '.[hf]' in a clone")
    sys.exit()

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

STEPS, BATCH, LENGTH, RATE = 80, 8, 64, 5e-3
TEXT = torch.tensor(list(Path(torch.__file__).read_bytes()[:200_000]))


def batch(step: int) -> Tensor:
    """Bytes of a Python file (b s), other ones at each step."""
    starts = torch.randint(len(TEXT) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([TEXT[start : start + LENGTH] for start in starts])


def report(model: nn.Module) -> float:
    """Print how each layer routes a batch that was never trained on; the worst MaxVio."""
    with record_routings(model) as routings, torch.no_grad():
        loss = model(batch(STEPS), labels=batch(STEPS)).loss.item()
    print(f"loss of an unseen batch {loss:.2f}")
    worst = 0.0
    print("layer               MaxVio  idle experts  mean weight of the first choice  load")
    for name, routing in routings.items():
        load = routing.tokens_per_expert()
        violation = moe.max_violation(load).item()
        worst = max(worst, violation)
        first = routing.weights.max(dim=1).values.mean().item()
        idle = int((load == 0).sum())
        print(f"{name}  {violation:6.2f}  {idle:12d}  {first:31.2f}  {load.tolist()}")
    return worst


config = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=8,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    pad_token_id=None,
    eos_token_id=None,
)
violations = {}
for balanced in (False, True):
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    layers = replace_moe_layers(model)
    if balanced:
        for layer in layers.values():
            moe.add_selection_bias(layer.router)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        ids = batch(step)
        with record_routings(model) as routings:
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if balanced:
            for name, routing in routings.items():
                moe.update_selection_bias(layers[name].router, routing.tokens_per_expert(), RATE)
    print(f"\n{'with' if balanced else 'without'} the bias, after {STEPS} steps:")
    violations[balanced] = report(model)

start = TEXT[None, :16]
ids = model.generate(start, max_new_tokens=32, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
print(f"\nit still generates: {bytes(ids[0, 16:].tolist())!r}")
print(f"MaxVio by the bias alone: {violations[False]:.2f} -> {violations[True]:.2f}")
