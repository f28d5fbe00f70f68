"""Inside a Hugging Face model our layers change nothing but what can be seen: routings, losses, balance."""

import copy

import pytest
import tiny
import torch
from helpers import assert_as_accurate
from layer_cases import CASES, FAMILIES, LAYOUTS, blocks, build
from safetensors.torch import load_file
from torch import nn

import moe
from moe.hf import record_routings, replace_moe_layers

transformers = pytest.importorskip("transformers")
IS_OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20)


def logits_of(model, ids):
    with torch.no_grad():
        return tiny.run(model, ids)


def logits_and_gradients(model, ids):
    model.zero_grad()
    out = tiny.run(model, ids)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) / out.shape[-1]
    (out * upstream).sum().backward()
    return out, {id(p): p.grad.clone() for p in model.parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_of_the_model_stay_the_same(case):
    model = build(case)
    ids = tiny.tokens(model)
    logits, gradients = logits_and_gradients(model, ids)
    replaced = replace_moe_layers(model)
    assert set(replaced) and not blocks(model)
    assert all(model.get_submodule(name) is layer for name, layer in replaced.items())
    our_logits, our_gradients = logits_and_gradients(model, ids)
    if case.startswith("llama4"):  # it runs every expert on every token, and sums in another order
        assert_as_accurate(our_logits, logits, logits_of(copy.deepcopy(model).double(), ids))
    else:
        assert (our_logits - logits).abs().max() <= 1e-6
    assert our_gradients.keys() == gradients.keys(), "the model's Parameters are the same objects"
    for key, gradient in gradients.items():
        assert (our_gradients[key] - gradient).abs().max() <= 1e-5
    assert sum(gradient.abs().max() > 0 for gradient in gradients.values()) > len(gradients) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_of_32_tokens_stays_the_same(family):
    model = build(family)
    if not hasattr(model, "generate") or "ForCausalLM" not in type(model).__name__:
        pytest.skip("no language model head")
    ids = tiny.tokens(model, batch=2, length=7)
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(ids, **options)
    replace_moe_layers(model)
    ours = model.generate(ids, **options)
    assert ours.shape == (2, 39)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", LAYOUTS)
def test_state_dict_and_saved_files_keep_their_keys_and_bytes(family, tmp_path):
    model = build(family)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "theirs")
    replaced = replace_moe_layers(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    model.save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    doubled = {key: tensor * 2 if tensor.is_floating_point() else tensor for key, tensor in before.items()}
    model.load_state_dict(doubled)
    layer = next(iter(replaced.values()))
    key = next(key for key in before if key.endswith("experts.down_proj"))
    assert torch.equal(layer.experts.down_proj, before[key] * 2)


@pytest.mark.parametrize("family", LAYOUTS)
def test_router_logits_are_recorded_as_before(family):
    if IS_OLD and family in ("llama4", "granitemoe", "granitemoeshared"):
        pytest.skip("transformers 5.17 records Llama 4's blocks and none of Granite's routers")
    for asked_before in (False, True):  # transformers sets its hooks at the first request
        model = build(family)
        ids = tiny.tokens(model)
        recorder = next(
            (
                m
                for m in model.modules()
                if "router_logits" in (getattr(m, "_can_record_outputs", None) or {})
            ),
            None,
        )
        if recorder is None:
            pytest.skip("this model records no router logits")
        theirs = copy.deepcopy(model)(input_ids=ids, output_router_logits=True)
        if "router_logits" not in theirs:
            pytest.skip("this model records router logits and does not return them")
        if asked_before:
            model(input_ids=ids, output_router_logits=True)
        replaced = replace_moe_layers(model)
        ours = model(input_ids=ids, output_router_logits=True)
        assert len(ours.router_logits) == len(theirs.router_logits) == len(replaced)
        for our_logits, their_logits in zip(ours.router_logits, theirs.router_logits, strict=True):
            assert our_logits.dtype == their_logits.dtype
            torch.testing.assert_close(our_logits, their_logits, rtol=0, atol=1e-5)
        if getattr(theirs, "aux_loss", None) is not None:
            torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)
        replaced.restore()
        again = model(input_ids=ids, output_router_logits=True)
        assert len(again.router_logits) == len(theirs.router_logits)


