"""Which patterns SparseAttention knows by name, and how it chooses among them."""
