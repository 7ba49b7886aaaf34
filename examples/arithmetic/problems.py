"""Word problems of several steps with worked answers, and the tokenizer that reads them.

A problem is drawn as an expression such as ``14 + 5 - 7`` (worked from left to right, no value negative or
above a level's largest) and told as a story. The expression decides which side of the split it is on, so a
held-out question asks for a calculation that no training question asked for in any wording.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PEOPLE = {"Tom": "He", "Ben": "He", "Omar": "He", "Anna": "She", "Mia": "She", "Lucy": "She"}
THINGS = ("apples", "books", "coins", "eggs", "pens", "stamps")
EVENTS = {
    "+": (" {he} buys {n} more.", " {he} finds {n} more.", " {friend} brings {n} more."),
    "-": (" {he} loses {n}.", " {he} sells {n}.", " {he} gives {n} to {friend}."),
}
OPENING = "{name} has {n} {things}."
OPENING_PRODUCT = "{name} has {boxes} boxes of {each} {things}."
CLOSING = " How many {things} does {name} have now?"

# A token is a word, a digit, or a sign; a space belongs to what follows it, so decoding is plain joining.
TOKEN = r" ?(?:[A-Za-z]+|[0-9]|#+|[-+*=.;?])"
END, PADDING = "<end>", "<pad>"


@dataclass(frozen=True)
class Level:
    """How hard problems are.

    Args:
        steps: numbers of steps, each as likely as the others.
        largest: value that may occur.
        operand: largest number added or taken away.
    """

    steps: tuple[int, ...]
    largest: int
    operand: int


USUAL = Level(steps=(2, 3), largest=99, operand=9)


@dataclass(frozen=True)
class Problem:
    """A question, its worked answer (`` 14 + 5 = 19; 19 - 7 = 12; #### 12``) and the expression behind both."""

    question: str
    answer: str
    expression: str

    @property
    def held_out(self) -> bool:
        """Whether this expression is kept from training (one in five, whatever the order of drawing)."""
        return zlib.crc32(self.expression.encode()) % 5 == 0


def training_problems(seed: int, n: int, level: Level = USUAL) -> list[Problem]:
    """`n` problems to train on; a few may be the same."""
    return list(islice((problem for problem in _stream(seed, level) if not problem.held_out), n))


def held_out_problems(seed: int, n: int, level: Level = USUAL) -> list[Problem]:
    """`n` problems with distinct expressions, none of which is ever trained on."""
    found: dict[str, Problem] = {}
    for problem in _stream(seed, level):
        if len(found) == n:
            break
        if problem.held_out:
            found.setdefault(problem.expression, problem)
    return list(found.values())


def _stream(seed: int, level: Level) -> Iterator[Problem]:
    rng = random.Random(seed)
    while True:
        yield _draw(rng, level)


def _draw(rng: random.Random, level: Level) -> Problem:
    n_steps = rng.choice(level.steps)
    name, friend = rng.sample(sorted(PEOPLE), 2)
    words = {"name": name, "he": PEOPLE[name], "friend": friend, "things": rng.choice(THINGS)}
    worked: list[str] = []

    if rng.random() < 0.3:
        boxes, each = rng.randint(2, 9), rng.randint(2, 9)
        value, expression = boxes * each, f"{boxes} * {each}"
        question = OPENING_PRODUCT.format(boxes=boxes, each=each, **words)
        worked.append(f" {expression} = {value};")
    else:
        value = rng.randint(2, 90)
        expression = str(value)
        question = OPENING.format(n=value, **words)

    while len(worked) < n_steps:
        # Values stay within bounds: at either end only one sign is left.
        sign = "-" if value == level.largest else "+" if value == 0 else rng.choice("+-")
        n = rng.randint(1, min(level.operand, level.largest - value if sign == "+" else value))
        result = value + n if sign == "+" else value - n
        question += rng.choice(EVENTS[sign]).format(n=n, **words)
        worked.append(f" {value} {sign} {n} = {result};")
        value, expression = result, f"{expression} {sign} {n}"

    return Problem(question + CLOSING.format(**words), "".join(worked) + f" #### {value}", expression)


def final_result(answer: str) -> int | None:
    """The number after ``####``, or None: all that grading looks at."""
    found = re.search(r"#### (\d+)", answer)
    return int(found[1]) if found else None


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over exactly the pieces the problems are made of, digits one by one."""
    templates = (OPENING, OPENING_PRODUCT, CLOSING, *chain(*EVENTS.values()))
    plain = " ".join(re.sub(r"\{\w+\}", "", template) for template in templates)
    names = [piece for word in (*PEOPLE, *PEOPLE.values(), *THINGS) for piece in (word, f" {word}")]
    digits = [piece for digit in range(10) for piece in (str(digit), f" {digit}")]
    pieces = {*re.findall(TOKEN, plain), *names, *digits, " +", " -", " *", " =", ";", " ####"}
    vocabulary = {piece: i for i, piece in enumerate([PADDING, END, *sorted(pieces)])}

    core = Tokenizer(models.WordLevel(vocabulary))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PADDING,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
