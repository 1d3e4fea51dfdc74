"""Solves sudokus: no network in here."""

from __future__ import annotations

ALL = 0b111111111
# Of each cell: its row, its column and its box, among 27 sets of digits that are taken.
PLACES = [(cell // 9, 9 + cell % 9, 18 + cell // 27 * 3 + cell % 9 // 3) for cell in range(81)]
MAX_STEPS = 50_000  # about a second; a board that takes more was made to


class TooHard(Exception):
    """The search was given up."""


def solve(board: str) -> str:
    """*board*, 81 digits with 0 for those to be found, complete; or NoSolution, or TooHard."""
    cells = [0] * 81
    taken = [0] * 27
    for cell, digit in enumerate(map(int, board)):
        if digit:
            bit = 1 << (digit - 1)
            if bit & _taken(taken, cell):
                return "NoSolution"
            _set(cells, taken, cell, bit)
    try:
        solved = _search(cells, taken, [MAX_STEPS])
    except TooHard:
        return "TooHard"
    return "".join(str(bit.bit_length()) for bit in cells) if solved else "NoSolution"


def _taken(taken: list[int], cell: int) -> int:
    row, column, box = PLACES[cell]
    return taken[row] | taken[column] | taken[box]


def _set(cells: list[int], taken: list[int], cell: int, bit: int) -> None:
    """Put a digit there, or (the same again) take it away."""
    cells[cell] ^= bit
    for place in PLACES[cell]:
        taken[place] ^= bit


def _search(cells: list[int], taken: list[int], steps: list[int]) -> bool:
    """Fill the empty cell that has the fewest candidates, with each of them in turn."""
    steps[0] -= 1
    if steps[0] < 0:
        raise TooHard
    best, best_count, best_free = -1, 10, 0
    for cell in range(81):
        if not cells[cell]:
            free = ALL & ~_taken(taken, cell)
            count = free.bit_count()
            if count < best_count:
                best, best_count, best_free = cell, count, free
                if count < 2:
                    break
    if best < 0:
        return True
    while best_free:
        bit = best_free & -best_free
        best_free ^= bit
        _set(cells, taken, best, bit)
        if _search(cells, taken, steps):
            return True
        _set(cells, taken, best, bit)
    return False
