"""One sparse MoE layer: what goes in, what comes out, and why most of its parameters rest.

python examples/01_one_layer.py
"""

import torch

import moe

torch.manual_seed(0)
config = moe.MoEConfig(hidden_size=64, moe_intermediate_size=128, num_experts=16, num_experts_per_tok=2)
layer = moe.MoE(config)
print(layer)

# Forward: any leading axes, the last one is the model width d. Here (b s d): 2 sequences of 4 tokens.
x = torch.randn(2, 4, 64, requires_grad=True)
out = layer(x)
tokens, experts = 2 * 4, config.num_experts
print(f"\nx {tuple(x.shape)} -> y {tuple(out.y.shape)}")

# The router gives each of the t tokens k distinct experts, and a weight for each of them.
print(f"experts {tuple(out.routing.experts.shape)}, weights {tuple(out.routing.weights.shape)}  (t k)")
print(f"the first token goes to experts {out.routing.experts[0].tolist()}", end=" ")
print(f"with weights {[round(w, 3) for w in out.routing.weights[0].tolist()]}, which sum to 1")

# The plan sorts the (token, choice) pairs by expert: expert i owns rows offsets[i] to offsets[i + 1] - 1.
load = out.plan.offsets.diff()
print(
    f"pairs per expert {load.tolist()}: {tokens} tokens x 2 choices = {load.sum().item()} pairs, none dropped"
)

# Backward reaches the input, the router, and only those experts that were chosen.
out.y.square().mean().backward()
gradient = layer.experts.down_proj.grad
assert gradient is not None and x.grad is not None
unchosen = (load == 0).nonzero().flatten().tolist()
idle = [expert for expert in range(experts) if not gradient[expert].any()]
print(f"experts without a token: {unchosen}; experts without a gradient: {idle}")

# Total parameters grow with the number of experts; what one token meets does not.
print("\nexperts   total parameters   active per token")
for count in (4, 16, 64, 256):
    sizes = moe.MoEConfig(hidden_size=64, moe_intermediate_size=128, num_experts=count, num_experts_per_tok=2)
    bigger = moe.MoE(sizes)
    expert_parameters = sum(p.numel() for p in bigger.experts.parameters())
    router_parameters = sum(p.numel() for p in bigger.router.parameters())
    active = router_parameters + expert_parameters * sizes.num_experts_per_tok // count
    print(f"{count:7d} {router_parameters + expert_parameters:18,d} {active:18,d}")
print("Only the router's one row per expert is added to what a token meets.")
