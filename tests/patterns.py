"""Sparsity patterns for tests: one of each kind, and any of them at random."""

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

# Of a layer with four heads; sizes that divide nothing, and some that do.
PATTERNS = (
    "window(7) | columns(2)",
    "window(64) | columns(4)",
    "window(5) | stride(9)",
    "blocks(16, 1) | summary(16, 3)",
    "window(9) | columns(3) | rows(3)",
    "blocks(8, 2) | columns(8) | rows(8) | random(8, 2, 5)",
    "top(8, 3) | columns(2)",
    "top(16, 8)",
    "vertical_slash(6, 5) | columns(1)",
    "0: dense; 1: window(6); 2-3: top(4, 2) | columns(1)",
)


def patterns() -> SearchStrategy[str]:
    """Any pattern, as the IR writes it."""
    number = st.integers(1, 99)
    alone = st.one_of(
        number.map(lambda n: f"window({n})"), number.map(lambda n: f"stride({n})"),
        st.tuples(number, number).map(lambda n: f"blocks({n[0]}, {n[1]})"),
    )  # fmt: skip
    more = st.one_of(
        number.map(lambda n: f"columns({n})"), number.map(lambda n: f"rows({n})"),
        st.tuples(number, number, st.integers(0, 9)).map(lambda n: f"random({n[0]}, {n[1]}, {n[2]})"),
    )  # fmt: skip
    terms = st.tuples(alone, st.lists(more, max_size=3)).map(lambda parts: " | ".join([parts[0], *parts[1]]))
    return st.one_of(terms, st.tuples(terms, terms).map(lambda pair: f"0-1: {pair[0]}; 2: dense; 3: {pair[1]}"))
