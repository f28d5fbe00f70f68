"""Our experts behind transformers' registry: every layout, gate and sentinel, on modules of a few numbers.

The truth is computed in loops over tokens; gates and norms are those of the module itself.
"""

import subprocess
import sys
from functools import wraps
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, assert_same, bytes_allocated
from torch import nn
from torch.nn.utils import parametrize
from transformers.activations import ACT2FN
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation

import moe.hf
from moe.hf.experts import experts_forward, recognise
from moe.ops.experts_loop import Nonlinearity

E, D, H = 5, 6, 3
DECORATOR_KNOWS_NORMS = "has_post_expert_norm" in use_experts_implementation.__kwdefaults__


class Norm(nn.Module):
    """An RMS norm as the families write it: the dtype of what comes in goes out."""

    def __init__(self, width, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width, dtype=dtype) + 0.5)

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        return (self.weight * wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def make_experts(
    *,
    transposed=False,
    interleaved=False,
    bias=False,
    gated=True,
    norm=False,
    act="silu",
    dtype=torch.float64,
    d=D,
    h=H,
    e=E,
):
    """A module as transformers' decorator makes them, with random weights."""

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, width = e, 2 * h if gated else h
            up = "gate_up_proj" if gated else "up_proj"
            for name, outputs, inputs in ((up, width, d), ("down_proj", d, h)):
                shape = (e, inputs, outputs) if transposed else (e, outputs, inputs)
                self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=dtype)))
                if bias:
                    self.register_parameter(
                        f"{name}_bias", nn.Parameter(torch.randn(e, outputs, dtype=dtype))
                    )
            self.act_fn = ACT2FN[act]
            if norm:
                self.post_expert_norm = Norm(d, dtype)

        if interleaved:

            def _apply_gate(self, pre):
                return self.act_fn(pre[..., ::2]) * pre[..., 1::2]

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return by_loops(self, hidden_states, top_k_index, top_k_weights)

    options = {"has_post_expert_norm": norm} if DECORATOR_KNOWS_NORMS else {}
    decorate = use_experts_implementation(
        is_transposed=transposed, is_concatenated=not interleaved, has_bias=bias, has_gate=gated, **options
    )
    return decorate(Experts)(SimpleNamespace(_experts_implementation="eager"))


def by_loops(module, x, index, weights):
    """y[t] = sum of weight * expert(x[t]) over the choices that name an expert."""
    up = module.gate_up_proj if module.has_gate else module.up_proj
    up_bias = getattr(module, "gate_up_proj_bias" if module.has_gate else "up_proj_bias", None)
    down, down_bias = module.down_proj, getattr(module, "down_proj_bias", None)
    if module.is_transposed:
        up, down = up.mT, down.mT
    rows = []
    for t, chosen in enumerate(index.tolist()):
        y = torch.zeros_like(x[0])
        for j, i in enumerate(chosen):
            if not 0 <= i < len(down):
                continue
            pre = F.linear(x[t], up[i], None if up_bias is None else up_bias[i])
            hidden = module._apply_gate(pre) if module.has_gate else module.act_fn(pre)
            out = F.linear(hidden, down[i], None if down_bias is None else down_bias[i])
            if getattr(module, "has_post_expert_norm", False):
                out = module.post_expert_norm(out)
            y = y + weights[t, j] * out
        rows.append(y)
    return torch.stack(rows)


def inputs(tokens=7, top_k=2, d=D, e=E, dtype=torch.float64):
    index = torch.rand(tokens, e).argsort(1)[:, :top_k]
    return torch.randn(tokens, d, dtype=dtype), index, torch.rand(tokens, top_k, dtype=dtype) + 0.1


def solve(forward, module, x, index, weights):
    """y and the gradients of x, the weights and every parameter."""
    leaves = {"x": x.clone().requires_grad_(), "weights": weights.clone().requires_grad_()}
    y = forward(module, leaves["x"], index, leaves["weights"])
    leaves |= dict(module.named_parameters())
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return {"y": y.detach()} | dict(
        zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream), strict=True)
    )


def assert_right(module, x, index, weights):
    truth = solve(by_loops, module, x, index, weights)
    for name, value in solve(experts_forward, module, x, index, weights).items():
        assert_same(value, truth[name], name)
    with torch.no_grad():  # the way of a token that is being decoded
        assert_same(experts_forward(module, x, index, weights), truth["y"], "y without gradients")


# Layouts


@pytest.mark.parametrize(
    ("transposed", "interleaved", "bias", "gated"),
    [case for case in product((False, True), repeat=4) if case[3] or not case[1]],
)
def test_every_layout_gives_the_definition_and_its_gradients(transposed, interleaved, bias, gated):
    module = make_experts(transposed=transposed, interleaved=interleaved, bias=bias, gated=gated)
    assert_right(module, *inputs())


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu2", "relu", "sqrtsoftplus"])
@pytest.mark.parametrize("gated", [False, True])
def test_every_activation_gives_the_definition(act, gated):
    assert_right(make_experts(act=act, gated=gated), *inputs())


