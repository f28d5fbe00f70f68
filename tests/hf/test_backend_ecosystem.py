"""Our experts under what people put around a model: compile, autocast, PEFT, accelerate, processes."""

import copy
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import build, run, tokens

import moe.hf

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")
needs_expert_parallelism = pytest.mark.skipif(
    find_spec("transformers.distributed.expert_parallel") is None,
    reason="this transformers has no registry of expert parallelism",
)


def pair(family="olmoe", **changes):
    """The same tiny model twice: with eager experts, and with ours."""
    theirs = build(family, **changes)
    ours = copy.deepcopy(theirs)
    theirs.set_experts_implementation("eager")
    moe.hf.use(ours)
    return theirs, ours


def gradients(model, ids):
    model.zero_grad()
    run(model, ids).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, truth, tolerance=1e-5):
    assert ours.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.filterwarnings("ignore")  # of torch.compile about itself
@pytest.mark.parametrize("family", ["gpt_oss", "gemma4"])  # a fused gate, and one that the model computes
def test_a_model_compiles_whole_and_gives_the_same_bits(family):
    model = build(family, num_hidden_layers=2)
    moe.hf.use(model)
    ids = tokens(model)
    expected, grads = run(model, ids), gradients(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(lambda i: run(model, i), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), expected)
    model.zero_grad()
    compiled(ids).square().mean().backward()
    assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, grads)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    theirs, ours = pair()
    ids = tokens(ours)
    ours.train()
    enable = getattr(
        ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable
    )  # newer, older
    enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in ours.modules())
    assert_close(gradients(ours, ids), gradients(theirs, ids))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "gemma4"])
def test_under_autocast_a_model_errs_no_more_than_with_eager_experts(family):
    from helpers import assert_as_accurate

    theirs, ours = pair(family)
    ids = tokens(ours)
    truth = run(theirs, ids)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert_as_accurate(run(ours, ids).float(), run(theirs, ids).float(), truth.double(), factor=1.5)


def lora(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2,
        lora_alpha=4,
        lora_dropout=0.0,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    torch.manual_seed(1)
    return get_peft_model(model, config)


def train(model, ids, steps=3):
    """The losses of a few steps over the parameters that learn."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@needs_peft
@pytest.mark.filterwarnings("ignore")  # of peft about its own configuration
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_adapters_on_the_experts_learn_the_same_and_merge(family):
    theirs, ours = (lora(model) for model in pair(family))
    assert set(moe.hf.use(ours).previous.values()) == {"sparse_moe"}
    ids = tokens(ours)
    expected = train(theirs, ids)
    assert train(ours, ids) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 1e-3
    with torch.no_grad():
        adapted = run(ours, ids)
        torch.testing.assert_close(adapted, run(theirs, ids), rtol=1e-5, atol=1e-5)
        merged = run(ours.merge_and_unload(), ids)
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)


@needs_accelerate
@pytest.mark.filterwarnings("ignore")  # of accelerate about the absence of a GPU
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_a_prepared_model(precision):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    losses = []
    for model in pair():
        ids = tokens(model)
        prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(3):
            loss = prepared(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[-3]
    assert losses[3:] == pytest.approx(losses[:3], abs=1e-5 if precision == "no" else 3e-2)


@needs_accelerate
@needs_expert_parallelism
@pytest.mark.parametrize(("family", "style"), [("gpt_oss", "all_reduce"), ("qwen3_moe", "all_to_all")])
def test_two_processes_share_the_experts(family, style, tmp_path):
    """Each holds half of the experts; the other half's ids arrive as num_experts (all_reduce)."""
    model = build(family)
    model.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("expert_parallel.py")
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, tmp_path, style],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    assert all("agrees" in output for output in outputs), "\n".join(outputs)
