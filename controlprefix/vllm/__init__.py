"""Serving from an unmodified vLLM: slots as the keys and values of placeholder tokens.

vLLM counts slots: a prefix of P slots has the positions 0 to P-1, and the text starts at P. With
rotary embeddings, attention depends on differences of positions only, so the same stored prefix
is exact there after rotating every key by P positions.
"""
