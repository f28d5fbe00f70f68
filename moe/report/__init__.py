"""Figures made from a run folder or from a record; nothing in the library imports this."""
