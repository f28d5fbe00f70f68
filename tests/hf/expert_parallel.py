"""One of two processes of test_backend_ecosystem.py: python expert_parallel.py FOLDER STYLE.

Loads the model with half of the experts; holds logits and gradients against a whole model with eager experts.
"""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moe.hf
import moe.hf.experts

TOLERANCE = 1e-5


def gradients(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter that this process holds in full."""
    model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def main(folder: str, style: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    moe.hf.register()
    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation=style)
    half = AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="sparse_moe", distributed_config=config
    )
    assert set(moe.hf.use(half).previous.values()) == {"sparse_moe"}

    seen = []
    original = moe.hf.experts.read_projections

    def watch(experts, device):
        projections = original(experts, device)
        seen.append(projections.down.shape[0])
        return projections

    moe.hf.experts.read_projections = watch
    with torch.no_grad():
        expected = whole(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(
            half(input_ids=ids, use_cache=False).logits, expected, rtol=TOLERANCE, atol=TOLERANCE
        )
    assert seen and set(seen) == {3}, f"expected 3 of 6 experts in each process, saw {seen}"

    truth, ours = gradients(whole, ids), gradients(half, ids)
    compared = 0
    rank = dist.get_rank()
    for name, grad in ours.items():
        grad = grad.to_local() if hasattr(grad, "to_local") else grad
        expected = truth[name]
        if "experts." in name:
            expected = expected.chunk(2)[rank]
        if grad.shape == expected.shape:  # others are cut for tensor parallelism
            torch.testing.assert_close(
                grad, expected, rtol=TOLERANCE, atol=TOLERANCE, msg=f"{name}, rank {rank}"
            )
            compared += 1
    assert sum("experts." in name for name in ours) >= 4 and any(
        "gate.weight" in n or "router" in n for n in ours
    )
    print(f"rank {rank} agrees in {compared} of {len(ours)} gradients")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
