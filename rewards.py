"""The reward of RLSP: an outcome verifier, Eq. 1, and counters of search behaviour. Standard library only.

"On the Emergence of Thinking in LLMs I: Searching for the Right Intuition" (arXiv 2502.06773), Eq. 1:

    R = alpha * c + (1 - alpha) * R_ex        c: is the boxed answer right?   R_ex: exploration, blind to correctness

What PPO is paid for it learns to do, so a right answer that is refused and a wrong one that is accepted both cost
more than anywhere else.  The verifier therefore reads both answers with one grammar into small trees and compares
values, exactly where exact arithmetic decides, otherwise at random points with 60 digits.  Every step is bounded:
characters, tokens, depth, size of integers and a budget of work, so no text a model writes can stall training.

Public names: extract_answer, answers_equal, verify, explain, RewardParts, score, behaviours, repetition.
`python rewards.py ANSWER GOLD` prints the verdict, both trees and the rule that decided.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context, Decimal, DivisionByZero, InvalidOperation, Overflow, localcontext
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from itertools import product
from typing import Callable, NamedTuple

# ---------------------------------------------------------------------------------------------------------------------
# 1. Conventions: what mathematics does not decide, this table does.  tests/test_rewards.py has a test for each key.
# ---------------------------------------------------------------------------------------------------------------------

CONVENTIONS = {
    "last box": "the last \\boxed, \\fbox or \\framebox is the answer, whatever comes before or after it",
    "empty": "an empty answer is equal to nothing, not even to an empty gold",
    "list": "1,2,3 and {1,2,3} and '1 or 2 or 3' are unordered, and multiplicity counts: 3,3 is not 3",
    "tuple": "(1,2), [1,2), matrices and vectors are ordered; brackets count; a column is the tuple of its entries",
    "plus-minus": "a \\pm b is the list a+b, a-b",
    "grouping": "1,000 outside brackets, and 1{,}000 or 1\\,000 anywhere, is 1000; (1,000) is a pair",
    "units": "units, words after a number, money signs and degree signs drop; inside sin() degrees are degrees",
    "angle": "a bare angle in degrees also equals the same angle in radians: 30 degrees = pi/6",
    "percent": "10% is 0.1, and also 10 where only one side has the sign",
    "decimal": "a decimal equals an exact value when it shows at least 9 significant digits, all of them right",
    "approx": "in 'a \\approx b' a is the answer, b is a remark",
    "name": "'k = 5', 'f(x) = 5' and 'm+n = 2+3 = 5' give 5; a chain with two unequal constants gives nothing",
    "equation": "an equation equals its non-zero multiples",
    "inequality": "an inequality in one name equals its interval or union of intervals",
    "ratio": "a:b is the quotient a/b",
    "base": "2516_8 equals only 2516_8; base 10 is a plain number",
    "log": "log without a base is the natural logarithm",
    "option": "the option letters A to J match in either case, with or without brackets or full stop",
    "words": "words match without regard to case, spaces and punctuation",
}

MAX_CHARS, MAX_TOKENS, MAX_DEPTH = 12_000, 2_500, 100     # beyond these only the same text is the same answer
MAX_BITS, MAX_WORK = 40_000, 12_000                       # size of exact numbers; evaluation steps for one comparison
NO_ANSWER = -0.5                                          # outcome without a \boxed answer (official code, not the paper)

# ---------------------------------------------------------------------------------------------------------------------
# 2. Extraction
# ---------------------------------------------------------------------------------------------------------------------

_BOXES = ("\\boxed", "\\fbox", "\\framebox")
_BOX_HEAD = re.compile(r"\\[a-z]+\s*")
_BRACE = re.compile(r"\\.|[{}]", re.S)
_TAIL = 4_000                                             # without a box only the end of the text is searched
_NUMBER = r"[-+]?(?:\\?\$)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.?\d+)(?:/\d+)?\s*(?:\\?%)?"
_STATED = re.compile(r"(?:final answer|answer)\s*(?:is|:|=)+\s*|####\s*|^(?:A|Answer):[ \t]", re.I | re.M)
_SPANS = re.compile(r"\$\$?([^$]{1,400})\$|\\\(((?:[^\\]|\\(?![()])){1,400})\\\)|\\\[((?:[^\\]|\\(?![\[\]])){1,400})\\\]"
                    r"|(\\[dt]?frac\{[^{}]{1,40}\}\{[^{}]{1,40}\})|\[?(" + _NUMBER + r")\]?", re.A)
_CODE = re.compile(r"\b(?:lambda|import|print|eval|exec|return|globals)\b|__\w+__")


def extract_answer(text: str, boxed_only: bool = True, strip_think: bool = False) -> str | None:
    """The content of the last box in `text`, None without one.

    A box that the token limit cut off runs to the end of its line.  With `boxed_only=False` a text without a box is
    searched (its last 4,000 characters) for "answer is ...", "####", then for the last formula or number.
    `strip_think` first drops everything up to the last </think>.
    """
    if strip_think:
        text = text[text.rfind("</think>") + len("</think>"):] if "</think>" in text else text
    start = last_box(text)
    if start >= 0:
        return _box_content(text, start).strip() or None
    return None if boxed_only else _stated_answer(text[-_TAIL:])


def last_box(text: str) -> int:
    """Index of the last box command, -1 without one."""
    return max(text.rfind(box) for box in _BOXES)


def _box_content(text: str, start: int) -> str:
    at = _BOX_HEAD.match(text, start).end()
    if text[at:at + 1] != "{":                            # \boxed 5: TeX takes one token; we take the number or command
        token = re.compile(r"[-+]?[\d.,]*\d|\\[A-Za-z]+|[^\s$]").match(text, at)
        return token.group() if token else ""
    end = _closing_brace(text, at)
    return text[at + 1:end] if end >= 0 else text[at + 1:].split("\n")[0].rstrip(" $.")


def _closing_brace(text: str, at: int) -> int:
    """Index of the brace that closes the one at `at`, -1 if none does; \\{ and \\} do not count."""
    depth = 0
    for brace in _BRACE.finditer(text, at):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return brace.start()
    return -1


def _stated_answer(text: str) -> str | None:
    text, stated = text.replace("\\$", ""), None
    for stated in _STATED.finditer(text):
        pass
    text = text[stated.end():] if stated else text
    if stated:
        rest = re.split(r"\n|\.(?:\s|$)|<\|", text.strip(), maxsplit=1)[0]
        span = _SPANS.match(text.strip())
        if span and "$" in span.group()[:1] + span.group()[-1:]:
            return next(filter(None, span.groups()), None)
        if rest and _readable(rest):
            return rest
    last = None
    for span in _SPANS.finditer(text):
        content = next(filter(None, span.groups()), "")
        if re.search(r"\d|[<>=]|\\(?:lt|gt|le|ge|ne|begin)", content):
            last, value = span, content
    if last is None:
        return None
    before = text[:last.start()]
    if re.search(r"\bnot\s+$|\w\($", before) or _CODE.search(before[-80:]):     # "not 3", print(3), lambda: 3
        return None
    return value.strip() or None


def _readable(text: str) -> bool:
    try:
        return parse(text).op not in ("text", "list")
    except Unreadable:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# 3. Tokens and tree
# ---------------------------------------------------------------------------------------------------------------------


class Node(NamedTuple):
    """One node of an answer: `op` names what it is, `args` are child nodes or, in leaves, plain values."""

    op: str
    args: tuple

    def __str__(self) -> str:
        return self.op + "(" + ", ".join(map(str, self.args)) + ")"


class Unreadable(Exception):
    """The text is not an answer in our grammar."""


class Undefined(Exception):
    """The expression has no value at this point, or one too large for our bounds."""


_UNICODE = {ord(k): v for k, v in {
    "−": "-", "–": "-", "—": "-", "×": "*", "⋅": "*", "·": "*", "∗": "*", "÷": "/", "∕": "/", "≤": "<=", "⩽": "<=", "≥": ">=",
    "⩾": ">=", "≠": "!=", "≈": "\\approx ", "∞": "\\infty ", "π": "\\pi ", "√": "\\surd ", "°": "\\degree ", "∪": "\\cup ",
    "∩": "\\cap ", "±": "\\pm ", "∓": "\\mp ", "∈": "\\in ", "≡": "\\equiv ", "∅": "\\emptyset ", "ℝ": "\\mathbb{R}",
    "½": "\\frac12 ", "¼": "\\frac14 ", "¾": "\\frac34 ", "α": "\\alpha ", "β": "\\beta ", "θ": "\\theta ",
    "φ": "\\phi ", "λ": "\\lambda ", "“": " ", "”": " ", "‘": " ", "’": "'", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    "€": " ", "£": " ", "∛": "cbrt ", "⁄": "/", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ",
    "：": ":", "，": ","}.items()}
_RAISED = {ord(c): v for c, v in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789-+n0123456789")}
_TIGHT = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\{,\}|,\\!|\\,|\\!)\s*\d{3})+(?!\d)", re.A)
_IGNORED = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|mathstrut)(?![a-zA-Z])"
                      r"|(?<!\\)\\[,;:! ]|\\quad|\\qquad|\\\$|[$~]|\\phantom\{[^{}]*\}|\\(?:label|color|textcolor)\{[^{}]*\}|\\f?box(?:ed)?(?=\{)|\\tag\{[^{}]*\}")
_TEXT = re.compile(r"\\(?:text(?!color)[a-z]*|mbox|hbox|mathrm|mathbf|mathit|mathsf|operatorname|bold|boldsymbol|rm|bf)\*?\s*\{([^{}]*)\}")
_TOKEN = re.compile(r"(?P<space>\s+)|(?P<num>(?:\d+\.\d+|\d+\.?(?!\d)|\.\d+)(?:[eE][+-]?\d+(?![A-Za-z\d]))?)"
                    r"|(?P<env>\\(?:begin|end)\s*\{\w+\*?\})|(?P<cmd>\\[A-Za-z]+|\\.)|(?P<word>[A-Za-z]+)"
                    r"|(?P<text>\x01[^\x01\x02]*\x02)|(?P<op><=|>=|!=|==|\*\*|[-+*/^_=<>(){}\[\]|,;:!%&'])", re.S | re.A)
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?", re.A)
_COMMANDS = {"\\cdot": "*", "\\times": "*", "\\ast": "*", "\\div": "/", "\\le": "<=", "\\leq": "<=", "\\leqslant": "<=",
             "\\lt": "<",
             "\\ge": ">=", "\\geq": ">=", "\\geqslant": ">=", "\\gt": ">", "\\ne": "!=", "\\neq": "!=", "==": "=", "**": "^",
             "\\%": "%", "\\lbrack": "[", "\\rbrack": "]", "\\langle": "(", "\\rangle": ")", "\\lvert": "|", "\\rvert": "|",
             "\\vert": "|", "\\mid": "|", "\\cupdot": "\\cup", "\\backslash": "\\setminus", "\\dfrac": "\\frac",
             "\\tfrac": "\\frac",
             "\\cfrac": "\\frac", "\\dbinom": "\\binom", "\\tbinom": "\\binom", "\\lbrace": "\\{", "\\rbrace": "\\}",
             "\\circ": "\\degree", "\\dotsc": "\\dots", "\\pmod": "\\mod", "\\sim": "\\approx", "\\simeq": "\\approx",
             "\\colon": ":", "\\varnothing": "\\emptyset", "\\deg": "\\degree", "\\bigcup": "\\cup", "\\dot": "\\overline", "\\bar": "\\overline",
             "\\land": "and", "\\lor": "or", "\\wedge": "and", "\\vee": "or", "\\doteq": "=", "\\triangleq": "=", "\\lparen": "(",
             "\\rparen": ")", "\\prime": "'", "\\bmod": "\\mod", "\\cong": "\\approx"}
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "ln", "log", "lg", "exp", "arcsin",
              "arccos",
              "arctan", "arccot", "cis", "max", "min", "gcd", "lcm", "det"}
_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "infinity": "\\infty", "inf": "\\infty", "pi": "\\pi",
            "sqrt": "sqrt", "cbrt": "cbrt", "abs": "abs", "floor": "floor", "ceil": "ceil", "percent": "%", "percentage": "%",
            "pct": "%", "degrees": "\\degree", "degree": "\\degree", "and": "and", "or": "or", "union": "\\cup", "U": "\\cup"}
_GREEK = {"\\" + n for n in ("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
          "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar emptyset dots ldots cdots "
          "triangle angle").split()}
_UNITS = {"cm", "mm", "km", "kg", "mg", "ft", "mph", "lb", "lbs", "oz", "ml", "sec", "hr", "hrs", "rad", "sq", "mi", "yd",
          "days", "day",
          "feet", "foot", "inch", "units", "unit", "USD", "men", "ways", "the", "The", "of", "is", "are", "to", "no", "No",
          "yes", "Yes", "for", "all"}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10 ** 3, "million": 10 ** 6, "billion": 10 ** 9, "trillion": 10 ** 12}
_HEDGES = {"least", "most", "than", "squared", "cubed", "not", "maybe", "perhaps", "probably", "possibly", "either", "if",
           "unless", "but", "ignore", "approximately", "roughly"}
_SAYINGS = {"all real numbers": "blackboard R", "all reals": "blackboard R", "no solution": "emptyset", "no solutions": "emptyset",
            "no real solution": "emptyset", "no real solutions": "emptyset", "empty set": "emptyset", "the empty set": "emptyset",
            "infinitely many": "infty", "infinite": "infty"}
_OPAQUE = {"\\lim", "\\sum", "\\int", "\\prod", "\\iint", "\\oint"}
_ACCENTS = {"\\overline", "\\vec", "\\hat", "\\tilde", "\\widehat", "\\overrightarrow", "\\underline"}
_RELATIONS = {"=", "\\equiv", "<", "<=", ">", ">=", "!=", "\\in", "\\approx"}
_CLOSERS = {")", "]", "}", "\\}", "|", "\\rfloor", "\\rceil", "&", "\\\\", "end", ",", ";", "and", "or", ":", "\\cup", "\\setminus",
            "\\cap", "+", "-", "*", "/", "^", "_", "!", "%", "\\pm", "\\mp", "'", "\\degree", "\\choose", "\\mod"} | _RELATIONS


def tokens(text: str, grouped: bool) -> list[tuple[str, str]]:
    """`text` as (kind, value) pairs; kinds num, word (prose), name, func, env and op. `grouped`: is 1,000 one number?"""
    if len(text) > MAX_CHARS:
        raise Unreadable("too long")
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁻⁺ⁿ]+", lambda m: "^{" + m.group().translate(_RAISED) + "}", text.translate(_UNICODE))
        text = re.sub("[₀-₉]+", lambda m: "_{" + m.group().translate(_RAISED) + "}", text)
    if "\\\\" in text and "\\begin" not in text:          # double-escaped: \\frac for \frac
        text = re.sub(r"\\\\(?=[A-Za-z{}%$])", r"\\", text)
    text = _TIGHT.sub(lambda m: re.sub(r"\D", "", m.group()), text)
    text = re.sub(r"(?<!\\)\\[()\[\]]", "", _TEXT.sub("\x01\\1\x02", text))
    text = _IGNORED.sub(" ", text)
    found: list[tuple[str, str]] = []
    _scan(text.strip(" \n\t\"`*").rstrip(" .,"), grouped, False, found)
    return found


def _scan(text: str, grouped: bool, prose: bool, out: list[tuple[str, str]]) -> None:
    at = depth = 0
    while at < len(text):
        token = grouped and depth == 0 and text[at].isdigit() and _GROUPED.match(text, at) or _TOKEN.match(text, at)
        if not token or len(out) > MAX_TOKENS:
            raise Unreadable("too many tokens" if token else f"character {text[at]!r}")
        at, kind, value = token.end(), token.lastgroup, token.group()
        if kind == "space":
            continue
        if kind in ("num", None):
            out.append(("num", value.replace(",", "")))
        elif kind == "text":
            _scan(value[1:-1].replace(".", " ") if not re.search(r"\d", value) else value[1:-1], grouped, True, out)
        elif kind == "env":
            out.append(("env", value.replace(" ", "")))
        elif kind == "word":
            _scan_word(value, prose, out)
        else:
            value = _COMMANDS.get(value, value)
            depth += (value in "([{" or value == "\\{") - (value in ")]}" or value == "\\}")
            if value[1:] in _FUNCTIONS:
                out.append(("func", value[1:]))
            elif value in _GREEK:
                out.append(("name", "dots" if value.endswith("dots") else value[1:]))
            else:
                out.append(("op", value))


def _scan_word(word: str, prose: bool, out: list[tuple[str, str]]) -> None:
    if len(word) > 1 and word.lower() in _ALIASES or word == "U":
        value = _ALIASES.get(word, _ALIASES.get(word.lower(), word))
        out.append(("func" if value in _FUNCTIONS or value in ("sqrt", "cbrt", "abs", "floor", "ceil") else "op", value))
    elif word in _FUNCTIONS:
        out.append(("func", word))
    elif prose or word in _UNITS or len(word) > 3 and word[1:].islower():
        out.append(("word", word))
    else:                                                 # xy is x times y, and sinx is sin x
        for function in sorted(_FUNCTIONS, key=len, reverse=True):
            if word.startswith(function):
                out.append(("func", function))
                word = word[len(function):]
                break
        out.extend(("name", letter) for letter in word)


class Parser:
    """Recursive descent, one method a precedence level.  Sums and products are flat, so only nesting costs depth."""

    def __init__(self, found: list[tuple[str, str]]):
        self.tokens, self.at, self.depth, self.in_bars = found + [("end", "end")], 0, 0, False

    @property
    def next(self) -> str:
        """The next token if it is an operator or the end, else ''."""
        kind, value = self.tokens[self.at]
        return value if kind == "op" or kind == "end" else ""

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    def take(self, *wanted: str) -> str:
        """Consume the next token if it is one of the operators `wanted`, else return ''."""
        kind, value = self.tokens[self.at]
        if kind == "op" and value in wanted:
            self.at += 1
            return value
        return ""

    def expect(self, *wanted: str) -> str:
        return self.take(*wanted) or self.fail()

    def fail(self):
        raise Unreadable(f"unexpected {self.tokens[self.at][1]!r}")

    def whole(self) -> Node:
        node = self.items()
        return node if self.kind == "end" else self.fail()

    def items(self) -> Node:
        """relation (, relation)* as a list node; one item is itself."""
        depth = self.deeper()
        found, word = [self.relation()], ""
        while separator := self.take(",", ";", "and", "or"):
            while more := self.take("and", "or"):         # "1, 2, and 3"
                separator = more
            word = separator if separator in ("and", "or") else word
            found.append(self.relation())
        self.depth = depth
        return Node("list", (word, *found)) if len(found) > 1 else found[0]

    def relation(self) -> Node:
        sides, signs = [self.union()], []
        while sign := self.take(*_RELATIONS):
            signs.append(sign)
            sides.append(self.union())
        return Node("relation", (tuple(signs), *sides)) if signs else sides[0]

    def union(self) -> Node:
        node = self.ratio()
        while sign := self.take("\\cup", "\\cap", "\\setminus"):
            self.deeper()
            parts = node.args if node.op == sign == "\\cup" else (node,)
            node = Node(sign, (*parts, self.ratio()))
        return node

    def ratio(self) -> Node:
        parts = [self.sum()]
        while not self.in_bars and self.take(":"):
            parts.append(self.sum())
        if len(parts) == 1 and self.take("\\mod"):
            return Node("sequence", ("mod", (parts[0], self.sum()), "mod"))
        if len(parts) == 2:
            return Node("*", (parts[0], Node("inverse", (parts[1],))))
        return Node("ratio", tuple(parts)) if len(parts) > 1 else parts[0]

    def sum(self) -> Node:
        terms = [self.term()]
        while sign := self.take("+", "-", "\\pm", "\\mp"):
            terms.append(_signed(sign, self.term()))
        return Node("+", tuple(terms)) if len(terms) > 1 else terms[0]

    def term(self) -> Node:
        factors = [self.signed()]
        while True:
            if self.take("*"):
                factors.append(self.signed())
            elif self.take("/"):
                factors.append(Node("inverse", (self.signed(),)))
            elif self.take("\\choose"):
                self.deeper()
                factors[-1] = Node("binom", (factors[-1], self.power()))
            elif self.starts_operand():
                last = factors[-1]
                number = last.args[0] if last.op == "neg" else last
                if number.op == "num" and (self.kind == "num" or self.next == "\\frac"):
                    fraction = self.primary() if self.next else self.plain_fraction()
                    if number.args[1] == 0 and _proper(fraction):       # a mixed number
                        mixed = self.postfix(Node("+", (number, fraction)))
                        factors[-1] = Node("neg", (mixed,)) if last.op == "neg" else mixed
                    else:
                        factors.append(self.power(fraction))
                else:
                    factors.append(self.power())
            else:
                return Node("*", tuple(factors)) if len(factors) > 1 else factors[0]

    def plain_fraction(self) -> Node:
        """1/2 after a number, as in 1 1/2.  Any other two numbers side by side are no answer."""
        top = self.primary()
        self.expect("/")
        fraction = Node("*", (top, Node("inverse", (self.primary(),))))
        return fraction if _proper(fraction) else self.fail()

    def starts_operand(self) -> bool:
        if self.kind in ("num", "name", "func"):
            return True
        if self.kind == "word":
            return False
        if self.next == "|":
            return not self.in_bars
        return self.next not in _CLOSERS and self.kind != "env" or self.tokens[self.at][1].startswith("\\begin")

    def signed(self) -> Node:
        signs = []
        while sign := self.take("+", "-", "\\pm", "\\mp"):
            signs.append(sign)
        node = self.power()
        if signs.count("-") % 2:
            node = _signed("-", node)
        return _signed(next((s for s in signs if s in ("\\pm", "\\mp")), "+"), node)

    def deeper(self) -> int:
        """Count one level of the tree; returns the depth to go back to."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        return self.depth - 1

    def power(self, node: Node | None = None) -> Node:
        depth = self.deeper()
        node = self.postfix(node or self.primary())
        while self.take("^"):
            self.deeper()
            if self.take("\\degree"):
                node = Node("degrees", (node,))
            elif self.kind == "num":
                node = Node("^", (node, self.power()))
            else:
                exponent = self.argument() if self.next in ("{", "(", "\\frac") or self.kind in ("name", "word") else self.signed()
                if exponent == Node("degrees", ()) or exponent == Node("name", ("o",)) and node.op == "num":
                    node = Node("degrees", (node,))
                elif exponent.op == "text" and node.op == "num":           # 12^{\text{th}}
                    if exponent.args[0] not in ("th", "st", "nd", "rd"):
                        self.fail()
                elif exponent != Node("prime", ()):
                    node = Node("^", (node, exponent))
            node = self.postfix(node)
        self.depth = depth
        return node

    def postfix(self, node: Node) -> Node:
        for _ in range(4):
            if self.take("!"):
                node = Node("!!" if self.take("!") else "!", (node,))
            elif self.take("%"):
                node = Node("%", (node,))
            elif self.take("\\degree"):
                node = Node("degrees", (node,))
            elif node.op == "degrees" and self.tokens[self.at] in (("name", "C"), ("name", "F")):
                self.at += 1
            elif self.take("'"):
                node = Node("name", (node.args[0] + "'",)) if node.op == "name" else node
            elif self.next == "_" and node.op in ("name", "num"):
                self.at += 1
                node = self.subscript(node)
            elif self.kind == "word" and node.op != "text":
                scale = self.unit()
                node = node if scale == 1 else Node("*", (node, _number(str(scale))))
            else:
                break
        return node

    def unit(self) -> int:
        """Drop a unit: words, their powers and quotients.  Returns its factor, 10**6 for "million dollars".

        A word that takes the number back is not a unit; a remark "for all ..." runs to the end.
        """
        scale = 1
        while self.kind == "word":
            word = self.tokens[self.at][1].lower()
            rest = self.tokens[self.at + 1:]
            if word in _HEDGES:
                self.fail()
            if word in ("for", "where") and self.depth <= 2 and rest[0][1] in ("all", "any", "some", "every", "each"):
                if all(kind != "num" and value not in (",", ";", "or") for kind, value in rest):
                    self.at = len(self.tokens) - 1
                    break
            scale *= _SCALES.get(word, 1)
            self.at += 1
            if self.take("^"):
                self.argument()
            below = self.tokens[self.at + 1] if self.next == "/" else ("", "")
            if below[0] == "word" or below in (("name", "h"), ("name", "s")):
                self.at += 2 if below[0] == "name" else 1
        return scale

    def subscript(self, node: Node) -> Node:
        start = self.at
        self.argument()
        tag = "".join(value for _, value in self.tokens[start:self.at]).strip("{}")
        if node.op == "name":
            return Node("name", (f"{node.args[0]}_{tag}",))
        digits = str(node.args[0])
        if not (tag.isdigit() and len(tag) < 3 and digits.isdigit() and 2 <= int(tag) <= 36):
            self.fail()
        return node if tag == "10" else Node("base", (digits, int(tag)))

    def argument(self) -> Node:
        """A TeX argument: a group in braces, one digit, one letter or one command."""
        kind, value = self.tokens[self.at]
        if kind == "num" and len(value) > 1 and value.isdigit():
            self.tokens[self.at] = (kind, value[1:])
            return _number(value[0])
        return self.primary()

    def group(self, *closers: str) -> Node:
        bars, self.in_bars = self.in_bars, "|" in closers
        node = self.items()
        self.in_bars = bars
        self.expect(*closers)
        return node

    def primary(self) -> Node:
        depth = self.deeper()
        kind, value = self.tokens[self.at]
        self.at += 1
        if kind == "num":
            node = self.decimal(value)
        elif kind == "name":
            node = Node("name", (value,))
        elif kind == "word":
            node = self.words(value)
        elif kind == "func":
            node = self.function(value)
        elif kind == "env":
            node = self.environment(value)
        else:
            node = self.command(value)
        self.depth = depth
        return node

    def decimal(self, text: str) -> Node:
        if self.next == "\\overline" and "." in text:     # 0.8\overline{4}
            self.at += 1
            start = self.at
            self.argument()
            digits = "".join(value for _, value in self.tokens[start:self.at]).strip("{}")
            if not digits.isdigit() or len(digits) > 100:
                self.fail()
            places = len(text.split(".")[1])
            value = Fraction(text + "0") + Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** places)
            return Node("num", (value, 0))
        return _number(text)

    def words(self, first: str) -> Node:
        found = [first]
        while self.kind == "word":
            found.append(self.tokens[self.at][1])
            self.at += 1
        if len(found) == 1 and len(first) == 1:
            return Node("name", (first,))
        if found[-1] in ("is", "equals") and self.next not in _CLOSERS and not _HEDGES & {w.lower() for w in found}:
            return self.signed()
        said = " ".join(found).lower()
        if said in _SAYINGS:
            return Node("name", (_SAYINGS[said],))
        return Node("text", (" ".join(found),)) if self.next in _CLOSERS else self.fail()

    def function(self, name: str) -> Node:
        base = exponent = None
        if name in ("sqrt", "cbrt"):
            inside = self.argument() if self.next in ("{", "(", "[") else self.power()
            return Node("root", (inside, _number("3" if name == "cbrt" else "2")))
        if self.take("_"):
            base = self.argument()
        if self.take("^"):
            exponent = self.argument()
        if self.next in ("(", "{", "["):
            inside = self.primary()
        else:
            factors = [self.signed()]
            while self.starts_operand() and self.kind != "func" and self.next not in ("(", "["):
                factors.append(self.power())
            inside = Node("*", tuple(factors)) if len(factors) > 1 else factors[0]
        if exponent == Node("neg", (_number("1"),)) and "arc" + name in _FUNCTIONS:
            name, exponent = "arc" + name, None
        several = {"sequence": inside.args[1:2], "list": (inside.args[1:],)}.get(inside.op, ((inside,),))[0]
        node = Node("call", ("ln" if name == "lg" else name, *several))
        if base is not None or name == "lg":
            node = Node("*", (node, Node("inverse", (Node("call", ("ln", base or _number("10"))),))))
        return Node("^", (node, exponent)) if exponent is not None else node

    def environment(self, name: str) -> Node:
        """Matrices by rows; cases and aligned environments are lists of their rows."""
        inner = name[name.index("{") + 1:-1]
        if inner == "array":
            self.expect("{")
            while not self.take("}"):
                if self.kind == "end":
                    self.fail()
                self.at += 1
        rows, row = [], []
        while True:
            row.append(self.items())
            if self.take("&"):
                continue
            rows.append(tuple(row))
            row = []
            broke = self.take("\\\\")
            if self.tokens[self.at] == ("env", "\\end{" + inner + "}"):
                self.at += 1
                break
            if not broke:
                self.fail()
        if "matrix" in inner or inner == "array":
            return Node("matrix" if inner[0] not in "vV" else "determinant", tuple(rows))
        return Node("list", ("", *(item for one in rows for item in one)))

    def command(self, value: str) -> Node:
        if value in ("(", "["):
            closers = (")", "]")
            node = self.group(*closers)
            if node.op != "list":
                return node
            return Node("sequence", (value, node.args[1:], self.tokens[self.at - 1][1]))
        if value in ("{", "\\{"):
            close = "}" if value == "{" else "\\}"
            if value == "\\{" and self.take(close):
                return Node("name", ("emptyset",))
            if value == "{" and self.next in ("\\degree", "'") and self.tokens[self.at + 1][1] == "}":
                self.at += 2
                return Node("degrees" if self.tokens[self.at - 2][1] == "\\degree" else "prime", ())
            bars, self.in_bars = self.in_bars, value == "\\{" or self.in_bars
            node = self.items()
            if value == "\\{" and self.take("|", ":"):    # {x | 2 < x < 3} is its condition
                node = self.items()
            self.in_bars = bars
            self.expect(close)
            if value == "{":
                return node
            return Node("list", ("", node)) if node.op not in ("list", "relation") else node
        if value == "|":
            return Node("call", ("abs", self.group("|")))
        if value in ("\\lfloor", "\\lceil"):
            return Node("call", (value[2:], self.group("\\r" + value[2:])))
        if value == "\\frac":
            top = self.argument()
            return Node("*", (top, Node("inverse", (self.argument(),))))
        if value == "\\binom":
            return Node("binom", (self.argument(), self.argument()))
        if value == "\\sqrt":
            index = self.group("]") if self.take("[") else _number("2")
            return Node("root", (self.argument(), index))
        if value == "\\surd":
            return Node("root", (self.argument() if self.next else self.power(), _number("2")))
        if value in ("\\infty", "\\pi"):
            return Node("name", (value[1:],))
        if value in ("\\mathbb", "\\mathcal") or value in _ACCENTS:
            start = self.at
            self.argument()
            letter = "".join(v for _, v in self.tokens[start:self.at]).strip("{}")
            return Node("name", (("blackboard " if value == "\\mathbb" else value) + letter,))
        if value in ("\\imath", "\\mathit"):
            return Node("name", ("i",))
        if value in _OPAQUE:                              # compared by its text: everything up to the next relation
            start, depth = self.at, 0
            while self.kind != "end" and (depth or self.next not in _RELATIONS | {",", ")", "]", "}"}):
                depth += (self.next in ("(", "[", "{", "\\{")) - (self.next in (")", "]", "}", "\\}"))
                self.at += 1
            return Node("opaque", (value + " ".join(v for _, v in self.tokens[start:self.at] if v not in "{}"),))
        self.at -= 1
        return self.fail()


