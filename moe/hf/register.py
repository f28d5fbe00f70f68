"""Make Hugging Face MoE models use our experts: `register` makes the name known, `use` switches a model.

The choice of a backend is part of the name, so that it lives wherever transformers keeps the name: in the
configuration, through `copy.deepcopy`, and through the switches that `generate` makes.

    sparse_moe            Triton where it works, else the torch backend
    sparse_moe_reference, sparse_moe_torch, sparse_moe_triton        that one
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, get_args

from torch import nn

from moe.ops.choose import Backend, check_backend

NAME = "sparse_moe"
NAMES: Mapping[Backend, str] = MappingProxyType(
    {backend: NAME if backend == "auto" else f"{NAME}_{backend}" for backend in get_args(Backend)}
)


@dataclass(frozen=True, slots=True)
class ReplacedExperts:
    """What `use` did.

    implementation  the name under which transformers now finds our experts
    previous        for each module of experts, by its name in the model, the implementation it had before
    """

    implementation: str
    previous: Mapping[str, str | None]


def register() -> None:
    """Make `experts_implementation="sparse_moe"` known to transformers. A second call changes nothing.

    Then `from_pretrained(..., experts_implementation="sparse_moe")` and
    `model.set_experts_implementation("sparse_moe")` run the experts through `moe.ops`.

    Raises:
        ImportError: transformers is missing, or is older than its registry of experts.
        ValueError: another package has taken one of our names.
    """
    if find_spec("transformers") is None:
        raise ImportError(
            "moe.hf needs transformers, which is not installed. "
            "Install it with: pip install '.[hf]' in a clone of the repository."
        )
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            "moe.hf needs a newer transformers: this one has no registry of experts. "
            "Upgrade it with: pip install '.[hf]' in a clone of the repository."
        ) from error
    from moe.hf.experts import experts_forward

    known = ExpertsInterface()
    for backend, name in NAMES.items():
        taken = known.get(name)
        if taken is None:
            ExpertsInterface.register(name, partial(experts_forward, backend=backend))
        elif getattr(taken, "func", None) is not experts_forward:
            raise ValueError(
                f"transformers already has experts called {name!r}: {taken!r}. Unregister those."
            )


def use(model: nn.Module, *, backend: Backend = "auto") -> ReplacedExperts:
    """Register, switch every module of experts in `model` to ours, and make sure that it happened.

    model    a transformers model, or any module that holds some (a PEFT model, a compiled one, ...)
    backend  "auto", or "reference", "torch", "triton"; kept in the name, as the head of this file says

    To go back: `model.set_experts_implementation("grouped_mm")`, or what `ReplacedExperts.previous` says.

    Raises:
        ValueError: an unknown backend; nothing to replace, because the model has no experts or because its
            experts do not go through transformers' registry, where a switch would silently do nothing.
        ImportError: as `register`.
    """
    check_backend(backend)
    register()
    experts = {name: m for name, m in model.named_modules() if _goes_through_registry(m)}
    if not experts:
        raise ValueError(_why_nothing_to_replace(model))
    previous = {name: _implementation(m) for name, m in experts.items()}
    for root in _outermost_models(model):
        root.set_experts_implementation(NAMES[backend])  # pyright: ignore[reportCallIssue]
    left = [name for name, m in experts.items() if _implementation(m) != NAMES[backend]]
    if left:
        raise ValueError(
            f"{type(model).__name__}: transformers left {len(left)} of {len(experts)} modules of experts as "
            f"they were, the first is {left[0]!r} ({type(experts[left[0]]).__name__}). Choose when loading: "
            f"from_pretrained(..., experts_implementation={NAMES[backend]!r})."
        )
    return ReplacedExperts(NAMES[backend], MappingProxyType(previous))


def _goes_through_registry(module: nn.Module) -> bool:
    """Whether transformers' decorator has made it; these are the attributes it gives in every version."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated"))


def _implementation(experts: Any) -> str | None:
    return experts.config._experts_implementation


def _outermost_models(module: nn.Module) -> list[nn.Module]:
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        return [module]
    return [model for child in module.children() for model in _outermost_models(child)]


def _why_nothing_to_replace(model: nn.Module) -> str:
    kinds = {type(m).__name__ for m in model.modules()}
    sparse = sorted(k for k in kinds if any(word in k.lower() for word in ("expert", "moe", "sparsemlp")))
    sparse = [kind for kind in sparse if kind != type(model).__name__ and "Model" not in kind]
    if not sparse:
        return f"{type(model).__name__} has no experts: nothing to replace. Give a sparse model."
    return (
        f"{type(model).__name__}: nothing replaced. Its experts ({', '.join(sparse)}) do not go through "
        f"transformers' registry, so set_experts_implementation would silently do nothing. "
        f"Replace the whole layer instead, if its family is supported."
    )