@pytest.mark.skipif(not DECORATOR_KNOWS_NORMS, reason="this transformers has no norms after experts")
def test_a_norm_after_the_experts_comes_before_the_routing_weight():
    assert_right(make_experts(norm=True), *inputs())


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_every_backend_gives_the_definition(backend):
    module, case = make_experts(transposed=True, bias=True), inputs()
    assert_same(experts_forward(module, *case, backend=backend), by_loops(module, *case))


def test_no_tokens_give_no_tokens():
    module, (x, index, weights) = make_experts(), inputs()
    assert experts_forward(module, x[:0], index[:0], weights[:0]).shape == (0, D)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_weights_are_used_where_they_lie(transposed, tokens):
    module = make_experts(transposed=transposed, d=64, h=96, e=16, dtype=torch.float32)
    case = inputs(tokens, d=64, e=16, dtype=torch.float32)
    weights = sum(p.nbytes for p in module.parameters())
    with torch.no_grad():
        assert bytes_allocated(lambda: experts_forward(module, *case)) < weights / 2


def test_each_weight_is_read_once_a_forward():
    """PEFT computes W + B A where the attribute is read, so a second reading would compute it again."""
    reads = {}

    class Counted(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, tensor):
            reads[self.name] = reads.get(self.name, 0) + 1
            return tensor * 1.5

    for bias, norm in ((True, False), (False, DECORATOR_KNOWS_NORMS)):
        module, case = make_experts(bias=bias, norm=norm), inputs()
        names = [name for name, _ in module.named_parameters(recurse=False)]
        for name in names:
            parametrize.register_parametrization(module, name, Counted(name), unsafe=True)
        reads.clear()
        y = experts_forward(module, *case)
        assert reads == dict.fromkeys(names, 1)
        assert_same(y, by_loops(module, *case))


# Pairs of other processes


@pytest.mark.parametrize("norm", [False, DECORATOR_KNOWS_NORMS])
@pytest.mark.parametrize("act", ["silu", "relu"])
def test_ids_outside_the_experts_run_nowhere_and_give_no_gradient(norm, act, poisoned_memory):
    module, (x, index, weights) = make_experts(norm=norm, act=act, bias=True), inputs(9)
    index[0], index[1, 0], index[2, 1], index[3] = E, E, -1, torch.tensor([-1, E + 7])
    outside = (index < 0) | (index >= E)
    ours, truth = (solve(f, module, x, index, weights) for f in (experts_forward, by_loops))
    for name in truth:
        assert_same(ours[name], truth[name], name)
    assert (ours["weights"][outside] == 0).all() and (ours["weights"][~outside] != 0).all()

    wrong = weights.masked_fill(outside, float("nan"))  # a weight that nobody should look at
    spoilt = solve(experts_forward, module, x, index, wrong)
    for name in truth:
        assert_same(spoilt[name], truth[name], name)
    with torch.no_grad():
        assert_same(experts_forward(module, x, index, wrong), truth["y"])


def test_only_ids_outside_give_zero():
    module, (x, index, weights) = make_experts(bias=True), inputs()
    for way in (solve(experts_forward, module, x, torch.full_like(index, E), weights)["y"],):
        assert torch.equal(way, torch.zeros_like(x))
    with torch.no_grad():
        assert torch.equal(
            experts_forward(module, x, torch.full_like(index, -1), weights), torch.zeros_like(x)
        )


# Gates


def test_the_default_gate_is_fused_for_the_activations_that_we_have():
    fused = {act: recognise(make_experts(act=act)) for act in ("silu", "swish", "gelu")}
    assert [f.activation for f in fused.values()] == ["swiglu", "swiglu", "geglu"]
    plain = {act: recognise(make_experts(act=act, gated=False)) for act in ("relu2", "gelu")}
    assert [p.activation for p in plain.values()] == ["relu2", "gelu"]


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu_new", "quick_gelu", "relu", "tanh"])
def test_another_activation_is_not_taken_for_ours(act):
    assert recognise(make_experts(act=act)) is None
    assert recognise(make_experts(act=act, gated=False)) is None


def test_a_gate_of_its_own_is_called():
    module, case = make_experts(), inputs()
    cls = type(module)

    class Half(cls):
        def _apply_gate(self, pre):
            return super()._apply_gate(pre) / 2

    plain = experts_forward(module, *case)
    module.__class__ = Half
    assert recognise(module) is None
    assert_same(experts_forward(module, *case), plain / 2)

    module.__class__ = cls
    module._apply_gate = lambda pre: Half._apply_gate(module, pre)
    assert recognise(module) is None


def test_hooks_on_the_activation_are_called():
    module, case = make_experts(), inputs()
    plain = experts_forward(module, *case)
    with module.act_fn.register_forward_hook(lambda m, args, output: output * 2):
        assert_same(experts_forward(module, *case), plain * 2)
    assert_same(experts_forward(module, *case), plain)


