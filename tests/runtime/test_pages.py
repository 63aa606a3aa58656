"""The pool of pages: nothing leaks, nothing is written that another row reads."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from slim import errors
from slim.runtime.cache import Slot
from slim.runtime.pages import PAGE, PagePool, Row, stats
from slim.runtime.prefixes import Prefixes

SLOTS = (Slot(heads=2, key_width=4, value_width=6, dtype=torch.float32, bounds=16),)


class Pages(RuleBasedStateMachine):
    """Rows that write, fork, go back and end, beside a plain list of what each should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(SLOTS, 2, limit=12)
        self.rows: list[tuple[Row, list[float]]] = []
        self.written = 0.0

    @rule()
    def begin(self) -> None:
        self.rows.append((Row(self.pool), []))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), tokens=st.integers(1, 150))
    def write(self, data: st.DataObject, tokens: int) -> None:
        row, content = data.draw(st.sampled_from(self.rows))
        missing, free = row.missing(tokens), self.pool.available
        assert free is not None
        if missing > free:
            before = list(row.pages)
            with pytest.raises(errors.CacheFull):
                row.reserve(tokens)
            assert len(row.pages) == len(before)
            return
        row.reserve(tokens)
        assert self.pool.available == free - missing
        for token in range(row.length, row.length + tokens):
            self.written += 1
            content.append(self.written)
            self.pool.tensors[0][row.pages[token // PAGE], :, token % PAGE] = self.written
        row.length += tokens

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        row, content = data.draw(st.sampled_from(self.rows))
        self.rows.append((row.fork(), list(content)))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), length=st.integers(0, 200))
    def truncate(self, data: st.DataObject, length: int) -> None:
        row, content = data.draw(st.sampled_from(self.rows))
        row.truncate(length)
        del content[length:]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(self.rows))
        self.rows = [other for other in self.rows if other is not pair]
        pair[0].free()

    @invariant()
    def every_row_holds_what_it_wrote(self) -> None:
        for row, content in self.rows:
            assert row.length == len(content)
            pages = self.pool.tensors[0][row.pages] if row.pages else self.pool.tensors[0][:0]
            assert pages[:, 0, :, 0].flatten()[: row.length].tolist() == content

    @invariant()
    def every_page_is_counted(self) -> None:
        counts = [0] * self.pool.pages
        for row, _ in self.rows:
            for page in row.pages:
                counts[page] += 1
        assert counts == self.pool.references
        assert self.pool.free == counts.count(0)


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_page_that_two_rows_name_is_copied_when_one_writes() -> None:
    pool = PagePool(SLOTS, 4)
    row = Row(pool)
    row.reserve(10)
    row.length = 10
    twin = row.fork()
    found = stats(pool, [row, twin])
    assert (found.shared, found.tokens, found.copies) == (1, 20, 0)
    twin.reserve(1)
    assert twin.pages != row.pages
    assert stats(pool, [row, twin]).copies == 1


def test_prompts_that_begin_alike_share_whole_pages_and_the_last_token_is_always_run() -> None:
    pool = PagePool(SLOTS, 16)
    prefixes = Prefixes(pool)
    tokens = list(range(200))
    row = prefixes.begin(tokens)
    assert row.length == 0
    row.reserve(200)
    row.length = 200
    prefixes.learn(tokens, row)
    assert prefixes.begin(tokens[:192]).length == 128  # 192 is three pages, and the last token must be run
    again = prefixes.begin([*tokens[:130], 7, 8])
    assert again.pages == row.pages[:2]
    assert prefixes.begin([7, *tokens]).length == 0


def test_pages_of_forgotten_prompts_are_given_back_the_oldest_first() -> None:
    pool = PagePool(SLOTS, 16)
    prefixes = Prefixes(pool)
    rows = []
    for start in (0, 1000):
        tokens = list(range(start, start + 128))
        row = prefixes.begin(tokens)
        row.reserve(128)
        row.length = 128
        prefixes.learn(tokens, row)
        rows.append((tokens, row))
    rows[0][1].free()
    assert prefixes.evict(5) == 2  # what a row still names stays
    assert prefixes.known([*rows[0][0], 5]) == 0
    assert prefixes.known([*rows[1][0], 5]) == 2
    rows[1][1].free()
    prefixes.clear()
    assert pool.free == pool.pages


def test_a_prompt_of_thousands_of_pages_is_forgotten_page_by_page_from_its_end() -> None:
    pages = 2000
    pool = PagePool(SLOTS, pages)
    prefixes = Prefixes(pool)
    tokens = list(range(pages * PAGE))
    row = prefixes.begin(tokens)
    row.reserve(len(tokens))
    row.length = len(tokens)
    prefixes.learn(tokens, row)
    row.free()
    assert prefixes.evict(500) == 500
    assert prefixes.known([*tokens, 5]) == pages - 500
    prefixes.clear()
    assert pool.free == pool.pages
