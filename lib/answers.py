"""Do two answers mean the same?  A grammar for what people write into \\boxed{}, and equality by value.

Both answers are cut into TeX tokens (lib/tex.py), read with one grammar into small trees (section 1) and
compared by value (section 2, lib/values.py): exactly where all is rational, else to 45 digits and again to
130, functions at points that both trees choose.  What mathematics does not decide, rewards.CONVENTIONS does. 
Answers come from a policy that is paid for passing.  So text, depth, the size of numbers and the number of
evaluation steps are bounded, nothing is executed, and what cannot be read is equal only to itself. """
from __future__ import annotations

import decimal
import re
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from lib.bignum import DIGITS, MORE_DIGITS, Value, between, big, fraction, order, real_roots
from lib.tex import (ABOUT, BASES, FUNCTIONS, GROUPED, IS, MAX_CHARS, PARTS, POWERS, RELATIONS,
                     REMARKS, SAYINGS, STOP, TIMES, UNITS, Unreadable, bare, number, tokens)
from lib.values import (BIG, NOTHING, TEN, UNIT, Evaluator, children, conditions, entries, free_names,
                        infinite, inverse, label, last_place, mentions, real_set, rename, residue, unsigned)

MAX_DEPTH = 40                                            # of nesting

# -- 1. The tree -------------------------------------------------------------------------------------------
#
# A tree is a tuple: an operation and its arguments.  Leaves hold plain values, ("num", Fraction, decimal
# places shown) and ("name", "x"); other arguments that are tuples are trees: ("+", a, b),
# ("relation", "<= <", a, b, c), ...

