"""Tasks that show what a memory can do, made from a seed: texts of tokens, and what is asked of them.

The right answer to a question is a token that the model has to predict where the question ends.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch


NOT_ASKED = -100  # in place of an answer, where a text has fewer questions than another


@dataclass
class Questions:
    """Texts `ids` `[N, T]`; what the model says at each place of `at` `[N, A]` must be `answers` `[N, A]`."""

    ids: torch.Tensor
    at: torch.Tensor
    answers: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, rows) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[rows].long(), "at": self.at[rows].long(), "answers": self.answers[rows].long()}


def _questions(ids, at, answers) -> Questions:
    return Questions(*(torch.from_numpy(np.ascontiguousarray(x, dtype=np.int16)) for x in (ids, at, answers)))


def _distinct(rng: np.random.Generator, rows: int, low: int, high: int, count: int) -> np.ndarray:
    """`[rows, count]` numbers from low to high - 1, in each row different ones: rows with doubles are drawn again."""
    found = rng.integers(low, high, (rows, count))
    while (again := (np.diff(np.sort(found, axis=1), axis=1) == 0).any(axis=1)).any():
        found[again] = rng.integers(low, high, (again.sum(), count))
    return found


def overwriting(seed: int, rows: int, keys: int = 8, writes: int = 4, vocab_size: int = 256) -> Questions:
    """Each of `keys` keys is written `writes` times, in any order, each time with another value; then every key is
    asked for, `? key value`. The value that was written last counts.
    """
    rng = np.random.default_rng(seed)
    half, count = vocab_size // 2, keys * writes
    names = _distinct(rng, rows, 1, half, keys)  # 0 is the question mark
    order = rng.permuted(np.tile(np.repeat(np.arange(keys), writes), (rows, 1)), axis=1)
    values = rng.integers(half, vocab_size, (rows, count))
    written = np.stack((np.take_along_axis(names, order, 1), values), axis=2).reshape(rows, 2 * count)
    asked = rng.permuted(np.tile(np.arange(keys), (rows, 1)), axis=1)
    last = count - 1 - (order[:, None, ::-1] == asked[:, :, None]).argmax(2)
    answers = np.take_along_axis(values, last, 1)
    questions = np.stack((np.zeros_like(asked), np.take_along_axis(names, asked, 1), answers), axis=2)
    at = np.tile(2 * count + 1 + 3 * np.arange(keys), (rows, 1))
    return _questions(np.concatenate((written, questions.reshape(rows, -1)), axis=1), at, answers)


def overwriting_stream(seed: int, rows: int, keys: int = 8, length: int = 88, vocab_size: int = 256) -> Questions:
    """What `overwriting` is learned from: writes and questions of the same form in any order."""
    draw, half = random.Random(seed), vocab_size // 2
    ids, at, answers = np.empty((rows, length)), np.zeros((rows, length // 3)), np.full((rows, length // 3), NOT_ASKED)
    for row in range(rows):
        names, memory, text, asked = draw.sample(range(1, half), keys), {}, [], 0
        while len(text) < length:
            key = draw.choice(names)
            if key in memory and draw.random() < 0.5:
                if len(text) + 1 < length:
                    at[row, asked], answers[row, asked] = len(text) + 1, memory[key]
                    asked += 1
                text += [0, key, memory[key]]
            else:
                memory[key] = draw.randrange(half, vocab_size)
                text += [key, memory[key]]
        ids[row] = text[:length]
    return _questions(ids, at, answers)


def mqar(seed: int, rows: int, length: int, pairs: int, vocab_size: int = 8192, power: float = 0.01) -> Questions:
    """Multi-query associative recall as published with Zoology (Arora et al. 2023): `pairs` keys with their values,
    then every key once more, most of them soon, among random tokens: there its value has to be predicted.
    """
    rng = np.random.default_rng(seed)
    half, places = vocab_size // 2, (length - 2 * pairs) // 2
    keys = _distinct(rng, rows, 1, half, pairs)
    values = _distinct(rng, rows, half, vocab_size, pairs)
    weights = power * np.arange(1, places + 1) ** (power - 1.0)
    # The first `pairs` of exponential clocks of these rates to ring are a draw without replacement.
    clocks = rng.exponential(size=(rows, places)) / weights
    at = 2 * pairs + 2 * rng.permuted(clocks.argpartition(pairs - 1, axis=1)[:, :pairs], axis=1)
    ids = rng.integers(0, vocab_size, (rows, length))
    ids[:, : 2 * pairs] = np.stack((keys, values), axis=2).reshape(rows, 2 * pairs)
    np.put_along_axis(ids, at, keys, axis=1)
    return _questions(ids, at, values)


def parity(seed: int, rows: int, length: int) -> Questions:
    """At every bit: is the number of ones up to it even (2) or odd (3)?"""
    bits = np.random.default_rng(seed).integers(0, 2, (rows, length))
    return _questions(bits, np.tile(np.arange(length), (rows, 1)), 2 + bits.cumsum(1) % 2)


def swaps(seed: int, rows: int, length: int, items: int = 3) -> Questions:
    """Products of permutations of `items` things: each token is the identity or a swap of two, and at every token it
    is asked which permutation all up to it make. `items` = 3 is the group S3.
    """
    from itertools import permutations

    elements = list(permutations(range(items)))
    exchanges = [(i, j) for i in range(items) for j in range(i + 1, items)]
    generators = [tuple(range(items))]
    for i, j in exchanges:
        swapped = list(range(items))
        swapped[i], swapped[j] = j, i
        generators.append(tuple(swapped))
    product = np.array([[elements.index(tuple(e[g[i]] for i in range(items))) for g in generators] for e in elements])
    ids = np.random.default_rng(seed).integers(0, len(generators), (rows, length))
    now, answers = np.zeros(rows, dtype=int), np.empty_like(ids)
    for t in range(length):
        answers[:, t] = now = product[now, ids[:, t]]
    return _questions(ids, np.tile(np.arange(length), (rows, 1)), len(generators) + answers)