def _signed(sign: str, node: Node) -> Node:
    if sign in ("\\pm", "\\mp"):
        node = Node("pm", (node,))
    return Node("neg", (node,)) if sign in ("-", "\\mp") else node


def _number(text: str) -> Node:
    """A number leaf: its value, and how many significant digits it shows if it is a decimal (0: it is exact)."""
    if text.isdigit() and len(text) < 4_000:
        return Node("num", (Fraction(int(text)), 0))
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > 9_000 or len(exponent) > 4:        # 9,000 digits: just under MAX_BITS
        raise Unreadable("number too long")
    digits = len(mantissa.replace(".", "").lstrip("0")) if "." in mantissa.rstrip(".") else 0
    whole, _, fraction = mantissa.partition(".")
    value = Fraction(_int(whole + fraction), 10 ** len(fraction))
    if exponent:
        value *= Fraction(10) ** int(exponent)
    return Node("num", (value, digits))


def _int(digits: str) -> int:
    """int(), in pieces: Python refuses more than 4,300 digits at once."""
    value = 0
    for start in range(0, len(digits), 4_000):
        piece = digits[start:start + 4_000]
        value = value * 10 ** len(piece) + int(piece)
    return value


def _proper(node: Node) -> bool:
    """Is it a fraction of two positive integer literals below one, as in mixed numbers?"""
    if node.op != "*" or len(node.args) != 2 or node.args[1].op != "inverse":
        return False
    top, bottom = node.args[0], node.args[1].args[0]
    return top.op == bottom.op == "num" and 0 < top.args[0] < bottom.args[0] and top.args[1] == bottom.args[1] == 0


