"""Put a MoE layer into a PyTorch model that you already have: here torch's own nn.TransformerEncoderLayer.

The task is real and small: from 48 bytes of text, tell which of eight files of Python's standard library they
were taken from. Each layer's feed-forward network is swapped for eight sparse experts; the training loop
gains one line, the balancing loss.

python examples/04_moe_in_your_model.py
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe

FILES = ["_pydecimal", "encodings/cp1006", "html/entities", "mimetypes"]
FILES += ["pydoc_data/topics", "tarfile", "turtle", "typing"]
WIDTH, LENGTH, STEPS, BATCH = 64, 48, 250, 32


class SparseFeedForward(nn.Module):
    """Tensor in, tensor out, as the surrounding model expects; keeps the routing of its last call."""

    def __init__(self, width: int):
        super().__init__()
        self.moe = moe.MoE(
            moe.MoEConfig(hidden_size=width, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (... d) -> (... d)."""
        out = self.moe(x)
        self.routing = out.routing
        return out.y


class Classifier(nn.Module):
    """The model "you already have": bytes (b s) -> logits (b classes)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 4, 128, 0.0, activation=nn.Identity(), batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, len(FILES))

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (b s) -> logits (b classes)."""
        x = self.embed(ids) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def batch(sources: list[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows: ids (b s), the number of the file each came from (b)."""
    labels = torch.randint(len(sources), (BATCH,), generator=generator)
    starts = [int(torch.randint(len(sources[i]) - LENGTH, (), generator=generator)) for i in labels]
    return torch.stack([sources[i][s : s + LENGTH] for i, s in zip(labels, starts, strict=True)]), labels


torch.manual_seed(0)
library = Path(os.__file__).parent
texts = [torch.tensor(list((library / f"{name}.py").read_bytes())) for name in FILES]
train, held_out = [t[: len(t) * 9 // 10] for t in texts], [t[len(t) * 9 // 10 :] for t in texts]

model = Classifier()
for layer in model.layers:  # the swap: the experts bring both projections and the activation between them
    layer.linear1, layer.linear2 = SparseFeedForward(WIDTH), nn.Identity()
sparse = [module for module in model.modules() if isinstance(module, SparseFeedForward)]

generator = torch.Generator().manual_seed(0)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step in range(1, STEPS + 1):
    ids, labels = batch(train, generator)
    loss = F.cross_entropy(model(ids), labels)
    balance = moe.load_balancing_loss([ffn.routing for ffn in sparse])  # 2.0 when both layers are even
    optimizer.zero_grad()
    (loss + 0.01 * balance).backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}  loss {loss.item():.3f}  balance {balance.item():.3f}")

model.eval()
with torch.no_grad():
    batches = [batch(held_out, generator) for _ in range(10)]
    hits = torch.cat([model(ids).argmax(1) == labels for ids, labels in batches]).double().mean().item()
print(f"held-out accuracy {hits:.0%}; guessing gives {1 / len(FILES):.1%}")
for number, ffn in enumerate(sparse):
    load = ffn.routing.tokens_per_expert()
    print(f"layer {number}: tokens per expert {load.tolist()}, MaxVio {float(moe.max_violation(load)):.2f}")
