"""The operations of a MoE layer, under the same names in every backend; `choose.py` picks the backend."""
