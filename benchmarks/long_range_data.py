"""Two tasks in the manner of Long Range Arena (Tay et al., ICLR 2021): ListOps, made by its published rules, and IMDb as bytes.

ListOps (Nangia & Bowman, 2018): nested prefix expressions over digits, e.g. [MAX 2 9 [MIN 4 7 ] 0 ], whose value is a digit.
Every node is an operator with probability 1/4 down to a given depth and a digit otherwise; an operator takes 2 to `most`
arguments, drawn uniformly. Expressions whose tokens are too few or too many are drawn again, and none comes twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets

from thresher.errors import DataError, OptionError
from thresher.tasks.data import load_rows

PAD, CLS, SEP = 0, 1, 2
FIRST = 3  # the first id after the special ones
OPERATOR_SHARE = 0.25
TRIES = 20_000  # draws for one expression, before the limits are called impossible


def median(values: Sequence[int]) -> int:
    """The middle value; of an even number of values the mean of the two in the middle, rounded down."""
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": median,
    "[SM": lambda values: sum(values) % 10,
}
END = "]"
SYMBOLS = (*(str(digit) for digit in range(10)), *OPERATORS, END)
LISTOPS_VOCABULARY, BYTES_VOCABULARY = FIRST + len(SYMBOLS), FIRST + 256
_ID = {symbol: FIRST + at for at, symbol in enumerate(SYMBOLS)}


def evaluate(tokens: Sequence[str]) -> int:
    """The value of an expression, a digit. Raises DataError for what is not one whole expression."""
    operators: list[str] = []
    values: list[list[int]] = [[]]
    for token in tokens:
        if token in OPERATORS:
            operators.append(token)
            values.append([])
        elif token == END and operators and values[-1]:
            arguments = values.pop()
            values[-1].append(OPERATORS[operators.pop()](arguments))
        elif len(token) == 1 and token in SYMBOLS and token != END:
            values[-1].append(int(token))
        else:
            raise DataError(f"The token {token!r} cannot stand where it does; give a whole ListOps expression.")
    if operators or len(values[0]) != 1:
        raise DataError("The tokens are not one whole ListOps expression; close every operator and give one value.")
    return values[0][0]


def expression(draw: random.Random, *, depth: int = 10, most: int = 10, longest: int = 10**9) -> list[str] | None:
    """One expression with an operator at its root, as tokens; None as soon as it has more than `longest`.

    depth: levels of nodes, the root's and the deepest digits' included. most: arguments of an operator, at least 2.
    """
    tokens = [draw.choice(list(OPERATORS))]
    waiting = [draw.randint(2, most)]  # arguments that each open operator still lacks
    while waiting:
        if waiting[-1] == 0:
            waiting.pop()
            tokens.append(END)
            continue
        waiting[-1] -= 1
        if len(waiting) + 1 < depth and draw.random() < OPERATOR_SHARE:
            tokens.append(draw.choice(list(OPERATORS)))
            waiting.append(draw.randint(2, most))
        else:
            tokens.append(draw.choice(SYMBOLS[:10]))
        if len(tokens) + sum(waiting) + len(waiting) > longest:  # every argument to come is a token at least
            return None
    return tokens


def expressions(
    count: int, *, seed: int, lengths: tuple[int, int], depth: int = 10, most: int = 10
) -> list[tuple[list[str], int]]:
    """`count` different expressions of lengths[0] to lengths[1] tokens, each with its value; the same for the same seed.

    Raises OptionError for limits that no expression meets, or too few different ones.
    """
    shortest, longest = lengths
    if not 4 <= shortest <= longest or depth < 2 or most < 2:
        raise OptionError(
            "An expression has at least 4 tokens, 2 levels and 2 arguments, and its lengths must not fall; "
            f"these are {lengths}, {depth} and {most}."
        )
    draw, seen = random.Random(seed), set()
    made: list[tuple[list[str], int]] = []
    for _ in range(count):
        for _ in range(TRIES):
            tokens = expression(draw, depth=depth, most=most, longest=longest)
            if tokens is not None and len(tokens) >= shortest and tuple(tokens) not in seen:
                break
        else:
            raise OptionError(
                f"Only {len(made)} expressions of {shortest} to {longest} tokens were found with {depth} levels and at "
                f"most {most} arguments; allow more of either, or other lengths."
            )
        seen.add(tuple(tokens))
        made.append((tokens, evaluate(tokens)))
    return made


def _encoded(ids: list[list[int]], labels: list[int]) -> datasets.Dataset:
    masks = [[1] * len(row) for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": labels})


def listops(count: int, *, seed: int, tokens: int, depth: int = 10, most: int = 10) -> datasets.Dataset:
    """Encoded expressions (input_ids, attention_mask, labels 0-9) of tokens / 2 to `tokens` ids, [CLS] included."""
    rows = expressions(count, seed=seed, lengths=(max(tokens // 2, 5) - 1, tokens - 1), depth=depth, most=most)
    return _encoded([[CLS, *(_ID[token] for token in expression)] for expression, _ in rows], [v for _, v in rows])


def byte_ids(text: str, tokens: int) -> list[int]:
    """[CLS] and the bytes of `text` in UTF-8, cut at `tokens` ids."""
    return [CLS, *(FIRST + byte for byte in text.encode()[: tokens - 1])]


def byte_reviews(data_dir: Path, split: str, count: int, *, seed: int, tokens: int) -> datasets.Dataset:
    """Encoded reviews of IMDb (input_ids, attention_mask, labels 0-1), shuffled, every byte a token, cut at `tokens`."""
    rows = load_rows(data_dir / "imdb", split=split, limit=count, seed=seed)
    return _encoded([byte_ids(text, tokens) for text in rows["text"]], list(rows["label"]))