def gpt_oss_experts(**changes):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    config = GptOssConfig(hidden_size=D, intermediate_size=H, num_local_experts=E, **changes)
    module = GptOssExperts(config).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def test_the_clamped_gate_of_gpt_oss_is_fused_with_its_own_numbers():
    module = gpt_oss_experts()
    assert recognise(module) == Nonlinearity("clamped_swiglu", True, 7.0, 1.702)
    module.limit, module.alpha = 0.7, 1.3
    assert recognise(module) == Nonlinearity("clamped_swiglu", True, 0.7, 1.3)
    assert_right(module, *inputs())


def test_a_gate_that_wraps_or_replaces_that_of_gpt_oss_is_called():
    module, case = gpt_oss_experts(), inputs()
    cls = type(module)
    original = cls._apply_gate
    plain = experts_forward(module, *case)

    @wraps(original)
    def half(self, pre):
        return original(self, pre) / 2

    bias = module.down_proj_bias.data.zero_()
    plain = experts_forward(module, *case)
    for gate in (half, lambda self, pre: half(self, pre)):
        module.__class__ = type("Other", (cls,), {"_apply_gate": gate})
        assert recognise(module) is None
        assert_same(experts_forward(module, *case), plain / 2)
    assert not bias.any()


# Dtypes


def test_16_bit_weights_err_no_more_than_transformers_own_experts():
    module = make_experts(d=32, h=24, dtype=torch.float32)
    case = inputs(20, d=32, dtype=torch.float32)
    truth = by_loops(module.double(), case[0].double(), case[1], case[2].double())
    module.bfloat16()
    x = case[0].bfloat16()
    module.config._experts_implementation = "grouped_mm"
    theirs = module(x, *case[1:])
    ours = experts_forward(module, x, *case[1:])
    assert ours.dtype == torch.bfloat16
    assert_as_accurate(ours, theirs, truth)


@pytest.mark.parametrize("norm", [False, DECORATOR_KNOWS_NORMS])
def test_under_autocast_the_products_run_in_its_dtype_as_in_eager(norm):
    module = make_experts(d=32, h=24, dtype=torch.float32, norm=norm)
    case = inputs(20, d=32, dtype=torch.float32)
    truth = by_loops(module.double(), case[0].double(), case[1], case[2].double())
    module.float()
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = by_loops(module, *case), experts_forward(module, *case)
    exact = experts_forward(module, *case)
    assert ours.dtype == torch.float32
    assert_as_accurate(ours, theirs, truth)
    assert (ours - exact).abs().max() > 100 * (exact.double() - truth).abs().max()


def test_inputs_in_another_dtype_than_the_weights_come_back_in_their_own():
    module, (x, index, weights) = make_experts(dtype=torch.float32), inputs()
    y = experts_forward(module, x, index, weights)
    assert y.dtype == torch.float64
    assert_same(y, by_loops(module.double(), x, index, weights), tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_without_arithmetic_are_refused(dtype):
    module, case = make_experts(), inputs()
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"gate_up_proj is stored as torch.*dequantised"):
        experts_forward(module, *case)


def test_inputs_of_another_width_are_refused():
    module, (x, index, weights) = make_experts(), inputs()
    with pytest.raises(ValueError, match=r"x has shape \(7, 5\), expected \(7, 6\)"):
        experts_forward(module, x[:, :5], index, weights)
    with torch.no_grad(), pytest.raises(ValueError, match=r"x has shape \(7, 5\), expected \(7, 6\)"):
        experts_forward(module, x[:, :5], index, weights)


# The registry


def test_registering_twice_changes_nothing():
    moe.hf.register()
    before = dict(ExpertsInterface._global_mapping)
    moe.hf.register()
    assert dict(ExpertsInterface._global_mapping) == before
    names = {name for name in before if name.startswith("sparse_moe")}
    assert names == {"sparse_moe", "sparse_moe_reference", "sparse_moe_torch", "sparse_moe_triton"}


def test_a_name_that_another_package_has_taken_is_refused(monkeypatch):
    moe.hf.register()
    monkeypatch.setitem(ExpertsInterface._global_mapping, "sparse_moe", print)
    with pytest.raises(ValueError, match="already has experts called 'sparse_moe'"):
        moe.hf.register()


def test_the_module_calls_ours_by_its_name():
    moe.hf.register()
    module, case = make_experts(), inputs()
    module.config._experts_implementation = "sparse_moe"
    assert torch.equal(module(*case), experts_forward(module, *case))
    module.config._experts_implementation = "sparse_moe_triton"
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="cannot run on cpu"):
            module(*case)


def test_without_transformers_the_import_works_and_register_says_what_to_install():
    code = """
import sys
sys.modules["transformers"] = None
import moe.hf
try:
    moe.hf.register()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install '.[hf]'" in done.stdout


def test_importing_the_bridge_imports_no_transformers():
    code = "import sys, moe.hf; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