@lru_cache(maxsize=128)                                   # golds come back with every sample
def parse(text: str, grouped: bool = True) -> Node:
    """The tree of an answer. Raises Unreadable."""
    found = tokens(text, grouped)
    return Parser(found).whole() if found else Parser(found).fail()


# ---------------------------------------------------------------------------------------------------------------------
# 4. Values and equivalence
# ---------------------------------------------------------------------------------------------------------------------

_CONTEXT = Context(prec=60, Emax=10 ** 12, Emin=-10 ** 12, traps=[Overflow, InvalidOperation, DivisionByZero])
_CLOSE = Decimal("1e-45")                                 # relative; leaves 15 of the 60 digits to cancellation
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
_ZERO, _ONE = Decimal(0), Decimal(1)


@dataclass(frozen=True)
class Z:
    """A complex number of 60 digits, for what is not rational."""

    re: Decimal
    im: Decimal = _ZERO

    def __add__(self, other: Z) -> Z:
        return Z(self.re + other.re, self.im + other.im)

    def __neg__(self) -> Z:
        return Z(-self.re, -self.im)

    def __sub__(self, other: Z) -> Z:
        return Z(self.re - other.re, self.im - other.im)

    def __mul__(self, other: Z) -> Z:
        if not self.im and not other.im:
            return Z(self.re * other.re)
        return Z(self.re * other.re - self.im * other.im, self.re * other.im + self.im * other.re)

    def inverse(self) -> Z:
        if not self.im:
            return Z(1 / self.re)
        size = self.re * self.re + self.im * self.im
        return Z(self.re / size, -self.im / size)

    def __abs__(self) -> Decimal:
        return abs(self.re) if not self.im else (self.re * self.re + self.im * self.im).sqrt()

    def ln(self) -> Z:
        if not self.im and self.re > 0:
            return Z(self.re.ln())
        return Z(abs(self).ln(), _angle(self.im, self.re))

    def exp(self) -> Z:
        size = self.re.exp()
        return Z(size) if not self.im else Z(size * _sin(self.im + _PI / 2), size * _sin(self.im))

    def sqrt(self) -> Z:
        if not self.im:
            return Z(self.re.sqrt()) if self.re >= 0 else Z(_ZERO, (-self.re).sqrt())
        root = ((abs(self) + self.re) / 2).sqrt() if self.re >= 0 else None
        if root is not None:
            return Z(root, self.im / (2 * root))
        root = ((abs(self) - self.re) / 2).sqrt().copy_sign(self.im)
        return Z(self.im / (2 * root), root)

    def real(self) -> bool:
        return abs(self.im) <= _CLOSE * max(abs(self.re), _ONE)


