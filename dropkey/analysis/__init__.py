"""Seeing what a regularizer does: attention weights, their entropy, their maps, and the masks themselves."""
