"""Triton kernels for sparse Mixture-of-Experts layers.

Tensors and numbers only; needs torch and triton, nothing else. t tokens, k choices, p = t k pairs, e experts,
d model width, h expert width. A *row* is a pair's place in the order sorted by expert.
"""

from .activation import activate
from .attention import attention_over_cache
from .combine import combine, dispatch
from .experts_ffn import experts_ffn
from .grouped_linear import grouped_linear, grouped_linear_grad_rows, grouped_linear_grad_weight
from .routing import sort_by_expert

__all__ = [
    "activate",
    "attention_over_cache",
    "combine",
    "dispatch",
    "experts_ffn",
    "grouped_linear",
    "grouped_linear_grad_rows",
    "grouped_linear_grad_weight",
    "sort_by_expert",
]
