"""The Triton kernels alone, in a project that has torch and triton and nothing of ours but `moe_triton`.

python examples/06_kernels_alone.py              on a GPU
TRITON_INTERPRET=1 python examples/06_...        anywhere, slowly: in Triton's interpreter, on the CPU
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from moe_triton import experts_ffn, sort_by_expert

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
t, k, e, d, h = 12, 2, 4, 64, 32  # tokens, choices, experts, model width, expert width
torch.manual_seed(0)


class SparseFFN(torch.nn.Module):
    """A router of your own, over experts in two stacked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(d, e, bias=False)
        self.gate_up_proj = torch.nn.Parameter(torch.randn(e, 2 * h, d) / d**0.5)
        self.down_proj = torch.nn.Parameter(torch.randn(e, d, h) / h**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (t d) -> (t d)."""
        weights, experts = self.router(x).float().softmax(-1).topk(k)
        pair_of_row, row_of_pair, offsets = sort_by_expert(experts, e)
        return experts_ffn(x, weights, pair_of_row, row_of_pair, offsets, self.gate_up_proj, self.down_proj)


ffn = SparseFFN().to(device, dtype)
x = torch.randn(t, d, device=device, dtype=dtype, requires_grad=True)
y = ffn(x)
y.square().mean().backward()

# The same token by token, as the definition says it.
weights, experts = ffn.router(x).float().softmax(-1).topk(k)
expected = torch.zeros_like(y)
for token in range(t):
    for weight, expert in zip(weights[token], experts[token].tolist(), strict=True):
        gate, up = (ffn.gate_up_proj[expert] @ x[token]).chunk(2)
        hidden = torch.nn.functional.silu(gate) * up
        expected[token] += weight.to(dtype) * (ffn.down_proj[expert] @ hidden)
error = (y - expected).abs().max().item() / expected.abs().max().item()
print(f"{t} tokens on {device}: largest difference from the definition {error:.0e} of the largest value")
print(f"gradients reached {[n for n, p in ffn.named_parameters() if p.grad is not None]} and x")
