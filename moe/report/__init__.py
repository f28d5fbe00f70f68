"""Figures made from a run folder; nothing in the library imports this."""
