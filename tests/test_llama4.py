"""Our layer with weights on the input is the layer of Llama 4, as transformers computes it."""

import pytest
import torch

import moe

T, D, H, E = 40, 12, 8, 6  # tokens, model width, expert width, experts


def their_layer(top_k: int) -> torch.nn.Module:
    """Llama4TextMoe in float64 with random parameters; its router takes the sigmoid of the k best logits."""
    pytest.importorskip("transformers")
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    config = Llama4TextConfig(
        hidden_size=D, intermediate_size=H, num_local_experts=E, num_experts_per_tok=top_k
    )
    layer = Llama4TextMoe(config).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer


def our_layer(theirs: torch.nn.Module, top_k: int, backend: str) -> moe.MoE:
    """The same layer here. Every name and shape is theirs but for the memory of the experts, (e d 2h)."""
    config = moe.MoEConfig(
        hidden_size=D,
        moe_intermediate_size=H,
        num_experts=E,
        num_experts_per_tok=top_k,
        scoring_func="sigmoid",
        norm_topk_prob=False,
        apply_router_weight_on_input=True,
        is_transposed=True,
        n_shared_experts=1,
    )
    layer = moe.MoE(config, backend=backend).double()
    layer.load_state_dict(theirs.state_dict())
    return layer


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_layer_of_llama_4_is_ours_in_value_and_every_gradient(top_k, backend):
    theirs = their_layer(top_k)
    ours = our_layer(theirs, top_k, backend)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, D, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(T, D, generator=generator, dtype=torch.float64)
    y, their_y = ours(x).y, theirs(x)[0]
    torch.testing.assert_close(y, their_y, rtol=1e-6, atol=1e-6)  # they take the sigmoid in float32
    their_parameters = dict(theirs.named_parameters())
    gradients = torch.autograd.grad(y, [x, *ours.parameters()], upstream)
    their_gradients = torch.autograd.grad(
        their_y, [x, *(their_parameters[name] for name, _ in ours.named_parameters())], upstream
    )
    for our, their in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-5)


def test_weights_on_the_output_are_another_layer():
    """Else the test above could pass with the setting ignored."""
    theirs = their_layer(top_k=1)
    ours = our_layer(theirs, 1, "torch")
    ours.experts.config = moe.MoEConfig.from_dict(
        ours.config.to_dict() | {"apply_router_weight_on_input": False}
    )
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert (ours(x).y - theirs(x)[0]).abs().max() > 0.1
