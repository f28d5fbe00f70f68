"""Measurements, one question a file; README.md says how they are made and what they found.

Axes: t tokens, k choices, p = t k pairs, e experts, d model width, h expert width.
"""
