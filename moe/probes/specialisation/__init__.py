"""Do experts specialise? Which experts the tokens of each label go to, and whether that is more than chance.

A label is anything a token can have one of: a modality, a domain.
"""
