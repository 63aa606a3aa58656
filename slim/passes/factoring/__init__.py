"""Linears as two smaller ones: the directions that matter, how many of them, and what a Program holds then."""
