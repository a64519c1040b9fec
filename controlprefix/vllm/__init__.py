"""Serving from vLLM, unchanged: slots as the keys and values of placeholder tokens.

vLLM counts slots: a prefix of P slots has the positions 0 to P-1, and the text begins at P. What
attention reads depends on differences of positions alone where they are rotations, so the same
stored prefix is exact there with every key turned by P positions.
"""
