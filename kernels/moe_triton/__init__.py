"""Triton kernels for sparse Mixture-of-Experts layers."""