_I, _UNIT, _TINY = Z(_ZERO, _ONE), Z(_ONE), Decimal("1e-50")


def _sin(x: Decimal) -> Decimal:
    if abs(x) > 10 ** 15:
        raise Undefined("angle too large")
    x = x % (2 * _PI)
    x = x - 2 * _PI if x > _PI else x + 2 * _PI if x < -_PI else x
    term = total = x / 3                                  # sin 3t = 3 sin t - 4 sin^3 t shortens the series
    n = 1
    while abs(term) > Decimal("1e-62"):
        term *= -x * x / 9 / ((n + 1) * (n + 2))
        total += term
        n += 2
    return 3 * total - 4 * total ** 3


def _angle(y: Decimal, x: Decimal) -> Decimal:
    """atan2 by halving the angle four times, then the series."""
    if not y:
        return _ZERO if x >= 0 else _PI
    t, doubled = _ONE, 1
    size = (x * x + y * y).sqrt()
    if x < 0 and abs(y) < -x:
        return (_PI - _angle(abs(y), -x)).copy_sign(y)
    t = y / (size + x)
    doubled = 2
    for _ in range(3):
        t, doubled = t / (1 + (1 + t * t).sqrt()), doubled * 2
    power = total = t
    n = 1
    while abs(power) > Decimal("1e-63"):
        power *= -t * t
        n += 2
        total += power / n
    return total * doubled


def _lift(value: Fraction | Z) -> Z:
    return value if isinstance(value, Z) else Z(Decimal(value.numerator) / Decimal(value.denominator))


