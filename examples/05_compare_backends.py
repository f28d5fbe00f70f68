"""Two backends, one answer: the reference (the specification) against torch (the fast path), side by side.

The reference is short and obviously right. The torch backend is fast, and has to agree in the output and in
every gradient. Compare the ratios of the times: they differ less between machines than the times do.

python examples/05_compare_backends.py
"""

import statistics
import time

import torch
from torch import Tensor

import moe

TOKENS, REPEATS = 512, 7


def forward_backward(layer: moe.MoE, x: Tensor, y_grad: Tensor) -> dict[str, Tensor]:
    """The output and every gradient of one layer, by name."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x).y
    y.backward(y_grad)
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    named = {"y": y.detach(), "x": x.grad, **gradients}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def milliseconds(layer: moe.MoE, x: Tensor, y_grad: Tensor) -> float:
    """Median wall-clock of forward + backward."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        forward_backward(layer, x, y_grad)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


torch.manual_seed(0)
print("largest difference, relative to the largest value of the reference")
config = moe.MoEConfig(hidden_size=128, moe_intermediate_size=64, num_experts=16, num_experts_per_tok=4)
reference, fast = moe.MoE(config, backend="reference"), moe.MoE(config, backend="torch")
fast.load_state_dict(reference.state_dict())
x, y_grad = torch.randn(TOKENS, 128), torch.randn(TOKENS, 128)
expected, got = forward_backward(reference, x, y_grad), forward_backward(fast, x, y_grad)
assert expected.keys() == got.keys()
worst = 0.0
for name, tensor in expected.items():
    difference = ((tensor - got[name]).abs().max() / tensor.abs().max()).item()
    worst = max(worst, difference)
    kind, shape = "value" if name == "y" else "gradient", tuple(tensor.shape)
    print(f"  {kind:8s} {name:22s} {shape!s:16s} {difference:.1e}")
print(f"the backends agree: {worst < 1e-4}")

print(f"\nforward + backward of {TOKENS} tokens, k=4; equal work in every row")
print("experts   reference ms   torch ms   reference / torch")
for experts in (4, 16, 64, 256):
    config = moe.MoEConfig(
        hidden_size=128, moe_intermediate_size=64, num_experts=experts, num_experts_per_tok=4
    )
    reference, fast = moe.MoE(config, backend="reference"), moe.MoE(config, backend="torch")
    slow_ms, fast_ms = milliseconds(reference, x, y_grad), milliseconds(fast, x, y_grad)
    print(f"{experts:7d} {slow_ms:14.1f} {fast_ms:10.1f} {slow_ms / fast_ms:19.2f}")