@pytest.mark.parametrize("family", LAYOUTS)
def test_restoring_puts_the_blocks_back_with_what_was_learned(family):
    model = build(family)
    ids = tiny.tokens(model)
    originals = blocks(model)
    before = logits_of(model, ids)
    replaced = replace_moe_layers(model)
    with torch.no_grad():
        for layer in replaced.values():
            layer.experts.down_proj.copy_(layer.experts.down_proj.flip(1))
            if layer.router.e_score_correction_bias is not None:
                layer.router.e_score_correction_bias += torch.linspace(-1, 1, 8)
    ours = logits_of(model, ids)
    replaced.restore()
    assert blocks(model) == originals
    theirs = logits_of(model, ids)
    assert (theirs - ours).abs().max() <= 1e-6 * max(1, ours.abs().max())
    assert (theirs - before).abs().max() > 1e-2
    for layer in replaced.values():  # a layer of its own again
        assert isinstance(layer(torch.randn(2, 3, 36)), moe.MoEOutput)
        assert not any(".gate." in f".{name}" and "gate_up" not in name for name in layer.router.state_dict())


@pytest.mark.parametrize("family", ["minimax_m2", "ernie4_5_moe"])
def test_restoring_gives_back_a_selection_bias_that_memory_no_longer_shares(family):
    model = build(family)
    originals = blocks(model)
    model.to(torch.bfloat16)
    replaced = replace_moe_layers(model)
    for layer in replaced.values():
        layer.router.e_score_correction_bias += torch.linspace(-1, 1, 8)
    model.double()
    ours = logits_of(model, tiny.tokens(model))
    replaced.restore()
    assert blocks(model) == originals
    assert (logits_of(model, tiny.tokens(model)) - ours).abs().max() < 1e-6


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "ernie4_5_moe", "lfm2_moe", "llama4", "gpt_oss"])
def test_our_losses_and_balancing_work_on_their_models(family):
    model = build(family).train()
    replaced = replace_moe_layers(model)
    ids = tiny.tokens(model)
    with record_routings(model) as routings:
        loss = model(input_ids=ids, labels=ids).loss
    assert routings.keys() == replaced.keys()
    balance = moe.load_balancing_loss(list(routings.values()))
    assert balance > 0.5 * len(routings)
    (loss + balance).backward()
    for name, layer in replaced.items():
        assert layer.router.weight.grad.abs().max() > 0
        counts = routings[name].tokens_per_expert()
        assert counts.sum() == ids.numel() * layer.config.num_experts_per_tok
        if layer.router.e_score_correction_bias is None:
            moe.add_selection_bias(layer.router)
        moe.update_selection_bias(layer.router, counts, rate=10.0)
        assert moe.max_violation(counts) > 0
    with record_routings(model) as after:
        model(input_ids=ids)
    for name in replaced:  # so large a step sends tokens to those that had few
        least = routings[name].tokens_per_expert().argmin()
        assert after[name].tokens_per_expert()[least] > routings[name].tokens_per_expert()[least]


def test_an_optimizer_made_before_moves_our_layers():
    model = build("qwen2_moe").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    replaced = replace_moe_layers(model)
    layer = next(iter(replaced.values()))
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    ids = tiny.tokens(model)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], parameter) for name, parameter in layer.named_parameters())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "minimax_m2"])
def test_casting_and_copying_a_model_reach_our_layers(family):
    model = build(family)
    replaced = replace_moe_layers(model)
    twin = copy.deepcopy(model)
    ids = tiny.tokens(model)
    assert torch.equal(logits_of(twin, ids), logits_of(model, ids))
    for layer in replaced.values():
        layer.experts.down_proj.data.zero_()
    assert not torch.equal(logits_of(twin, ids), logits_of(model, ids))
    model.to(torch.bfloat16)
    for layer in replaced.values():
        assert layer.router.weight.dtype == layer.experts.down_proj.dtype == torch.bfloat16
        if layer.router.e_score_correction_bias is not None:
            assert layer.router.e_score_correction_bias.dtype == torch.float32
    assert logits_of(model, ids).isfinite().all()


