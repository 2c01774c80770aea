"""Two tasks on what a model remembers of a text, in tokens: overwriting recall and needle retrieval.

Overwriting recall: eight keys, each written three times over a text, the last value counts.

    ... A is 17. ... C is 64. ... A is 52. ...            In the end: C is 64. A is 52. ...

Needle retrieval: one number, written once.

    ... The secret number of Oslo is 5821. ...            The secret number of Oslo is 5821

An answer is right if each of its tokens is the likeliest one after the text up to it. What stands between is a text of
the caller's, or sentences that say nothing; every episode has the length that was asked for, to the token.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from string import ascii_uppercase


KEYS, WRITES = 8, 3
NUMBERS = range(10, 100)
CITIES = ("Oslo", "Paris", "Cairo", "Lima", "Delhi", "Rome", "Tokyo", "Quito", "Bern", "Perth", "Seoul", "Accra")
SENTENCES = (
    " The grass is green. The sky is blue. The sun is yellow. Rain falls on the hills, and the river takes it to the"
    " sea. Here we go. There and back again."
)
IN_THE_END = "\n\nIn the end:"


@dataclass(frozen=True)
class Episode:
    """A text in tokens, and where in it the answers stand."""

    ids: list[int]
    answers: list[range]


Part = tuple[list[int], bool]  # tokens, and whether they are an answer


class RecallTasks:
    """Draws episodes for one tokenizer.

    Args:
        tokenizer: any that can write capital letters and digits; what it puts before a text stands before an episode.
        filler: tokens to put between; sentences that say nothing by default.

    Raises:
        ValueError: a tokenizer that writes two keys or two values alike.
    """

    def __init__(self, tokenizer, filler: list[int] | None = None):
        self._encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, add_special_tokens=False)
        start = tokenizer.bos_token_id
        self._start = [start] if start is not None and tokenizer.encode("A")[:1] == [start] else []
        self._filler = filler or self._encode(SENTENCES)
        self._keys = {key: self._encode(f" {key} is") for key in ascii_uppercase}
        self._values = {number: self._encode(f" {number}") for number in NUMBERS}
        self._stop, self._in_the_end = self._encode("."), self._encode(IN_THE_END)
        for words in (self._keys, self._values):
            alike: dict[tuple[int, ...], object] = {}
            for word, ids in words.items():
                if (other := alike.setdefault(tuple(ids), word)) != word:
                    raise ValueError(f"recall cannot be measured: the tokenizer writes {other} and {word} alike")

    def overwriting(self, length: int, count: int, seed: int) -> Iterator[Episode]:
        """`count` episodes of overwriting recall, each of `length` tokens.

        Raises:
            ValueError: an episode does not fit into `length`.
        """
        draw = random.Random(f"overwriting {seed}")
        for _ in range(count):
            keys, memory, lines = draw.sample(ascii_uppercase, KEYS), {}, []
            for key in draw.sample(keys * WRITES, KEYS * WRITES):
                memory[key] = draw.choice([number for number in NUMBERS if number != memory.get(key)])
                lines.append(self._keys[key] + self._values[memory[key]] + self._stop)
            end: list[Part] = [(self._in_the_end, False)]
            for key in draw.sample(keys, KEYS):
                end += [(self._keys[key], False), (self._values[memory[key]], True), (self._stop, False)]
            places = sorted(draw.random() for _ in lines)
            yield self._episode(lines, places, end, length, draw)

    def needle(self, length: int, count: int, seed: int) -> Iterator[Episode]:
        """`count` episodes of needle retrieval, each of `length` tokens, the needle at every depth in turn.

        Raises:
            ValueError: an episode does not fit into `length`.
        """
        draw = random.Random(f"needle {seed}")
        for i in range(count):
            secret, number = f"The secret number of {draw.choice(CITIES)} is", draw.randrange(1000, 10_000)
            answer = self._encode(f" {number}")
            line = self._encode(f" {secret}") + answer + self._stop
            end = [(self._encode(f"\n\n{secret}"), False), (answer, True)]
            yield self._episode([line], [(i + 0.5) / count], end, length, draw)

    def shortest(self) -> int:
        """A length that every episode fits into."""
        longest = [max(map(len, words.values())) for words in (self._keys, self._values)]
        line = sum(longest) + len(self._stop)
        return len(self._start) + len(self._in_the_end) + (KEYS * WRITES + KEYS) * line

    def _episode(self, lines, places: list[float], end: list[Part], length: int, draw: random.Random) -> Episode:
        """The filler with each line at its place (0 to 1), then the end."""
        room = length - len(self._start) - sum(map(len, lines)) - sum(len(ids) for ids, _ in end)
        if room < 0:
            raise ValueError(f"recall does not fit into {length} tokens; it does into {self.shortest()}")
        first = draw.randrange(len(self._filler))
        filler = [self._filler[(first + i) % len(self._filler)] for i in range(room)]
        ids, done = list(self._start), 0
        for line, place in zip(lines, places):
            until = round(place * room)
            ids += filler[done:until] + line
            done = until
        ids += filler[done:]
        answers = []
        for part, is_answer in end:
            if is_answer:
                answers.append(range(len(ids), len(ids) + len(part)))
            ids += part
        return Episode(ids, answers)