_ACCENTS = "\\overline \\vec \\hat \\tilde \\mathbb \\mathcal".split()
_SIGNS = ("+", "-", "\\pm", "\\mp")
_LEVELS = (RELATIONS, ("\\cup", "\\cap", "\\setminus"), (":", "\\mod"), _SIGNS)
_RANK = {sign: rank for rank, level in enumerate(_LEVELS) for sign in level}
_OPENERS = {*"( [ { \\{ \\frac \\surd \\lfloor \\lceil".split(), *_ACCENTS, *BIG}
_OPENERS |= {"\\" + name for name in FUNCTIONS.values()}
_ENDS = {"", *", + - * / ^ ) } ] = < > <= \\} &".split()}                    # what follows most operands
_PLAIN = re.compile(r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?", re.A)

HALF = ("num", Fraction(1, 2), 0)
_CHANGES = {"factorial": lambda node: ("!", node)}        # words that calculate
_CHANGES |= {word: lambda node, n=n: ("*", node, number(str(n))) for word, n in TIMES.items()}
_CHANGES |= {word: lambda node, n=n: ("*", node, inverse(n)) for word, n in PARTS.items()}
_CHANGES |= {word: lambda node, n=n: ("^", node, number(str(n))) for word, n in POWERS.items()}

class Parser:
    """Recursive descent, one method per precedence level.  Sums and products are flat: only nesting costs
    depth."""

    def __init__(self, found: list[str]):
        self.tokens, self.at, self.depth, self.in_bars = [*found, "", "", "", ""], 0, 0, False
        self.branch, self.forked = 1, False               # the sign that \pm stands for; was there any?
        self.raised = False                               # in an exponent without braces: no words, no n!
        self.unit_end = -1                                # index after the last unit: no factor may follow it

    @property
    def next(self) -> str:
        return self.tokens[self.at]

    @property
    def word(self) -> str:
        """The next token, if it is a word of prose."""
        return self.next[1:].lower() if self.next[:1] == '"' else ""

    def ahead(self, *wanted: str) -> bool:
        """Consume these tokens, if they come next."""
        found = tuple(self.tokens[self.at:self.at + len(wanted)]) == wanted
        self.at += len(wanted) * found
        return found

    def take(self, *wanted: str) -> str:
        """Consume the next token if it is one of `wanted`, else return ''."""
        return self.advance() if self.tokens[self.at] in wanted else ""

    def advance(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def fail(self):
        raise Unreadable(f"unexpected {self.next!r}")

    def items(self, fork: bool = False) -> tuple:
        """Answers between commas and words, as a list; one is itself.  'or' and ';' divide more than ',' and
        'and'.  With `fork`, an item with plus-minus in it is read once for each sign."""
        groups, before = [[]], self.forked
        while True:
            start, saved, self.forked = self.at, self.tokens[:] if fork else [], False
            groups[-1].append(self.item())
            if fork and self.forked:
                self.at, self.tokens, self.branch = start, saved, -1
                groups[-1].append(self.item())
                self.branch, self.forked = 1, False
            before |= self.forked
            separator = self.take(",", ";", "\\and", "\\or")
            if not separator or self.next in ("&", "\\\\") or self.remark():
                break
            if (self.take("\\and", "\\or") or separator) in ("\\or", ";"):   # "1, 2, or 3"
                groups.append([])
        self.forked = before
        lists = [("list", ",", *group) if len(group) > 1 else group[0] for group in groups]
        return ("list", "\\or", *lists) if len(lists) > 1 else lists[0]

    def item(self) -> tuple:
        """One answer, perhaps after 'The area is', 'about', '=', and before '..., where k is an integer'."""
        self.take("=", "\\approx")
        if self.next[:1] != '"':
            return self.closed(self.level())
        start, said = self.at, []
        while self.word:
            said.append(self.advance()[1:].lower())
        clear = bool(said) and not set(said) & (STOP - IS - ABOUT)
        if clear and self.next and (said[-1] in IS or set(said) <= ABOUT or self.take(":")):
            self.take(":")
            return self.item()
        saying = SAYINGS.get(" ".join(said).rpartition(" except")[0])
        if saying and self.next:
            return "\\setminus", ("name", saying), _set(self.items(True))
        node = self.level() if clear and self.starts_operand() else ()
        if node[:2] == ("relation", "=") and label(node[2]):                 # "Area of ABC = 12"
            return node
        self.at = start
        return self.closed(self.level())

    def closed(self, node: tuple) -> tuple:
        """An answer with the words that follow it."""
        if self.word in ("even", "odd"):                  # n is even
            parity = number("1" if self.advance() == '"odd' else "0")
            return "relation", "\\equiv", node, ("\\mod", parity, number("2"))
        self.remark()
        return node

    def remark(self) -> bool:
        """Skip ', for all integers k' and ', where ...' at the end of an answer."""
        quantifier = self.tokens[self.at + 1][1:] in ("all", "any", "some", "every", "each")
        quantified = self.word == "where" or self.word == "for" and quantifier
        if quantified and not self.depth:
            self.at = len(self.tokens) - 4
        return quantified

    def level(self, lowest: int = 0) -> tuple:
        """Binary operators by precedence climbing, from relations (rank 0) to sums (3); one rank makes one
        node."""
        left = self.term()
        while (rank := self.rank()) >= lowest:
            parts, signs = [left], []
            while self.rank() == rank:
                signs.append(self.advance())
                part = self.level(rank + 1)
                parts.append(("neg", part) if rank == 3 and self.minus(signs[-1]) else part)
            if rank == 0:
                left = _relation(signs, parts)
            elif rank == 3 and signs == ["-"] and part[:2] == ("list", "{}"):                 # R - {0}
                left = "\\setminus", left, part
            elif rank == 3:
                left = ("+", *parts)
            else:
                parts = [_set(p) if rank == 1 and p[0] in ("num", "neg") else p for p in parts]
                left = (signs[0], *parts) if len(set(signs)) == 1 else self.fail()
        return left

    def rank(self) -> int:
        token = self.tokens[self.at]
        if token == "|":
            return 0 if self.lone_bar() else -1
        return -1 if self.in_bars and token in (":", "\\mid") else _RANK.get(token, -1)

    def lone_bar(self) -> bool:
        """Whether a bar stands alone, as in P(A|B)."""
        return not self.in_bars and "|" not in self.tokens[self.at + 1:]

    def minus(self, sign: str) -> bool:
        self.forked |= sign in ("\\pm", "\\mp")
        return sign == "-" or sign == ("\\mp" if self.branch > 0 else "\\pm")

    def term(self) -> tuple:
        """Factors with or without a sign between them.  A number stands only after what is closed: 3!7!."""
        factors = [self.signed()]
        while True:
            last = factors[-1]
            if self.take("*"):
                factors.append(self.signed())
            elif self.take("/"):
                factors.append(("inverse", self.signed()))
            elif not self.starts_operand():
                return _product(factors)
            elif self.unit_end == self.at:
                self.fail()
            elif self.ahead("x", "10", "^"):              # 1.5 x 10^3
                self.at -= 2
                factors.append(self.power())
            elif last[0] in ("num", "neg") and (self.next[:1].isdigit() or self.next == "\\frac"):
                factors[-1] = self.mixed(last)
            elif self.next[:1].isdigit() and last[0] == "name" and self.tokens[self.at + 1] != "^":
                self.fail()                               # x2 is no 2x; x 2^n is
            else:
                factors.append(self.power())
                if factors[-1][:2] == ("relation", "\\in"):                  # 2 pi n (n in Z)
                    factors.pop()

    def mixed(self, before: tuple) -> tuple:
        """A number and a fraction: 1 1/2 is a sum, 3\\frac{x}{2} a product; other numbers side by side are
        none."""
        whole, plain = before[1] if before[0] == "neg" else before, self.next != "\\frac"
        fraction = self.primary()
        if plain:
            fraction = ("*", fraction, ("inverse", self.primary())) if self.take("/") else self.fail()
        top, bottom = fraction[1], fraction[2][1]
        numbers = whole[0] == top[0] == bottom[0] == "num" and whole[2] == top[2] == bottom[2] == 0
        if not numbers or top[1] >= bottom[1]:
            return self.fail() if plain else ("*", before, self.power(fraction))
        value = self.postfix(("+", whole, fraction))
        return ("neg", value) if before[0] == "neg" else value

    def starts_operand(self) -> bool:
        token = self.tokens[self.at]
        if token in _ENDS:
            return False
        if token == "|":
            return not self.in_bars and not self.lone_bar()
        letter = token[:1].isalnum() or token[:1] == '"' and len(token) == 2
        return letter or token in _OPENERS or token[:7] == "\\begin{"

    def signed(self) -> tuple:
        negative = False
        while sign := self.take(*_SIGNS):
            negative ^= self.minus(sign)
        return ("neg", self.power()) if negative else self.power()

    def power(self, node: tuple | None = None) -> tuple:
        self.depth += 1
        depth, node = self.depth, self.postfix(node or self.primary())
        while self.take("^"):
            self.depth += 1
            if node[0] == "name" and node[1].startswith("blackboard"):       # Z^+
                node = "name", node[1] + self.raw_argument()
            elif node[0] in ("matrix", "sequence") and self.take("T"):
                rows = [row[1:] for row in node[1:]] if node[0] == "matrix" else [node[2:]]
                node = "matrix", *(("row", *column) for column in zip(*rows))
            else:
                before, self.raised = self.raised, self.next[:1].isdigit() or self.next in _SIGNS
                exponent = self.signed() if self.raised else self.argument()
                self.raised = before
                counted = re.fullmatch(r"C_(\d+|n|m)", node[1]) if node[0] == "name" else None
                if counted and exponent[0] in ("num", "name"):               # C_8^3
                    node = "call", "binom", parse(counted[1], False), exponent
                else:
                    node = self.postfix(("^", node, exponent))
        self.depth = depth - 1
        return node

    def postfix(self, node: tuple) -> tuple:
        """The suffixes of an operand: factorials, percent, degrees, primes, indices and units."""
        if self.next in _ENDS or node[0] == "text" or self.raised:
            return node
        for _ in range(4):                                # 9!!!!!!! is no answer
            if self.take("!"):
                node = "!!" if self.take("!") else "!", node
            elif sign := self.take("%", "\\degree"):
                node = "%" if sign == "%" else "degrees", node
            elif node[0] == "name" and self.take("'"):
                node = "name", node[1] + "'"
            elif node[0] in ("name", "num", "digits") and self.take("_"):
                node = self.index(node)
            elif node[0] == "degrees" and self.take("C", "F", '"C', '"F'):
                continue
            else:
                break
        return self.quantity(node)

    def index(self, node: tuple) -> tuple:
        """x_1 is a name, 4210_5 a number in another base."""
        tag = self.raw_argument().replace('"', "")
        if node[0] == "name":
            return "name", f"{node[1]}_{tag}"
        base = BASES.get(tag.lower(), tag)
        if not re.fullmatch("[2-9]|[12][0-9]|3[0-6]", base) or node[0] == "num" and node[1].denominator != 1:
            self.fail()
        return node if base == "10" and node[0] == "num" else ("base", str(node[1]).lower(), int(base))

    def quantity(self, node: tuple) -> tuple:
        """Words after a value.  Multipliers change it; a product or quotient of units, and nouns, drop."""
        while self.word in _CHANGES:
            node = _CHANGES[self.advance()[1:].lower()](node)
        if self.ahead('"out', '"of'):
            return "*", node, ("inverse", self.power())
        if self.word in ("am", "pm") and (node[0] == "clock" or node[0] == "num" and node[1] in range(1, 13)):
            hours = node[1] if node[0] == "clock" else 3600 * int(node[1])
            return "clock", hours % 43_200 + 43_200 * (self.advance() == '"pm'), True, node
        self.at += self.word == "is" and self.tokens[self.at + 1] in ('"even', '"odd')
        start = self.at
        while self.at - start < 16 and self.unit(self.at > start):
            self.unit_end = self.at
        return self.fail() if self.word and len(self.word) > 1 and self.word not in REMARKS else node

    def unit(self, more: bool) -> bool:
        """Consume one unit or noun, `more`: perhaps after a sign."""
        at = self.at + (more and self.next in ("*", "/"))
        token = self.tokens[at]
        word = token[1:] if token[:1] == '"' else ""
        if word.lower() in STOP and not (more and word in POWERS):
            return False
        if token == "\\frac" and self.tokens[at + 2][:1] == '"' and self.tokens[at + 2][1:] in UNITS:
            self.at = at + 1
            return bool(self.raw_argument() and self.raw_argument())
        seconds = token in ("\\min", "\\sec") and self.tokens[at + 1] in ("", ",", "\\and", ")")
        article = more and word == "a" and self.tokens[at + 1][:1] == '"'
        if not (len(word) > 1 or word in UNITS or article or seconds or at > self.at and token in ("h", "s")):
            return False
        self.at = at + 1
        if self.take("^"):
            self.argument()
        return True

    def argument(self) -> tuple:
        """A TeX argument: a group in braces, one digit, one letter or one command."""
        if len(self.next) > 1 and self.next.isdigit():
            digit, self.tokens[self.at] = self.next[0], self.next[1:]
            return number(digit)
        return self.primary()

    def raw_argument(self) -> str:
        """A TeX argument as it stands, not read: an index, the range of a sum."""
        start, depth = self.at, 0
        if self.next.isdigit():
            return str(self.argument()[1])
        while self.at == start or depth > 0:
            depth += {"{": 1, "}": -1, "": 99}.get(self.next, 0)
            if depth > 9:                                 # the text ends before the brace does
                self.fail()
            self.at += 1
        return "".join(self.tokens[start:self.at]).strip("{}")

    def primary(self) -> tuple:
        token = self.advance()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        if token[:1].isalpha():
            node = self.name(token)
        elif token[:1] == '"':
            node = self.words(token[1:])
        elif token[:1].isdigit():
            node = self.decimal(token)
        elif token[1:] in FUNCTIONS and not (token == "\\sqrt" and self.next == "["):
            node = self.function(token[1:])
        else:
            node = self.command(token)
        self.depth -= 1
        return node

    def name(self, token: str) -> tuple:
        """A letter; f(x+1) is no product, and C(8,3) counts."""
        counted = r"\( (\d+|[a-z]) , (\d+|[a-z]) \)"
        if token in ("f", "g", "h") and self.next == "(":
            inside = self.primary()
            return "call", token, *(inside[2:] if inside[0] == "sequence" else [inside])
        if token == "C" and re.fullmatch(counted, " ".join(self.tokens[self.at:self.at + 5])):
            return "call", "binom", *self.primary()[2:]
        return "name", token

    def decimal(self, text: str) -> tuple:
        """An integer, a decimal, a repeating decimal 0.8\\overline{4}, 0.8(4) or 0.8444..., a time."""
        if ":" in text:
            parts = text.split(":")
            seconds = sum(int(part) * size for part, size in zip(parts, (3600, 60, 1)))
            return "clock", seconds, False, (":", *map(number, parts))
        if "(" in text:
            text, repeated = text[:-1].split("(")
        elif not _PLAIN.fullmatch(text):
            return "digits", text
        elif "." in text and self.take("\\overline"):
            repeated = self.raw_argument()
        elif self.next == "dots" and (cycle := re.fullmatch(r"(\d*\.\d*?)(\d{1,20}?)\2+", text)):
            self.at += 1
            text, repeated = cycle[1], cycle[2]
        else:
            return number(text)
        if not re.fullmatch("[0-9]{1,99}", repeated):
            self.fail()
        ninths = (10 ** len(repeated) - 1) * 10 ** len(text.split(".")[1])
        return "num", number(text)[1] + Fraction(int(repeated), ninths), 0

    def words(self, said: str) -> tuple:
        while self.word:
            said += " " + self.advance()[1:]
        if len(said) == 1 or said.lower() in SAYINGS:
            return "name", SAYINGS.get(said.lower(), said)
        if self.next == "(" and len(said) < 5:            # Var(X)
            return "*", ("text", said), self.primary()
        return self.fail() if self.starts_operand() else ("text", said)

    def function(self, name: str) -> tuple:
        base, exponent, digits = TEN if name == "lg" else None, None, ""
        if self.take("_"):
            digits, base = self.next, self.argument()
        if len(digits) > 1 and digits.isdigit() and self.tokens[self.at + 1][:1].isalnum():  # log_10 1000
            base, self.at = number(digits), self.at + 1
        if self.take("^"):
            exponent = self.argument()
        if name == "binom" and self.next != "(":
            inside = "list", "", self.argument(), self.argument()
        elif name in ("sqrt", "cbrt") or self.next in ("(", "{", "["):
            inside = self.argument()
        elif name in ("max", "min", "det") and not self.starts_operand():
            return "name", name
        else:                                             # sin 2x
            factors = [self.signed()]
            while self.starts_operand() and self.next[1:] not in FUNCTIONS and self.next not in ("(", "["):
                factors.append(self.power())
            inside = _product(factors)
        if exponent == ("neg", UNIT):
            name, exponent = "arc" + name, None
        arguments = inside[2:] if inside[0] in ("list", "sequence") and inside[1] != "[]" else (inside,)
        node = "call", "log" if name == "lg" else name, *arguments
        if name in ("sqrt", "cbrt"):
            node = "^", inside, HALF if name == "sqrt" else inverse(3)
        if base is not None and name in ("log", "lg"):
            node = "*", node, ("inverse", ("call", "log", base))
        return node if exponent is None else ("^", node, exponent)

    def group(self, *closers: str) -> tuple:
        """What stands before the next of `closers`.  Inside of bars and set braces a bar or colon ends it."""
        raised, self.raised, bars = self.raised, False, self.in_bars
        self.in_bars = closers[0] in ("|", "\\}") or bars and closers[0] == "}"
        node = self.items(closers[0] == "\\}")
        if closers == ("\\}",) and self.take("|", ":", "\\mid"):            # {x | 2 < x < 3} is its condition
            node = self.items()
        if closers == ("}",) and self.take("\\choose"):
            node = "call", "binom", node, self.items()
        self.in_bars, self.raised = bars, raised
        return node if self.take(*closers) else self.fail()

    def command(self, token: str) -> tuple:
        if token in ("(", "["):
            node = self.group(")", "]")
            if node[0] != "list" or conditions(node):
                return node if token + self.tokens[self.at - 1] in ("()", "[]") else self.fail()
            if all(item[:2] == ("sequence", "[]") and len(item) == len(node[2]) for item in node[2:]):
                return "matrix", *(("row", *item[2:]) for item in node[2:])  # [[1,2],[3,4]]
            return "sequence", token + self.tokens[self.at - 1], *node[2:]
        if token == "{":
            if not self.ahead("}", "_"):
                return self.group("}")
            top = self.argument()                         # {}_n C_k
            return ("call", "binom", top, self.argument()) if self.ahead("C", "_") else self.fail()
        if token == "\\{":
            node = NOTHING if self.take("\\}") else self.group("\\}")
            if node[0] == "relation" or node == NOTHING or conditions(node) or node[:2] == ("list", "\\or"):
                return node
            return _set(node)
        if token == "|":
            node = self.group("|")
            return "call", "det" if node[0] == "matrix" else "abs", node
        if token in ("\\lfloor", "\\lceil"):
            return "call", token[2:], self.group("\\r" + token[2:])
        if token == "\\frac":
            return "*", self.argument(), ("inverse", self.argument())
        if token == "\\sqrt" and self.take("["):
            index = self.group("]")
            return "^", self.argument(), ("inverse", index)
        if token == "\\surd":
            return "^", self.primary(), HALF
        if token in BIG:
            return self.big(token)
        if token in _ACCENTS:
            start, raw = self.at, self.raw_argument()
            if token == "\\overline" and re.search(r"[\di]", raw):           # a conjugate
                self.at = start
                return "call", "conj", self.argument()
            return "name", ("blackboard" if token == "\\mathbb" else token) + " " + raw
        if token[:7] == "\\begin{":
            return self.environment(token)
        self.at -= 1
        return self.fail()

    def big(self, token: str) -> tuple:
        """Sums and products between numbers have a value; others, limits, integrals are equal to the same
        only."""
        start, saved = self.at, self.tokens[:]
        if token in ("\\sum", "\\prod") and self.take("_"):
            low = self.argument()
            if low[:2] == ("relation", "=") and len(low) == 4 and low[2][0] == "name" and self.take("^"):
                high = self.argument()
                if not free_names(low[3]) | free_names(high) and not infinite(high):
                    return token, low[2], low[3], high, self.term()
            self.at, self.tokens = start, saved
        ranges = [self.raw_argument() if self.take(mark) else "" for mark in ("_", "^")]
        return token, " ".join(ranges), self.term()

    def environment(self, name: str) -> tuple:
        """Matrices by rows; cases with conditions are a function; other environments are lists of their
        rows."""
        rows: list[list] = [[]]
        if "array" in name:                               # its column format
            self.raw_argument()
        while not self.take(name.replace("begin", "end")):
            if self.take("\\\\"):
                rows.append([])
            elif not self.take("&") or self.next not in ("\\\\", "&"):
                self.at += self.word in ("if", "when", "for")
                other = self.take('"otherwise', '"else')
                rows[-1].append(("name", "otherwise") if other else self.items(True))
                if self.next[:5] not in ("&", "\\\\", "\\end{") and self.word not in ("if", "when", "for"):
                    self.fail()
        rows = [row for row in rows if row] or self.fail()
        matrix = "matrix", *(("row", *row) for row in rows)
        if "vmatrix" in name:
            return "call", "det", matrix
        if re.search("matrix|array", name):
            return matrix
        if "cases" in name and all(len(row) == 2 for row in rows):
            return "cases", *(("case", *row) for row in rows)
        return "list", ",", *sum(rows, [])

def _set(node: tuple) -> tuple:
    return "list", "{}", *(node[2:] if node[0] == "list" else [node])

def _product(factors: list[tuple]) -> tuple:
    """A product; one with a matrix in it multiplies the entries."""
    plain = [node[1] if node[0] == "neg" else node for node in factors]
    at = [n for n, node in enumerate(plain) if node[0] == "matrix"]
    if len(at) != 1 or plain == factors and len(factors) == 1:
        return ("*", *factors) if len(factors) > 1 else factors[0]
    scale = factors[:at[0]] + factors[at[0] + 1:] + [("neg", UNIT)] * (plain[at[0]] is not factors[at[0]])
    return "matrix", *(("row", *(("*", *scale, entry) for entry in row[1:])) for row in plain[at[0]][1:])

def _relation(signs: list[str], sides: list[tuple]) -> tuple:
    """A chain, its inequality signs turned to point left (3 > x is x < 3), without a remark 'approximately
    ...'."""
    if "\\approx" in signs[:1] and label(sides[0]):       # x \approx 3.14
        signs[0] = "="
    cut = [*signs, "\\approx"].index("\\approx")
    signs, sides = signs[:cut], sides[:cut + 1]
    if signs and signs[0][0] == ">":
        signs, sides = [sign.replace(">", "<") for sign in signs[::-1]], sides[::-1]
    if signs == ["="] and sides[1][0] == "name" and not label(sides[0]):      # 5 = x
        sides = sides[::-1]
    return ("relation", " ".join(signs), *sides) if signs else sides[0]

@lru_cache(maxsize=128)                                   # golds come back with every sample
def parse(text: str, grouped: bool) -> tuple:
    """The tree of an answer; ("unreadable", why) for what is none.  `grouped`: is 1,000 one number or two?"""
    try:
        parser = Parser(tokens(text, grouped))
        node = parser.items(True)
        return parser.fail() if parser.next else node
    except Unreadable as error:
        return "unreadable", str(error)

# -- 2. Equality -------------------------------------------------------------------------------------------

_INTEGERS = ("blackboard Z", "Z", "blackboard N", "N", "blackboard Z+")

class Judge(Evaluator):
    """One comparison, and the rule that decided it."""

    rule = "different values"

    def by(self, rule: str, verdict: bool = True) -> bool:
        self.rule = rule
        return verdict

    def same(self, a: tuple, b: tuple) -> bool:
        """Are the two trees the same answer, b the gold?  Sets self.rule; no value where one is needed is
        no."""
        self.spend(1)
        if a == b:
            return self.by("same expression")
        sets = self.same_set(a, b)
        self.given = {}
        if sets is not None:
            return sets
        left, right = alternatives(a), alternatives(b)
        if len(left) > 1 or len(right) > 1:
            if left[0][0] == "record" and len(left) == 1 and not any(map(named, right)):
                left = [value for _, value in left[0][1:]]                   # named values for a bare list
            elif right[0][0] == "record" and len(right) == 1 and not any(map(named, left)):
                return self.same_record(right[0], left, True)                # a bare list for named values
            return self.same_list(left, right)
        a, b = left[0], right[0]
        if "record" in (a[0], b[0]):
            record, other = (a, b) if a[0] == "record" else (b, a)
            return self.same_record(record, other if other[0] == "record" else entries(other), record is b)
        if residue(a) and residue(b):
            (x, r, m), (y, s, n) = residue(a), residue(b)
            congruent = "relation", "\\equiv", r, ("\\mod", s, m)
            return x == y and self.same_value(m, n) and self.holds(congruent) and self.by("same residue")
        if "relation" in (a[0], b[0]):
            return self.same_relation(a, b)
        as_written = a[0] in BIG and len(a) == len(b) == 3
        if a[0] == b[0] and (as_written or a[0] in ("sequence", "matrix", "row", "case")):
            brackets = [[x for x in node if type(x) is str] for node in (a, b)]
            return brackets[0] == brackets[1] and self.in_order(children(a), children(b))
        if entries(a) and entries(b):
            return self.in_order(entries(a), entries(b))
        if a[0] == b[0] == "name":
            return self.by("different names", False)
        if "base" in (a[0], b[0]) or infinite(a) or infinite(b):
            return self.by("infinity or base", infinite(a) == infinite(b) != 0)
        if a[0] == b[0] == "clock" and self.same_time(a, b):
            return self.by("same time")
        try:
            return self.same_number(a, b)
        except ArithmeticError as error:
            self.rule = f"no value: {error}"
        return a[0] == b[0] == "cases" and self.same_list(list(a[1:]), list(b[1:]))

    def same_time(self, a: tuple, b: tuple) -> bool:
        """8:34 pm and 20:34:00.  Beside one with am or pm a time before 13 o'clock without them may be
        either."""
        either = a[2] != b[2] and (b if a[2] else a)[1] < 13 * 3600
        return (a[1] - b[1]) % (43_200 if either else 86_400) == 0

    def same_number(self, a: tuple, b: tuple) -> bool:
        if a[0] == b[0] == ":" and len(a) == len(b) > 3:
            return all(self.same_value(("*", x, b[1]), ("*", y, a[1])) for x, y in zip(a[1:], b[1:]))
        if self.same_value(a, b):
            return True
        for sign, rule in (("%", "percent sign dropped"), ("degrees", "degrees in radians")):
            if (a[0] == sign) != (b[0] == sign) and not free_names(a) | free_names(b) and self.same_value(
                    unsigned(a, sign), unsigned(b, sign)):
                return self.by(rule)
        return False

    def same_value(self, a: tuple, b: tuple) -> bool:
        """Numbers by their value, functions at points that both trees choose."""
        if free_names(a) | free_names(b):
            return self.same_function(a, b)
        x, y = self.value(a), self.value(b)
        if isinstance(x, Fraction) and isinstance(y, Fraction) and x == y:
            return self.by("equal exactly")
        if order(x, y) == 0:
            self.price = 4
            with decimal.localcontext(MORE_DIGITS):       # (e^{110} + 1) / e^{110} is not 1
                return order(self.value(a), self.value(b)) == 0 and self.by("equal to 130 digits")
        return (self.rounds_to(a, y) or self.rounds_to(b, x)) and self.by("decimal agrees in all its digits")

    def rounds_to(self, node: tuple, exact: Value) -> bool:
        """Is a decimal literal the exact value, rounded or cut to the digits that it shows, at least 9, or
        the nearest double?  A value that ends has to be written as it is."""
        if not last_place(node) or big(exact).im:
            return False
        value, last, rest = self.value(node), self.value(last_place(node)), exact
        if not isinstance(value, Fraction) or not isinstance(last, Fraction):
            return False
        value, exact = abs(value), fraction(exact) * (1 if value > 0 else -1)
        if value < last * 10 ** 8 or exact <= 0:
            return False
        double = value >= last * 10 ** 15 and exact < 10 ** 300 and Fraction(repr(float(exact))) == value
        ends = isinstance(rest, Fraction) and 10 ** 400 % rest.denominator == 0
        return not ends and (abs(exact - value) <= last / 2 or 0 <= exact - value < last or double)

    def same_function(self, a: tuple, b: tuple) -> bool:
        """Schwartz-Zippel: equal at several random points is equal, if no kind of point is left out.  Points
        with real values decide where there are two; where |...| is written, also which points have one."""
        strict, real, complex_ = mentions(a, ("abs",)) or mentions(b, ("abs",)), 0, 0
        for at_edge in self.points(a, b):
            found = []
            for node in (a, b):
                self.strayed = False
                try:
                    found.append((self.value(node), self.strayed))
                except ArithmeticError:
                    found.append((None, True))
                    self.spend(1)
            (x, left), (y, right) = found
            if strict and left != right and self.point not in (2, 3):
                return self.by("one has a value where the other has none", False)
            if x is None or y is None:
                continue
            rounding = at_edge and type(x) != type(y) and abs(big(x) - big(y)) < Decimal("1e-40")
            equal = rounding or order(x, y) == 0
            if left or right or big(x).im or big(y).im:
                complex_ += 1 if equal else -99
            elif not equal:
                return self.by("different values", False)
            else:
                real += 1
        return (real > 1 or complex_ > 1) and self.by(f"equal at {max(real, complex_)} random points")

    def same_set(self, a: tuple, b: tuple) -> bool | None:
        """Do two sets of real numbers agree at every end point, between and beyond them?  None if they are no
        such sets.  A relation that is not solved gives its roots as end points if it is a polynomial.  If it
        is none, its sides must be equal, or have a pole, at the other's end points, and it is tried at more
        numbers."""
        one, two = real_set(a), real_set(b)
        if not one or not two or a[0] == b[0] == "sequence" or len(one[0] | two[0]) > 1:
            return None
        (unknown,) = one[0] | two[0] or {("name", "x")}
        if unknown[0] != "name":                          # 0 < f(x) < 1
            return self.same_set(*(rename(node, unknown, ("name", "the unknown")) for node in (a, b)))
        ends = [end for end in one[1] + two[1] if not infinite(end)]
        for self.point in (1, 4) if any(map(free_names, ends)) else (0,):    # other names are parameters
            values, unsolved = [self.value(end) for end in ends], []
            for hidden in one[2] + two[2]:
                sides = [("+", x, ("neg", y)) for x, y in zip(hidden[2:], hidden[3:])]
                solved = [self.polynomial(side, unknown[1]) for side in sides]
                unsolved += [hidden] * (None in solved)
                values += [x for c in solved if c for x in real_roots(c)]
            if len(unsolved) > 1:
                return None
            probes = values + between(values)
            if unsolved:
                steps = [sign * Fraction(3) ** n for sign in (1, -1) for n in range(-2, 6)]
                probes += [fraction(x) + step for x in probes[:12] for step in steps]
            for n, self.given[unknown[1]] in enumerate(probes):
                if unsolved and n < len(values) and not self.is_end(unsolved[0]):
                    return None
                if self.holds(a, probes[n]) != self.holds(b, probes[n]):
                    return self.by("different sets of numbers", False)
        return self.by("the same set of numbers")

    def is_end(self, relation: tuple) -> bool:
        try:
            sides = [self.value(side) for side in relation[2:]]
        except ArithmeticError:
            return True
        return 0 in map(order, sides, sides[1:])

    def in_order(self, left: list, right: list) -> bool:
        same = len(left) == len(right) > 0 and all(map(self.same, left, right))
        return self.by("entries match in order" if same else "an entry differs", same)

    def same_list(self, left: list[tuple], right: list[tuple]) -> bool:
        """Multisets.  Equality is nearly transitive, so the first partner found is as good as any."""
        written = Counter(left) & Counter(right)          # the same in both: no search
        left, right = (list((Counter(items) - written).elements()) for items in (left, right))
        for item in left if len(left) == len(right) else [None]:
            partner = next((i for i, other in enumerate(right) if item and self.same(item, other)), None)
            if partner is None:
                return self.by("a list item has no partner", False)
            right = right[:partner] + right[partner + 1:]
        return self.by("lists match item by item")

    def same_record(self, record: tuple, other: tuple | list, gold: bool) -> bool:
        """Named values: by name against others, else in the order of the alphabet or, if gold, in their
        own."""
        named = dict(record[1:])
        if other and other[0] == "record":
            values = dict(other[1:])
            return set(named) == set(values) and all(self.same(named[name], values[name]) for name in named)
        orders = (sorted(named, key=str), list(named) if gold else [])
        return any(self.in_order([named[name] for name in names], list(other)) for names in orders)

    def same_relation(self, a: tuple, b: tuple) -> bool:
        if a[0] != b[0]:
            (_, signs, *sides), other = (a, b) if a[0] == "relation" else (b, a)
            if signs == "\\in":
                return label(sides[0]) and self.same(sides[1], other)
            if set(signs.split()) != {"="}:
                return False
            stated = all(label(side) or self.same(side, sides[-1]) for side in sides[:-1])
            if stated and self.same(sides[-1], other):    # 'name = ... = value'; 4 = 3 states nothing
                return True
            given = free_names(("+", *sides)) - free_names(other)            # x + y = 1 gives 1 - x
            return len(sides) == 2 and len(given) == 1 and bool(free_names(other)) and self.proportional(
                ("relation", "=", *sides), ("relation", "=", ("name", *given), other))
        (*f, x), (*g, y) = a[2], b[2]                     # f(t) = t + 1, f(x) = x + 1
        names = type(x) is type(y) is tuple and x[0] == y[0] == "name" and x[1] not in free_names(b)
        if a[1] == b[1] == "=" and f == g and names:
            b = rename(b, y, x)
        if a[1] == b[1] and all(map(self.same, a[2:], b[2:])):
            return self.by("same relation")
        if a[1] == b[1] and a[1] in ("=", "<", "<=", "!="):
            return self.proportional(a, b)
        return a[1][:1] == b[1][:1] == "=" and a[2] == b[2] and (
            self.same_relation(a, b[-1]) and self.same_relation(b, a[-1]))

    def proportional(self, a: tuple, b: tuple) -> bool:
        """Is left - right of one relation k times that of the other, k != 0 (for inequalities k > 0)?"""
        ratios, (f, g) = [], (("+", n[2], ("neg", n[3])) for n in (a, b))
        for self.point in range(4 if free_names(f) and free_names(f) == free_names(g) else 0):
            try:
                ratios.append(big(self.value(f)) / big(self.value(g)))
            except ArithmeticError:
                continue
        return (len(ratios) >= 3 and abs(ratios[0]) > 0 and all(order(r, ratios[0]) == 0 for r in ratios)
                and (a[1] == "=" or ratios[0].re > 0) and self.by("relations up to a factor"))

def alternatives(node: tuple) -> list[tuple]:
    """The normal form of solutions: the alternatives of an answer, each a tree or ("record", (name, value),
    ...). Different names belong together, one that comes again begins the next alternative, 'n = 1, 2' names
    both."""
    if node[:2] in (("relation", "\\in"), ("relation", "=")) and label(node[2]) and finite(node[3]):
        inside = alternatives(node[3])
        if node[2][0] != "sequence":
            return inside
        return [item for v in inside for item in alternatives(("relation", "=", node[2], v))]
    if node[0] != "list" and finite(node):
        first, *others = map(alternatives, children(node))
        kept = {"\\cup": first + sum(others, []), "\\cap": [x for x in first if all(x in o for o in others)],
                "\\setminus": [x for x in first if not any(x in o for o in others)]}[node[0]]
        return list(dict.fromkeys(kept)) or [NOTHING]
    if node[0] != "list":
        paired = named(node) and node[2][0] == node[3][0] == "sequence" and len(node[2]) == len(node[3])
        return [("record", *zip(node[2][2:], node[3][2:]))] if paired else [node]
    if node[1] == "\\or":
        return [item for part in node[2:] for item in alternatives(part)]
    remarks = [item[:2] == ("relation", "\\in") and item[3][-1] in _INTEGERS for item in node[2:]]
    items = [item for item, remark in zip(node[2:], remarks) if not remark] or list(node[2:])
    names = [named(item) for item in items]
    if names[0] and not any(names[1:]):
        items[1:] = [("relation", "=", names[0], item) for item in items[1:]]
    elif all(names):
        size = names.index(names[0], 1) if names[0] in names[1:] else len(names)
        chunks = [items[n:n + size] for n in range(0, len(items), size)]
        if size > 1 and all(len({*names[:size], *map(named, c)}) == size == len(c) for c in chunks):
            return [("record", *((item[2], item[3]) for item in chunk)) for chunk in chunks]
    return [one for item in progression(items) for one in alternatives(item)]

def finite(node: tuple) -> bool:
    """Is it a list or a union, intersection or difference of lists?"""
    sets = node[0] in ("\\cup", "\\cap", "\\setminus") and all(map(finite, children(node)))
    return node[0] == "list" and not conditions(node) or sets

def named(node: tuple) -> tuple | None:
    """The left side of 'name = value'."""
    return node[2] if node[:2] == ("relation", "=") and label(node[2]) else None

def progression(items: list[tuple]) -> list[tuple]:
    """1, 2, 3, ..., 9 as 1, 2, ..., 9."""
    at = items.index(("name", "dots")) if ("name", "dots") in items else 0
    numbers = [item[1] for item in items[:at] if item[0] == "num"]
    steps = {y - x for x, y in zip(numbers, numbers[1:])}
    return items[:2] + items[at:] if at > 2 and len(numbers) == at and len(steps) == 1 else items

def equal_by_value(answer: str, gold: str, grouped: bool = True) -> tuple[bool, str]:
    """(are two answers equal?, the rule that decided).  Never raises."""
    a, b = parse(answer, grouped), parse(gold, grouped)
    if "unreadable" in (a[0], b[0]):
        texts = ["".join(bare(text).split()) for text in (answer, gold)]
        same = a[0] == b[0] and "" != texts[0] == texts[1]
        who, why = ("answer", a[1]) if a[0] == "unreadable" else ("gold", b[1])
        return same, f"{who} is not readable: {why}"
    judge = Judge()
    with decimal.localcontext(DIGITS):
        try:
            return judge.same(a, b), judge.rule
        except ArithmeticError as error:
            return False, f"no value: {error}"
