"""Which sequence a request is given."""

from __future__ import annotations

import numpy as np

from gguf_pager.serve.answers import Answer
from gguf_pager.serve.sequences import Sequence, choose, common_prefix


def a_sequence(number: int, ids: list[int], used_s: float, *, is_busy: bool = False) -> Sequence:
    found = Sequence(number, 64)
    found.note(ids)
    found.used_s = used_s
    if is_busy:
        found.answer = Answer(np.zeros(1, np.intc), lambda row: 0, 1)
    return found


def test_prefix_is_counted_to_the_first_difference() -> None:
    def array(*ids: int) -> np.ndarray:
        return np.array(ids, np.intc)

    assert common_prefix(array(), array(1)) == 0
    assert common_prefix(array(1, 2, 3), array(1, 2, 4)) == 2
    assert common_prefix(array(1, 2), array(1, 2, 3)) == 2


def test_conversation_that_goes_on_keeps_its_sequence() -> None:
    first, second = a_sequence(0, [1, 2, 3, 4], 5), a_sequence(1, [1, 2, 9, 9], 1)
    assert choose([first, second], np.array([1, 2, 3, 4, 5], np.intc)) == (first, None)


def test_answer_that_is_wanted_again_keeps_its_sequence() -> None:
    first, empty = a_sequence(0, [1, 2, 3, 4], 5), a_sequence(1, [], 0)
    assert choose([first, empty], np.array([1, 2, 3], np.intc)) == (first, None)


def test_new_conversation_takes_the_oldest_place_and_shares_a_beginning() -> None:
    first, second = a_sequence(0, [1, 2, 3, 4, 5, 6], 5), a_sequence(1, [7, 8], 1)
    assert choose([first, second], np.array([1, 2, 9], np.intc)) == (second, first)
    empty = a_sequence(2, [], 0)
    assert choose([first, second, empty], np.array([1, 2, 9], np.intc)) == (empty, first)


def test_place_that_is_mostly_the_same_is_taken_where_none_is_empty() -> None:
    first, second = a_sequence(0, [1, 2, 3, 4, 5, 6], 5), a_sequence(1, [7, 8], 1)
    assert choose([first, second], np.array([1, 2, 3, 4, 9], np.intc)) == (first, None)
    empty = a_sequence(2, [], 0)
    assert choose([first, empty], np.array([1, 2, 3, 4, 9], np.intc)) == (empty, first)
    assert choose([first, empty], np.array([1, 2, 3, 4, 9], np.intc), can_share=False) == (first, None)
    assert choose([first, second], np.array([1, 2, 9], np.intc), can_share=False) == (second, None)


def test_busy_sequences_are_left_alone() -> None:
    first, second = a_sequence(0, [1, 2, 3], 5, is_busy=True), a_sequence(1, [7, 8], 1)
    assert choose([first, second], np.array([1, 2, 3, 4], np.intc)) == (second, first)
    assert choose([first], np.array([1], np.intc)) is None