def test_a_model_with_our_layers_compiles():
    model = build("gpt_oss")
    ids = tiny.tokens(model)
    expected = logits_of(model, ids)
    replaced = replace_moe_layers(model, backend="torch")
    layer = next(iter(replaced.values()))
    x = torch.randn(2, 5, 36)
    torch._dynamo.reset()
    compiled = torch.compile(nn.Sequential(layer), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits_of(whole, ids), expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = build("olmoe").train()
    replace_moe_layers(model)
    ids = tiny.tokens(model)
    _, plain = logits_and_gradients(model, ids)
    name = "gradient_checkpointing_enable" if IS_OLD else "activation_checkpointing_enable"
    getattr(model, name)()
    _, checkpointed = logits_and_gradients(model, ids)
    assert plain.keys() == checkpointed.keys()
    for key in plain:
        torch.testing.assert_close(checkpointed[key], plain[key])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_lora_on_the_experts_of_our_layers_learns():
    peft = pytest.importorskip("peft")
    model = build("qwen3_moe")
    ids = tiny.tokens(model)
    before = logits_of(model, ids)
    replaced = replace_moe_layers(model)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_parameters=targets, target_modules=[], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    torch.testing.assert_close(logits_of(model, ids), before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert (logits_of(model, ids) - before).abs().max() > 1e-2
    model.train()(input_ids=ids, labels=ids).loss.backward()
    lora = [p for name, p in model.named_parameters() if "lora_A" in name]
    assert len(lora) == 6 and all(parameter.grad.abs().max() > 0 for parameter in lora)
    assert len(peft.get_peft_model_state_dict(model)) == 12
    with pytest.raises(ValueError, match=r"no place for .*lora_A.*Merge adapters"):
        replaced.restore()


def test_an_added_selection_bias_is_saved_and_must_go_before_the_blocks_come_back(tmp_path):
    model = build("olmoe")
    replaced = replace_moe_layers(model)
    for layer in replaced.values():
        moe.add_selection_bias(layer.router)
        layer.router.e_score_correction_bias += torch.linspace(-1, 1, 8)
    ids = tiny.tokens(model)
    biased = logits_of(model, ids)
    twin = build("olmoe")
    for layer in replace_moe_layers(twin).values():
        moe.add_selection_bias(layer.router)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(twin, ids), biased)
    model.save_pretrained(tmp_path)
    assert sum("e_score_correction_bias" in key for key in load_file(tmp_path / "model.safetensors")) == 3
    with pytest.raises(ValueError, match=r"no place for \['router\.e_score_correction_bias'\]"):
        replaced.restore()
    assert torch.equal(logits_of(model, ids), biased)
    for layer in replaced.values():
        layer.router.e_score_correction_bias = None
    replaced.restore()
    assert len(blocks(model)) == 3


# Bad input


def test_a_model_without_moe_blocks_is_refused():
    with pytest.raises(ValueError, match="nothing to replace: Linear has no MoE block"):
        replace_moe_layers(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"no moe\.MoE"), record_routings(nn.Linear(3, 3)):
        pass


def test_a_model_whose_layers_are_ours_already_is_refused():
    model = build("mixtral")
    replace_moe_layers(model)
    with pytest.raises(ValueError, match=r"are moe\.MoE already"):
        replace_moe_layers(model)


def test_a_block_alone_is_sent_to_from_hf():
    with pytest.raises(ValueError, match=r"moe\.MoE\.from_hf"):
        replace_moe_layers(next(iter(blocks(build("mixtral")).values())))


def test_unsupported_blocks_are_named_and_stay():
    model = build("olmoe")
    with pytest.raises(ValueError, match=r"unsupported MoE blocks .*\(PhimoeSparseMoeBlock\)"):
        replace_moe_layers(tiny.build("phimoe"))
    both = nn.ModuleDict({"supported": model, "other": tiny.build("phimoe")})
    both.config = model.config
    with pytest.warns(UserWarning, match=r"other\.model\.layers\.0\.\w+ \(PhimoeSparseMoeBlock\)"):
        replaced = replace_moe_layers(both)
    assert all(name.startswith("supported.") for name in replaced)


def test_a_block_that_cannot_be_imported_leaves_the_model_as_it_was():
    model = build("mixtral")
    model.model.layers[-1].mlp.gate.top_k = 1
    with pytest.raises(ValueError, match="num_experts_per_tok=3"):
        replace_moe_layers(model)
    assert len(blocks(model)) == 3