class Judge:
    """One comparison: its budget of work, and the rule that decided it."""

    def __init__(self):
        self.work, self.rule = MAX_WORK, "different values"
        self.strayed = False                              # did a root or log of a negative number leave the reals?

    def spend(self, amount: int) -> None:
        self.work -= amount
        if self.work < 0:
            raise Undefined("too much work")

    # -- evaluation

    def value(self, node: Node, point: int = 0, sign: int = 1, radians: bool = False) -> Fraction | Z:
        """The value of `node` at random point number `point`: a Fraction as long as it is rational, else 60 digits.

        `sign` is the branch of plus-minus; `radians` is True where a degree sign must be converted.
        """
        self.spend(1)
        op, args = node.op, node.args
        if op == "num":
            return args[0]
        if op in ("name", "text", "opaque"):
            return _name_value(args[0], point, op)

        def sub(child: Node) -> Fraction | Z:
            return self.value(child, point, sign, radians)

        if op == "+":
            total = sub(args[0])
            for arg in args[1:]:
                total = self.add(total, sub(arg))
            return total
        if op == "*":
            total = sub(args[0])
            for arg in args[1:]:
                total = self.times(total, sub(arg))
            return total
        if op == "neg":
            return -sub(args[0])
        if op == "pm":
            return sub(args[0]) if sign > 0 else -sub(args[0])
        if op == "inverse":
            value = sub(args[0])
            if not value if isinstance(value, Fraction) else abs(value) < _TINY:
                raise Undefined("division by zero")
            return 1 / value if isinstance(value, Fraction) else value.inverse()
        if op == "%":
            return self.times(sub(args[0]), Fraction(1, 100))
        if op == "degrees" and args:
            value = sub(args[0])
            return self.times(value, Z(_PI / 180)) if radians else value
        if op == "^":
            return self.power(sub(args[0]), sub(args[1]))
        if op == "root":
            return self.power(sub(args[0]), self.times(Fraction(1), self.value(Node("inverse", (args[1],)), point, sign)))
        if op in ("!", "!!"):
            n = _whole(sub(args[0]))
            if not 0 <= n <= 3_000:
                raise Undefined("factorial too large")
            self.spend(n)
            return Fraction(math.factorial(n) if op == "!" else math.prod(range(n, 0, -2)))
        if op == "binom":
            n, k = _whole(sub(args[0])), _whole(sub(args[1]))
            if not (0 <= n <= 20_000 and 0 <= k):
                raise Undefined("binomial too large")
            self.spend(min(k, abs(n - k)))
            return Fraction(math.comb(n, k))
        if op == "call":
            trig = args[0].removesuffix("h") in ("sin", "cos", "tan", "cot", "sec", "csc", "cis")
            return self.call(args[0], [self.value(arg, point, sign, radians or trig) for arg in args[1:]])
        raise Undefined(f"{op} has no single value")

    def add(self, a: Fraction | Z, b: Fraction | Z) -> Fraction | Z:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            self.measure(a, b)
            return a + b
        a, b = _lift(a), _lift(b)
        total = a + b
        if abs(total) < _TINY * max(abs(a), abs(b)):     # what is left of the digits is rounding
            return Fraction(0)
        return total

    def times(self, a: Fraction | Z, b: Fraction | Z) -> Fraction | Z:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            self.measure(a, b)
            return a * b
        return _lift(a) * _lift(b)

    def measure(self, *values: Fraction) -> None:
        bits = sum(v.numerator.bit_length() + v.denominator.bit_length() for v in values)
        if bits > 2 * MAX_BITS:
            raise Undefined("number too large")
        self.spend(bits * bits // 2_000_000)

    def power(self, base: Fraction | Z, exponent: Fraction | Z) -> Fraction | Z:
        self.spend(3)
        if isinstance(exponent, Fraction):
            if exponent.denominator == 1 and isinstance(base, Fraction):
                n = exponent.numerator
                if abs(n) * max(base.numerator.bit_length(), base.denominator.bit_length()) <= MAX_BITS or base in (0, 1, -1):
                    if base == 0 and n <= 0 and n != 0:
                        raise Undefined("division by zero")
                    self.spend(abs(n).bit_length())
                    return base ** (n if base not in (1, -1) else n % 2)
            z = _lift(base)
            if exponent.denominator == 1 and abs(z) and abs(exponent.numerator) < 10 ** 15:
                return _integer_power(z, exponent.numerator)
            if exponent == Fraction(1, 2):
                self.strayed |= z.re < 0
                return z.sqrt()
            if not z.im and z.re < 0 and exponent.denominator % 2 and exponent.denominator < 1000:
                root = self.power(-z, exponent)           # the real odd root, as in (-8)^{1/3} = -2
                return root if exponent.numerator % 2 == 0 else -root
        z, w = _lift(base), _lift(exponent)
        if not z.re and not z.im:
            if w.re > 0:
                return Fraction(0)
            raise Undefined("0 to a power that is not positive")
        self.spend(30)
        return (w * z.ln()).exp()

    def call(self, name: str, values: list[Fraction | Z]) -> Fraction | Z:
        self.spend(30)
        if name in ("max", "min", "gcd", "lcm"):
            if name in ("gcd", "lcm"):
                numbers = [_whole(v) for v in values]
                return Fraction(math.gcd(*numbers) if name == "gcd" else math.lcm(*numbers))
            return (max if name == "max" else min)(values, key=lambda v: _lift(v).re)
        if len(values) != 1:
            raise Undefined(f"{name} of several values")
        value = values[0]
        if name in ("floor", "ceil"):
            x = _lift(value).re if not isinstance(value, Fraction) else None
            if x is None:
                return Fraction(math.floor(value) if name == "floor" else math.ceil(value))
            near = x.to_integral_value()
            if abs(x - near) < Decimal("1e-40"):
                return Fraction(int(near))
            return Fraction(int(x.to_integral_value(ROUND_FLOOR)) + (name == "ceil"))
        if name == "abs":
            return abs(value) if isinstance(value, Fraction) else Z(abs(value))
        if isinstance(value, Fraction) and value == 0 and name in ("sin", "tan", "arcsin", "arctan", "sinh", "tanh"):
            return Fraction(0)
        if name == "cis":
            return (_I * _lift(value)).exp()
        z, half = _lift(value), Z(Decimal("0.5"))
        if name in ("ln", "log"):
            if not abs(z):
                raise Undefined("log of 0")
            self.strayed |= z.re < 0
            return z.ln()
        if name == "exp":
            return z.exp()
        if name in ("arcsin", "arccos"):
            arc = -(_I * (_I * z + (_UNIT - z * z).sqrt()).ln())
            return arc if name == "arcsin" else Z(_PI / 2) - arc
        if name in ("arctan", "arccot"):
            arc = Z(_angle(z.re, _ONE)) if not z.im else _I * half * ((_UNIT - _I * z).ln() - (_UNIT + _I * z).ln())
            return arc if name == "arctan" else Z(_PI / 2) - arc
        if name.endswith("h"):
            e, f = z.exp(), (-z).exp()
            sin, cos = (e - f) * half, (e + f) * half
        elif z.im:
            e, f = (_I * z).exp(), (-(_I * z)).exp()
            sin, cos = (e - f) * half * -_I, (e + f) * half
        else:
            sin, cos = Z(_sin(z.re)), Z(_sin(z.re + _PI / 2))
        sin, cos = (Z(_ZERO) if abs(v) < _TINY else v for v in (sin, cos))       # sin(pi) is 0, not 1e-60
        top, bottom = {"sin": (sin, _UNIT), "cos": (cos, _UNIT), "tan": (sin, cos), "cot": (cos, sin), "sec": (_UNIT, cos),
                       "csc": (_UNIT, sin)}.get(name.removesuffix("h"), (_UNIT, Z(_ZERO)))
        if not abs(bottom):
            raise Undefined(f"{name} has no value here")
        return top * bottom.inverse() if abs(top) else Fraction(0)

    # -- comparison of values

    def close(self, a: Fraction | Z, b: Fraction | Z, tolerance: Decimal = _CLOSE) -> bool:
        if isinstance(a, Fraction) and isinstance(b, Fraction) and tolerance is _CLOSE:
            return a == b
        a, b = _lift(a), _lift(b)
        return abs(a - b) <= tolerance * max(abs(a), abs(b))

    def agree(self, x: Fraction | Z, y: Fraction | Z) -> bool:
        """To 9 significant digits, cut or rounded?"""
        x, y = _lift(x), _lift(y)
        digit = _ONE.scaleb(abs(x).adjusted() - 8) if abs(x) else _ZERO
        return abs(x - y) <= max(Decimal("1.001e-9") * abs(x), digit / 2)

    def same_value(self, a: Node, b: Node, radians: tuple[bool, bool] = (False, False)) -> bool:
        """Schwartz-Zippel: equal at several random points is equal.  Constants need one evaluation."""
        names = free_names(a) | free_names(b)
        if not names:
            x, y = self.value(a, radians=radians[0]), self.value(b, radians=radians[1])
            if self.close(x, y):
                self.rule = "equal exactly" if isinstance(x, Fraction) and isinstance(y, Fraction) else "equal to 45 digits"
                return True
            if max(shown_digits(a), shown_digits(b)) >= 9 and self.agree(x, y):
                self.rule = "decimal agrees to 9 digits"
                return True
            return False
        pairs = []
        for point in range(9):
            if sum(real for real, _, _ in pairs) == 4:
                break
            self.strayed = False
            try:
                x, y = self.value(a, point, radians=radians[0]), self.value(b, point, radians=radians[1])
            except (Undefined, ArithmeticError):
                self.spend(1)
                continue
            real = not self.strayed and all(isinstance(v, Fraction) or v.real() for v in (x, y))
            if real and not self.close(x, y):
                return False
            pairs.append((real, x, y))
        used = [p for p in pairs if p[0]]
        if len(used) < 2:                                 # nowhere real: complex values decide
            used = pairs
        self.rule = f"equal at {len(used)} random points"
        return len(used) >= 2 and all(self.close(x, y) for _, x, y in used)

    def proportional(self, a: Node, b: Node, positive: bool = False) -> bool:
        """Is a = k * b with one constant k != 0 (k > 0)?  Decides equations and inequalities."""
        if not free_names(a) or free_names(a) != free_names(b):
            return False
        ratios = []
        for point in range(4):
            try:
                x, y = self.value(a, point), self.value(b, point)
                ratios.append(_lift(x) * _lift(y).inverse())
            except (Undefined, ArithmeticError):
                self.spend(1)
        return (len(ratios) >= 3 and abs(ratios[0]) > 0 and all(self.close(r, ratios[0]) for r in ratios)
                and (not positive or ratios[0].re > 0))

    # -- comparison of trees

    def same(self, a: Node, b: Node) -> bool:
        """Are the two trees the same answer?  Sets self.rule.  Raises Undefined where a needed value has none."""
        self.spend(1)
        if a == b:
            self.rule = "same expression"
            return True
        a, b = plain(a, self), plain(b, self)
        left, right = expand(a), expand(b)
        if len(left) != 1 or len(right) != 1:
            if is_set(a) and is_set(b) and not a.op == b.op == "sequence":
                return self.same_set(a, b)
            return self.same_list(left, right)
        a, b = left[0], right[0]
        if a.op == "relation" and b.op == "relation":
            return self.same_relation(a, b)
        if is_set(a) and is_set(b) and not a.op == b.op == "sequence":
            return self.same_set(a, b)
        if a.op == "relation" or b.op == "relation":
            relation, other = (a, b) if a.op == "relation" else (b, a)
            right = defined(relation, self)
            return right is not None and self.same(right, other)
        if a.op in _VECTORS or b.op in _VECTORS:
            return self.same_vector(a, b)
        if a.op in ("base", "ratio") or b.op in ("base", "ratio"):
            self.rule = "same base and digits" if a.op == "base" else "ratio"
            return a.op == b.op and len(a.args) == len(b.args) and (
                a.args == b.args if a.op == "base" else all(self.same(x, y) for x, y in zip(a.args, b.args)))
        if a.op == "name" and b.op == "name":
            self.rule = "option letter"
            return a.args == b.args or a.args[0].lower() == b.args[0].lower() and a.args[0].lower() in "abcdefghj"
        if infinite(a) or infinite(b):
            self.rule = "infinity"
            return infinite(a) == infinite(b)
        return self.same_scalar(a, b)

    def same_scalar(self, a: Node, b: Node) -> bool:
        if self.same_value(a, b):
            return True
        if (a.op == "%") != (b.op == "%"):
            bare = [n.args[0] if n.op == "%" else n for n in (a, b)]
            if self.same_value(*bare):
                self.rule = "percent sign dropped"
                return True
        if (a.op == "degrees") != (b.op == "degrees") and self.same_value(a, b, (a.op == "degrees", b.op == "degrees")):
            self.rule = "degrees as radians"
            return True
        return False

    def same_list(self, left: list[Node], right: list[Node]) -> bool:
        """Multisets.  Equality is nearly transitive, so the first partner found is as good as any."""
        self.rule = "lists of different length"
        if len(left) != len(right):
            return False
        rest = list(right)
        for item in left:
            for i, other in enumerate(rest):
                try:
                    found = self.same(item, other)
                except (Undefined, ArithmeticError):
                    self.spend(1)
                    found = False
                if found:
                    del rest[i]
                    break
            else:
                self.rule = "a list item has no partner"
                return False
        self.rule = "lists match item by item"
        return True

    def same_vector(self, a: Node, b: Node) -> bool:
        self.rule = "tuple, interval or matrix against something else"
        if a.op == b.op == "sequence":
            if (a.args[0], a.args[2]) != (b.args[0], b.args[2]):
                self.rule = "different brackets"
                return False
            x, y = a.args[1], b.args[1]
        elif a.op == b.op:
            if [len(r) for r in a.args] != [len(r) for r in b.args]:
                return False
            x, y = ([item for row in n.args for item in row] for n in (a, b))
        else:
            x, y = entries(a), entries(b)
        if x is None or y is None or len(x) != len(y):
            return False
        same = all(self.same(p, q) for p, q in zip(x, y))
        self.rule = "entries match in order" if same else "an entry differs"
        return same

    def same_relation(self, a: Node, b: Node) -> bool:
        signs, sides, signs2, sides2 = a.args[0], a.args[1:], b.args[0], b.args[1:]
        if signs == signs2 and all(self.try_same(x, y) for x, y in zip(sides, sides2)):
            self.rule = "same relation"
            return True
        x, y = reversed_relation(a), reversed_relation(b)
        if x.args[0] == y.args[0] and all(self.try_same(p, q) for p, q in zip(x.args[1:], y.args[1:])):
            self.rule = "same relation"
            return True
        if signs[-1] == signs2[-1] == "=" and set(signs + signs2) == {"="}:
            if len(signs) == len(signs2) == 1:
                f, g = function_body(a), function_body(b)
                if f and g and f[0] == g[0]:
                    return self.same(f[1], g[1])
                self.rule = "equation up to a factor"
                return self.proportional(difference(a), difference(b))
            right, right2 = defined(a, self), defined(b, self)
            return right is not None and right2 is not None and sides[0] == sides2[0] and self.same(right, right2)
        if is_set(a) and is_set(b) and self.same_set(a, b):
            return True
        if len(signs) == len(signs2) == 1 and x.args[0] == y.args[0] and x.args[0][0] in ("<", "<="):
            self.rule = "inequality up to a positive factor"
            return self.proportional(difference(x), difference(y), positive=True)
        return False

    def try_same(self, a: Node, b: Node) -> bool:
        try:
            return self.same(a, b)
        except (Undefined, ArithmeticError):
            self.spend(1)
            return False

    # -- sets of reals

    def same_set(self, a: Node, b: Node) -> bool:
        (name, left), (name2, right) = set_parts(a), set_parts(b)
        self.rule = "different unknowns"
        if name and name2 and name != name2:
            return False
        self.rule = "intervals"
        try:
            one, two = self.normal(left), self.normal(right)
        except (Undefined, ArithmeticError):              # symbolic end points
            self.spend(1)
            return self.same_list(left, right)
        return len(one) == len(two) and all(
            p[0] == q[0] and p[3] == q[3] and _near(p[1], q[1]) and _near(p[2], q[2]) for p, q in zip(one, two))

    def normal(self, parts: list[Node]) -> list[tuple[str, Decimal, Decimal, str]]:
        """Intervals as (bracket, low, high, bracket), sorted, with overlapping and touching ones merged."""
        found = []
        for part in parts:
            low, high = (self.end_point(n) for n in part.args[1])
            if low > high or low == high and part.args[0] + part.args[2] != "[]":
                raise Undefined("empty interval")
            found.append((part.args[0] if low.is_finite() else "(", low, high, part.args[2] if high.is_finite() else ")"))
        found.sort(key=lambda p: (p[1], p[0] == "("))
        merged = found[:1]
        for bracket, low, high, end in found[1:]:
            open0, low0, high0, end0 = merged[-1]
            if low < high0 or _near(low, high0) and (bracket == "[" or end0 == "]"):
                merged[-1] = (open0, low0, *max((high0, end0), (high, end)))
            else:
                merged.append((bracket, low, high, end))
        return merged

    def end_point(self, node: Node) -> Decimal:
        if sign := infinite(node):
            return Decimal("Infinity") * sign
        if free_names(node):
            raise Undefined("symbolic end point")
        value = _lift(self.value(node))
        if not value.real():
            raise Undefined("complex end point")
        return value.re


_VECTORS = {"sequence", "matrix", "determinant"}
_INTEGERS = {Node("name", (name,)) for name in ("Z", "N", "blackboard Z", "blackboard N")}
_CONSTANTS = {"pi", "e", "i"}


def _near(a: Decimal, b: Decimal) -> bool:
    return a == b or a.is_finite() and b.is_finite() and abs(a - b) <= _CLOSE * max(abs(a), abs(b))


def _whole(value: Fraction | Z) -> int:
    if isinstance(value, Fraction) and value.denominator == 1:
        return value.numerator
    raise Undefined("not a whole number")


def _integer_power(z: Z, n: int) -> Z:
    if n < 0:
        return _integer_power(z, -n).inverse()
    result = Z(_ONE)
    while n:
        if n & 1:
            result = result * z
        n >>= 1
        z = z * z if n else z
    return result


@lru_cache(maxsize=4096)
def _name_value(name: str, point: int, op: str) -> Fraction | Z:
    """Constants, and for every other name a random rational that depends on the name and the point only.

    Points 0 and 3 lie in (0, 1), where arcsin and the like are real, 1 and 4 above, 2 and 5 below zero; 6, 7 and 8 are
    integers, for factorials."""
    if op == "name":
        if name == "pi":
            return Z(_PI)
        if name == "e":
            with localcontext(_CONTEXT):
                return Z(_ONE.exp())
        if name == "i":
            return _I
        if name in ("infty", "emptyset") or name.startswith("blackboard"):
            raise Undefined(name)
    seed = int.from_bytes(blake2b(f"{name}/{point}".encode("utf-8", "replace"), digest_size=8).digest(), "big")
    if point > 5:
        return Fraction(2 + seed % 39)
    low, high = ((1, 996), (1009, 4001), (-3989, -101))[point % 3]
    return Fraction(low + seed % (high - low + 1), 997)


def free_names(node: Node) -> set[str]:
    """The names in a tree that stand for unknowns."""
    if node.op in ("name", "text", "opaque"):
        return set() if node.op == "name" and node.args[0] in _CONSTANTS else {node.args[0]}
    if node.op in ("num", "base"):
        return set()
    found: set[str] = set()
    for arg in node.args:
        for child in (arg,) if isinstance(arg, Node) else arg if isinstance(arg, tuple) else ():
            if isinstance(child, Node):
                found |= free_names(child)
    return found


def shown_digits(node: Node) -> int:
    """Significant digits of a decimal literal, also signed, in percent or times a power of ten; 0 for all else."""
    if node.op == "num":
        return node.args[1]
    if node.op in ("neg", "%", "degrees") and node.args:
        return shown_digits(node.args[0])
    if node.op == "*" and len(node.args) == 2 and node.args[1].op == "^" and node.args[1].args[0] == _number("10"):
        return shown_digits(node.args[0])
    return 0


def infinite(node: Node) -> int:
    """+1 or -1 for plus or minus infinity, else 0."""
    if node.op == "neg":
        return -infinite(node.args[0])
    return int(node == Node("name", ("infty",)))


def plain(node: Node, judge: Judge) -> Node:
    """Drop what is a remark: the part after an approximation sign, and the names in 'm+n = 2+3 = 5'."""
    if node.op == "relation" and "\\approx" in node.args[0]:
        start = 1 if label(node.args[1]) else 0
        if "\\approx" not in node.args[0][start:]:         # x \\approx 3.14
            return Node("relation", (("=",) + node.args[0][1:], *node.args[1:]))
        cut = node.args[0].index("\\approx", start)
        node = Node("relation", (node.args[0][:cut], *node.args[1:cut + 2])) if cut else node.args[1]
    if node.op == "relation" and node.args[0] == ("\\in",) and node.args[2].op == "list" and label(node.args[1]):
        return node.args[2]
    if node.op == "list":                                 # 2k\pi, k \in \mathbb{Z}: what k is, is a remark
        kept = [item for item in node.args[1:]
                if not (item.op == "relation" and item.args[0] == ("\\in",) and item.args[2] in _INTEGERS)]
        node = Node("list", (node.args[0], *kept)) if kept else node
    if node.op == "list" and len(node.args) == 2:
        return plain(node.args[1], judge)
    return node


def expand(node: Node) -> list[Node]:
    """The answers a tree stands for: list items, and both branches of plus-minus."""
    if node.op == "list":
        return [one for item in node.args[1:] for one in expand(item)]
    if node.op == "sequence" and any(has_sign(item) for item in node.args[1]):
        choices = [expand(item) for item in node.args[1]]
        if math.prod(map(len, choices)) <= 64:
            return [Node("sequence", (node.args[0], items, node.args[2])) for items in product(*choices)]
    if node.op not in ("sequence", "matrix") and has_sign(node):
        return [with_sign(node, 1), with_sign(node, -1)]
    return [node]


def has_sign(node: Node) -> bool:
    return node.op == "pm" or any(isinstance(a, Node) and has_sign(a) for a in node.args)


def with_sign(node: Node, sign: int) -> Node:
    if node.op == "pm":
        inner = with_sign(node.args[0], sign)
        return inner if sign > 0 else Node("neg", (inner,))
    return Node(node.op, tuple(with_sign(a, sign) if isinstance(a, Node) else a for a in node.args))


def entries(node: Node) -> tuple | None:
    """The entries of a tuple in round brackets, or of a matrix with one row or column."""
    if node.op == "sequence":
        return node.args[1] if node.args[0] == "(" and node.args[2] == ")" or len(node.args[1]) > 2 else None
    if node.op == "matrix" and (len(node.args) == 1 or all(len(row) == 1 for row in node.args)):
        return tuple(item for row in node.args for item in row)
    return None


def label(node: Node) -> bool:
    """Can this left side be dropped from 'left = value'?  Names, words, f(x), T(10), ratios and sums of names."""
    if node.op in ("name", "text", "opaque"):
        return node.op != "name" or node.args[0] not in ("pi", "infty")
    if node.op == "*":
        return label(node.args[0]) and all(label(a) or i == 1 and a.op == "num" for i, a in enumerate(node.args))
    if node.op == "sequence":
        return all(map(label, node.args[1]))
    if node.op == "^":                                    # f^{-1}
        return label(node.args[0]) and node.args[1] == Node("neg", (_number("1"),))
    return node.op in ("+", "inverse", "call") and all(label(a) for a in node.args if isinstance(a, Node))


def defined(relation: Node, judge: Judge) -> Node | None:
    """The value that 'name = ... = value' states, None if it is no definition or contradicts itself (4 = 3)."""
    signs, sides = relation.args[0], relation.args[1:]
    if set(signs) == {"\\in"} and len(sides) == 2 and label(sides[0]):
        return sides[1]
    if set(signs) != {"="}:
        return None
    for side in sides[:-1]:
        if not label(side) and not judge.try_same(side, sides[-1]):
            return None
    return sides[-1]


def function_body(relation: Node) -> tuple[str, Node] | None:
    """('f', body with its argument renamed) for 'f(x) = body'."""
    left = relation.args[1]
    if left.op == "*" and len(left.args) == 2 and all(a.op == "name" for a in left.args):
        return left.args[0].args[0], rename(relation.args[2], left.args[1])
    return None


def rename(node: Node, name: Node) -> Node:
    if node == name:
        return Node("name", ("argument",))
    return Node(node.op, tuple(rename(a, name) if isinstance(a, Node) else a for a in node.args))


def difference(relation: Node) -> Node:
    return Node("+", (relation.args[1], Node("neg", (relation.args[2],))))


def reversed_relation(node: Node) -> Node:
    """The same chain read so that its first inequality sign points left: 3 > x becomes x < 3."""
    turned = {">": "<", ">=": "<="}
    if node.args[0][0] not in turned:
        return node
    return Node("relation", (tuple(turned.get(s, s) for s in node.args[0][::-1]), *node.args[:0:-1]))


def is_set(node: Node) -> bool:
    return set_parts(node) is not None and not (node.op == "relation" and node.args[0] == ("=",))


def set_parts(node: Node) -> tuple[str | None, list[Node]] | None:
    """(unknown, intervals) of an interval, a union of them or an inequality; None for anything else."""
    def interval(low: str, a: Node, b: Node, high: str) -> Node:
        return Node("sequence", (low, (a, b), high))

    infinity = Node("name", ("infty",))
    below = Node("neg", (infinity,))
    if node.op == "sequence" and len(node.args[1]) == 2:
        return None, [node]
    if node == Node("name", ("blackboard R",)):
        return None, [interval("(", below, infinity, ")")]
    if node.op == "\\cup" or node.op == "list" and node.args[0] == "or":
        found = [set_parts(n) for n in (node.args if node.op == "\\cup" else node.args[1:])]
        if node.op == "\\cup":                            # a union may contain {1}
            found = [f or (None, [interval("[", x, x, "]") for x in n.args[1:]] if n.op == "list" else None)
                     for f, n in zip(found, node.args)]
        names = {f[0] for f in found if f and f[1]}
        if all(f and f[1] for f in found) and len(names) == 1:
            return names.pop(), [p for f in found for p in f[1]]
        return None
    if node.op == "\\setminus":
        whole, out = set_parts(node.args[0]), node.args[1]
        if whole and len(whole[1]) == 1 and out.op == "list" and len(out.args) == 2:
            (_, (low, high), _), left, right = whole[1][0].args, whole[1][0].args[0], whole[1][0].args[2]
            return None, [interval(left, low, out.args[1], ")"), interval("(", out.args[1], high, right)]
        return None
    if node.op != "relation":
        return None
    node = reversed_relation(node)
    signs, sides = node.args[0], node.args[1:]
    if signs == ("\\in",) and set_parts(sides[1]):
        return (str(sides[0]), set_parts(sides[1])[1]) if label(sides[0]) else None
    if len(signs) == 1:
        left, right = sides
        if label(left) and signs[0] in ("=", "!=", "<", "<="):
            end = {"<": ")", "<=": "]"}
            if signs[0] == "=":
                return str(left), [interval("[", right, right, "]")]
            if signs[0] == "!=":
                return str(left), [interval("(", below, right, ")"), interval("(", right, infinity, ")")]
            return str(left), [interval("(", below, right, end[signs[0]])]
        if label(right) and signs[0] in ("<", "<="):
            return str(right), [interval("(" if signs[0] == "<" else "[", left, infinity, ")")]
    if len(signs) == 2 and set(signs) <= {"<", "<="} and label(sides[1]):
        return str(sides[1]), [interval("(" if signs[0] == "<" else "[", sides[0], sides[2], ")" if signs[1] == "<" else "]")]
    return None


# -- the public comparison

_PLAIN_INTEGER = re.compile(r"-?[0-9]{1,400}")


_OPTION = re.compile(r"[\s$]*(?:\\(?:text|math)(?:bf|rm)?\{)?\s*(?:\(([A-J])\)|([A-J])[.:)])[}\s\\~$]*[A-Za-z0-9]", re.A)


def answers_equal(answer: str, gold: str) -> bool:
    """Are two answers the same mathematics, by CONVENTIONS?  Never raises, on any two strings."""
    return _compare(answer, gold)[0]


def _compare(answer: str, gold: str) -> tuple[bool, str]:
    answer, gold = answer.strip(), gold.strip()
    if not answer or not gold:
        return False, "empty"
    if _PLAIN_INTEGER.fullmatch(answer) and _PLAIN_INTEGER.fullmatch(gold):
        return int(answer) == int(gold), "integers"
    if max(len(answer), len(gold)) > MAX_CHARS:
        return answer == gold, "too long to read: compared as text"
    if answer == gold:
        return bool(re.search(r"[^\s{}$\\]", _IGNORED.sub("", _TEXT.sub(r"\1", answer)))), "same text"
    readings = [True, False] if _GROUPED.search(answer) or _GROUPED.search(gold) else [True]
    rule = ""
    for grouped in readings:                              # 1,000 first as one number, then as two
        same, rule = _compare_trees(answer, gold, grouped)
        if same:
            return True, rule
    return False, rule


def _words(text: str) -> str:
    """The words of a prose answer in one form; '' if there is any mathematics in it."""
    text = _IGNORED.sub(" ", _TEXT.sub(r" \1 ", text))
    if not re.search("[A-Za-z]{2}", text) or re.search(r"[^\w\s.,;:'\"!?(){}-]", text):
        return ""
    return re.sub(r"[-.](?!\d)|[^\w.-]", "", text).casefold()


def _compare_trees(answer: str, gold: str, grouped: bool) -> tuple[bool, str]:
    trees = []
    for text in (answer, gold):
        try:
            trees.append(parse(text, grouped))
        except Unreadable as error:
            trees.append(Node("unreadable", (str(error),)))
    a, b = trees
    for text, other in ((answer, b), (gold, a)):          # "(C) 12" against C
        option = _OPTION.match(text)
        if option and other.op == "name" and other.args[0].upper() in "ABCDEFGHIJ":
            return (option[1] or option[2]) == other.args[0].upper(), "option letter before its text"
    if {"text", "unreadable"} & {a.op, b.op} and _words(answer) and _words(answer) == _words(gold):
        return True, "same words"
    if "unreadable" in (a.op, b.op):
        if a.op != b.op:
            who, why = ("answer", a.args[0]) if a.op == "unreadable" else ("gold", b.args[0])
            return False, f"{who} is not readable: {why}"
        bare = ["".join(_IGNORED.sub("", text).split()) for text in (answer, gold)]
        return bare[0] == bare[1], "not readable: compared as text"
    judge = Judge()
    try:
        with localcontext(_CONTEXT):
            return judge.same(a, b), judge.rule
    except (Undefined, ArithmeticError) as error:
        return False, f"no value: {error}" if isinstance(error, Undefined) else "no value: out of range"


def explain(response: str, gold: str, boxed_only: bool = True) -> tuple[bool, str | None, str]:
    """(verdict, extracted answer, the rule that decided in a few words) for a whole response."""
    answer = extract_answer(response, boxed_only)
    if answer is None:
        return False, None, "no boxed answer" if boxed_only else "no answer"
    verdict, rule = _compare(answer, gold)
    return verdict, answer, rule


def verify(response: str, gold: str, boxed_only: bool = True) -> bool:
    """Is the answer of a whole response right?  Never raises."""
    return explain(response, gold, boxed_only)[0]


# ---------------------------------------------------------------------------------------------------------------------
# 5. Eq. 1
# ---------------------------------------------------------------------------------------------------------------------

EXPLORATIONS = ("none", "length", "steps")


@dataclass(frozen=True)
class RewardParts:
    """Every part of Eq. 1 by name, for logs and the report."""

    total: float         # R
    outcome: float       # c: 1.0 right, 0.0 wrong, NO_ANSWER without a boxed answer
    correct: bool        # did the verifier accept?
    answer: str | None   # what was extracted
    reason: str          # the rule that decided
    exploration: float   # R_ex, not yet weighted
    alpha: float         # the weight that was used; 1.0 without exploration
    length: int          # reasoning tokens before the last box, without repetition
    steps: int           # reasoning lines before the last box, without repetition
    floored: bool        # did the length term stop at its floor?


def score(response: str, gold: str, *, exploration: str = "none", alpha: float = 0.8, length_scale: float = 1000.0,
          length_floor: float = 4.0, steps_scale: float = 10.0, truncated: bool = False,
          count_tokens: Callable[[str], int] | None = None) -> RewardParts:
    """Eq. 1 of the paper for one response: R = alpha * c + (1 - alpha) * R_ex.

    `exploration` chooses R_ex:
      none    R = c
      length  -min(length_scale / length, length_floor), a price that falls with more reasoning.  With alpha = 0.8 and
              floor 4 the term is at worst -0.8: it can cancel a right answer and no more.
      steps   min(1, steps / steps_scale)
    length is in tokens of `count_tokens` (default: words and punctuation signs).  Only what stands before the last box
    counts, once: what repeated_spans() finds is not paid for, nor is padding after the answer.
    A response cut by the token limit (`truncated`) is scored by the box it holds, complete or not at all.
    Raises ValueError for an unknown `exploration` or a number out of range; no error here becomes a reward.

    Departures from the official code (github.com/GuanghaoYe/Emergence-of-Thinking): it takes the text before the FIRST
    box, counts characters / 4, and adds the length term unweighted; a response that starts with \\boxed divided by
    zero there and earned 0.0, more than an honest short answer.  NO_ANSWER is its value; the paper has none.
    """
    if exploration not in EXPLORATIONS:
        raise ValueError(f"exploration {exploration!r}: choose one of {', '.join(EXPLORATIONS)}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha!r} is not in [0, 1]")
    for name, value in (("length_scale", length_scale), ("length_floor", length_floor), ("steps_scale", steps_scale)):
        if not value > 0:
            raise ValueError(f"{name} {value!r} is not above 0")
    correct, answer, reason = explain(response, gold)
    if truncated and answer is not None and not _box_is_closed(response):
        correct, answer, reason = False, None, "the token limit cut the box"
    outcome = 1.0 if correct else 0.0 if answer is not None else NO_ANSWER
    box = last_box(response)
    reasoning = without_repetition(response[:box] if box >= 0 else response)
    length = (count_tokens or _count_words)(reasoning)
    steps = sum(1 for line in reasoning.split("\n") if _STEP.search(line))
    r_ex, floored = 0.0, False
    if exploration == "length":
        floored = length * length_floor <= length_scale
        r_ex = -length_floor if floored else -length_scale / length
    elif exploration == "steps":
        r_ex = min(1.0, steps / steps_scale)
    if exploration == "none":
        alpha = 1.0
    return RewardParts(alpha * outcome + (1 - alpha) * r_ex, outcome, correct, answer, reason, r_ex, alpha, length, steps, floored)


_WORD = re.compile(r"\w+|[^\w\s]")
_STEP = re.compile(r"[A-Za-z0-9]")                        # a line of rules or stars is no step


def _count_words(text: str) -> int:
    return sum(1 for _ in _WORD.finditer(text))


def _box_is_closed(text: str) -> bool:
    head = _BOX_HEAD.match(text, last_box(text))
    return text[head.end():head.end() + 1] != "{" or _closing_brace(text, head.end()) >= 0


# ---------------------------------------------------------------------------------------------------------------------
# 6. Behaviours and repetition
# ---------------------------------------------------------------------------------------------------------------------

# The behaviours of the paper's Appendix A, as phrases at word boundaries in either case.  Alternatives of plain words
# only: linear time.  A phrase counts each time it occurs.
BEHAVIOURS = {
    "backtracking": r"wait|hold on|(?:let me|let's|let us|i'?ll|we) go back|go(?:ing)? back to|back up|back to the (?:start|beginning)"
                    r"|try again|try another|start over|start again|dead end|does(?:n't| not) work|that fails|backtrack(?:ing)?",
    "verification": r"let me check|let's check|let us check|let me verify|let's verify|verify|verif(?:ied|ying|ication)"
                    r"|check(?:ing)?|double[- ]check(?:ing)?|to confirm|let me confirm|sanity check|plug(?:ging)? (?:it |this )?back",
    "alternatives": r"alternatively|another (?:approach|way|method|idea)|(?:a )?different (?:approach|way|method)|other (?:approach|way|method)"
                    r"|on the other hand|what if|instead,? (?:let's|let me|we|i) (?:can|could|try)",
    "self_correction": r"(?:that's|that is|this is|it's|i was) (?:wrong|incorrect|not right|not correct|a mistake)|i made (?:a|an) (?:mistake|error)"
                       r"|my mistake|correction|i miscalculated|i misread|i was mistaken|let me (?:fix|correct)|should (?:actually )?(?:be|have been) instead",
}
_BEHAVIOURS = {name: re.compile(rf"\b(?:{phrases})\b", re.I) for name, phrases in BEHAVIOURS.items()}


def behaviours(text: str) -> dict[str, int]:
    """How often each behaviour of BEHAVIOURS occurs in `text`."""
    text = text.replace("\u2019", "'")
    return {name: sum(1 for _ in pattern.finditer(text)) for name, pattern in _BEHAVIOURS.items()}


_NGRAM = 8                                                # words; shorter runs recur in honest mathematics


def repeated_spans(text: str) -> tuple[list[tuple[int, int]], int, int]:
    """Spans of `text` said before, and how many of its words they hold: ([(start, end)], repeated, all).

    A word is repeated if it lies in a line that occurred before (same words, whatever the case, spaces and
    punctuation) or in an 8-word sequence that did.  Numbers are words: "Try x = 3" and "Try x = 4" are different.
    """
    words: list[tuple[str, int, int]] = []
    lines: set[tuple[str, ...]] = set()
    again: list[bool] = []
    start = 0
    for line in text.split("\n"):
        found = [(m.group().casefold(), start + m.start(), start + m.end()) for m in re.finditer(r"\w+|[-+*/^=<>]", line)]
        key = tuple(w for w, _, _ in found)
        again += [bool(key) and key in lines] * len(key)
        lines.add(key)
        words += found
        start += len(line) + 1
    seen: set[tuple[str, ...]] = set()
    text_words = [w for w, _, _ in words]
    for i in range(len(words) - _NGRAM + 1):
        gram = tuple(text_words[i:i + _NGRAM])
        if gram in seen:
            again[i:i + _NGRAM] = [True] * _NGRAM
        seen.add(gram)
    spans: list[tuple[int, int]] = []
    for i, (_, begin, end) in enumerate(words):
        if again[i]:
            if spans and i and again[i - 1]:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((begin, end))
    return spans, sum(again), len(again)


def without_repetition(text: str) -> str:
    """`text` with every repeated span taken out; its line breaks stay."""
    kept, at = [], 0
    for begin, end in repeated_spans(text)[0]:
        kept += [text[at:begin], "\n" * text.count("\n", begin, end)]
        at = end
    lines = "".join(kept + [text[at:]]).split("\n")
    return "\n".join(line for line in lines if _STEP.search(line))


def repetition(text: str) -> float:
    """The share, 0 to 1, of the words of `text` that repeat an earlier line or 8-word sequence."""
    _, repeated, words = repeated_spans(text)
    return repeated / words if words else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# 7. Command line
# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python rewards.py ANSWER GOLD", file=sys.stderr)
        return 2
    verdict, rule = _compare(*arguments)
    print("equal" if verdict else "not equal", "by rule:", rule)
    for name, text in zip(("answer", "gold"), arguments):
        try:
            tree = str(parse(text))
        except Unreadable as error:
            tree = f"not readable: {error}"
        print(f"{name:6s} {tree}")
    return 0 if verdict else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
