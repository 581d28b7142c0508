"""How large a haystack may be."""

from collections.abc import Callable


def largest_size(cost: Callable[[int], int], budget: int, least: int, most: int, guess: int) -> int | None:
    """A size in [least, most] that costs at most `budget`, unlike the next one. None: `least` costs more.

    cost(size) grows about linearly; with a good guess it is called three or four times. Where the cost is not monotone
    there may be several such sizes: which of them is found depends on the arguments alone.
    """
    base = cost(least)
    if base > budget:
        return None
    low, high = least, most + 1  # low fits, high does not
    tries = 0
    while high - low > 1:
        size = min(max(guess, low + 1), high - 1)
        spent = cost(size)
        low, high = (size, high) if spent <= budget else (low, size)
        tries += 1
        slope = max(spent - base, 1) / (size - least)
        guess = size + int((budget - spent) // slope) if tries < 8 else (low + high) // 2
    return low
