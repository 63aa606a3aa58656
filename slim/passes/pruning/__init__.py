"""The parts of ``Prune``: where units lie, what losing them costs, how many go, and what makes up for them."""
