"""Do two answers mean the same?  A grammar for what people write into \\boxed{}, and equality by value.  Standard library only.

Both answers are read with one grammar into small trees (sections 1 and 2) and compared by value (sections 3 and 4): exactly
where all is rational, else to 45 digits, at random points where there are unknowns.  What mathematics does not decide,
rewards.CONVENTIONS does.  Answers come from a policy that is paid for passing: text, depth, the size of numbers and the
number of evaluation steps are bounded, nothing is executed, and what cannot be read is equal to nothing but itself.
"""
from __future__ import annotations

import decimal
import math
import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b

MAX_CHARS, MAX_TOKENS, MAX_DEPTH = 12_000, 2_000, 40      # beyond these only the same text is the same answer
MAX_BITS, MAX_WORK = 40_000, 3_000                        # size of exact numbers; evaluation steps for one comparison

# -- 1. Tokens --------------------------------------------------------------------------------------------------------

class Unreadable(Exception):
    """The text is not an answer in our grammar."""

class Undefined(ArithmeticError):
    """The expression has no value at this point, or one too large for our bounds."""

def _table(text: str) -> dict[str, str]:
    return dict(zip(text.split()[::2], text.split()[1::2]))

_GREEK = "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi omega".split()
_LETTERS = {*_GREEK, *map(str.title, _GREEK), *"varepsilon varphi Pi ell dots triangle angle".split()}
_UNICODE = {ord(k): v + " " for k, v in _table(
    r"− - – - — - × * ⋅ * · * ∗ * ÷ / ∕ / ⁄ / ≤ <= ⩽ <= ≥ >= ⩾ >= ≠ != ≈ \approx ∞ \infty π \pi √ \surd ∛ cbrt ° \degree ∪ \cup "
    r"∩ \cap ± \pm ∓ \mp ∈ \in ≡ \equiv ∅ \emptyset ℝ \mathbb{R} ’ ' ′ ' ⌊ \lfloor ⌋ \rfloor ⌈ \lceil ⌉ \rceil ： : ， ,").items()}
_UNICODE |= {ord(unicodedata.lookup(f"GREEK SMALL LETTER {name.replace('lambda', 'lamda')}")): f"\\{name} " for name in _GREEK}
_UNICODE |= dict.fromkeys(map(ord, "“”‘€£\u00a0\u2009\u202f"), " ")
_RAISED = dict(zip(map(ord, "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ₀₁₂₃₄₅₆₇₈₉"), "0123456789-+n0123456789"))
_COMMANDS = _table(                                       # spellings of the same token; plain words as well
    r"\cdot * \times * \ast * \div / \le <= \leq <= \leqslant <= \lt < \ge >= \geq >= \geqslant >= \gt > \ne != \neq != == = "
    r"** ^ \% % \lbrack [ \rbrack ] \langle ( \rangle ) \lvert | \rvert | \vert | \mid | \backslash \setminus \dfrac \frac "
    r"\tfrac \frac \cfrac \frac \dbinom \binom \tbinom \binom \lbrace \{ \rbrace \} \circ \degree \deg \degree \pmod \mod "
    r"\bmod \mod \sim \approx \simeq \approx \cong \approx \colon : \varnothing emptyset \emptyset emptyset \infty infty \pi pi "
    r"\dot \overline \bar \overline \prime ' infinity infty inf infty pi pi percent % percentage % pct % degrees \degree "
    r"degree \degree and \and or \or \land \and \lor \or union \cup \ldots \dots \cdots \dots")
_FUNCTIONS = "arcsin arccos arctan floor sinh cosh tanh sqrt cbrt ceil sin cos tan cot sec csc log exp abs ln lg".split()
_UNITS = set("cm mm km kg mg ft mph lb lbs oz ml hr hrs rad sq mi yd day USD the The of is are to no No yes Yes for all".split())
_HEDGES = set("least most than squared cubed not maybe perhaps probably possibly either if unless but ignore roughly".split())
_SAYINGS = dict.fromkeys(("empty set", "no solution", "no solutions", "no real solution", "no real solutions"), "emptyset")
_SAYINGS |= {"all real numbers": "blackboard R", "all reals": "blackboard R", "infinitely many": "infty"}
_TIGHT = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\{,\}|\\,\\!|,\\!|\\,|\\!|\\ |[ ~])[ ]?\d{3})+(?!\d)", re.A)
GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?", re.A)
_IGNORED = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits)(?![a-zA-Z])|(?<!\\)\\[,;:! ]|\\q?quad|\\\$|[$~]"
    r"|\\(?:phantom|label|tag|color|textcolor|[hv]space)\*?\{[^{}]*\}|\\(?:f?box(?:ed)?|underline)(?=\{)"
    r"|\\(?:tiny|small|large|Large|LARGE|huge|Huge|square|blacksquare|Box|qed)(?![a-zA-Z])"
    r"|\^\s*\{?\s*\x01(?:th|st|nd|rd)\x02\s*\}?")
_TEXT = re.compile(r"\\(?:text(?!color)[a-z]*|[mh]box|math(?:rm|bf|it|sf)|operatorname|bold|boldsymbol|rm|bf)\*?\s*\{([^{}]*)\}")
_REMARK = re.compile(r"[,\s]*\x01[,\s]*(?:for (?:all|any|some|every|each)|where)\b.*", re.S)      # ... for all n
_MARK = re.compile(r"\^\s*\{?\s*(\\circ|\\degree|\\prime|')(?![a-z])\s*\}?|\^o\b")           # degrees and primes are raised
_TOKEN = re.compile(r"(?P<space>\s+)|(?P<num>(?:\d+\.\d+|\d+\.?(?!\d)|\.\d+)(?:[eE][+-]?\d+(?![A-Za-z\d]))?)"
                    r"|(?P<op>\\(?:begin|end)\s*\{\w+\*?\}|\\[A-Za-z]+|\\.|<=|>=|!=|==|\*\*|[-+*/^_=<>(){}\[\]|,;:!%&'])"
                    r"|(?P<word>[A-Za-z]+)|(?P<prose>[\x01\x02])", re.S | re.A)
_ACCENTS = "\\overline \\vec \\hat \\tilde \\widehat \\overrightarrow \\mathbb \\mathcal".split()
_BIG = ("\\lim", "\\sum", "\\prod", "\\int")
_SIGNS = ("+", "-", "\\pm", "\\mp")
_LEVELS = ("= \\equiv < <= > >= != \\in \\approx".split(), ("\\cup", "\\cap", "\\setminus"), (":", "\\mod"), _SIGNS)
_POSTFIX = {"!", "%", "\\degree", "'", "_"}
_RANK = {sign: rank for rank, level in enumerate(_LEVELS) for sign in level}
_OPENERS = {*"( [ { \\{ \\frac \\binom \\surd \\lfloor \\lceil".split(), *_ACCENTS, *_BIG, *("\\" + name for name in _FUNCTIONS)}

def ascii_spelling(text: str) -> str:
    """x² as x^{2}, ½ as \\frac{1}{2}, α as \\alpha, ≤ as <=.  Digits of other scripts stay as they are: unreadable."""
    text = re.sub("[⁰¹²³⁴-⁹⁻⁺ⁿ]+", lambda m: "^{" + m[0].translate(_RAISED) + "}", text.translate(_UNICODE))
    text = re.sub("[₀-₉]+", lambda m: "_{" + m[0].translate(_RAISED) + "}", text)
    text = re.sub("[\U0001d400-\U0001d7cb]", lambda m: unicodedata.normalize("NFKC", m[0]), text)   # mathematical fonts
    fraction = lambda m: "\\frac{%d}{%d}" % Fraction(unicodedata.numeric(m[0])).limit_denominator(10).as_integer_ratio()
    return re.sub("[¼-¾⅐-⅞]", fraction, text)

def tokens(text: str, grouped: bool) -> list[str]:
    """Numbers, names (a letter or 'alpha'), prose words ('"cm'), operators and commands. `grouped`: is 1,000 one number?"""
    if len(text) > MAX_CHARS: raise Unreadable("too long")
    if not text.isascii(): text = ascii_spelling(text)
    if "\\begin" not in text and ("\\" in text or "\n" in text):              # \\frac for \frac; a blank line separates answers
        text = re.sub(r"\\\\(?=[A-Za-z{}%$])", r"\\", text.strip().replace("\n\n", ";"))
    text = _TIGHT.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    if re.search(r"[\\$~\x01]", text):
        text = _REMARK.sub("", re.sub(r"(?<!\\)\\[()\[\]]", "", _TEXT.sub("\x01\\1\x02", text)))
        text = _IGNORED.sub(" ", text)
    if "^" in text:
        text = _MARK.sub(lambda m: (m[1] or "\\degree") + " ", text)
    text = text.strip(" \n\t\"`*").rstrip(" .,\\")
    found, at, depth, prose = [], 0, 0, False
    while at < len(text):
        token = grouped and depth == 0 and text[at].isdigit() and GROUPED.match(text, at) or _TOKEN.match(text, at)
        if not token and prose and text[at] == ".":
            at += 1
            continue
        if not token or len(found) > MAX_TOKENS: raise Unreadable("too many tokens" if token else f"character {text[at]!r}")
        at, kind, value = token.end(), token.lastgroup, token[0]
        if kind == "prose": prose = value == "\x01"
        elif kind == "word": found += _split_word(value, prose)
        elif kind == "op":
            value = _COMMANDS.get(value, value)
            depth += (value in ("(", "[", "{", "\\{")) - (value in (")", "]", "}", "\\}"))
            found.append(value[1:] if value[1:] in _LETTERS else value.replace(" ", ""))
        elif kind != "space": found.append("0" * (value[0] == ".") + value.replace(",", ""))
    if found[:1] == ["]"] or found[-1:] == ["["]:         # ]0, 1[ is (0, 1)
        found = [{"]": "("}.get(found[0], found[0]), *found[1:-1], {"[": ")"}.get(found[-1], found[-1])]
    return found

def bare(text: str) -> str:
    """The text without commands that only set type."""
    return _IGNORED.sub(" ", _TEXT.sub(r" \1 ", text)).strip() if re.search(r"[\\$~\x01]", text) else text

def _split_word(word: str, prose: bool) -> list[str]:
    if len(word) > 1 and word.lower() in _COMMANDS or word == "U": return [_COMMANDS.get(word.lower(), "\\cup")]
    english = prose or word in _UNITS or word[1:].islower() and len(word) > 3 - word[0].isupper()
    if english and word not in _FUNCTIONS: return ['"' + word]
    function = next((f for f in _FUNCTIONS if word.startswith(f)), "")                       # xy is x y, sinx is sin x
    return ["\\" + function] * bool(function) + list(word[len(function):])

def number(text: str) -> tuple:
    """A number leaf: its value, and how many significant digits it shows if it is a decimal (0: it is exact)."""
    if text.isdigit() and len(text) < 20: return "num", Fraction(int(text)), 0
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, fraction = mantissa.partition(".")
    if len(mantissa) > 4_000 or len(exponent) > 4: raise Unreadable("number too long")
    value = Fraction(int(whole + fraction), 10 ** len(fraction)) * Fraction(10) ** int(exponent or 0)
    return "num", value, len((whole + fraction).lstrip("0")) if fraction else 0

ONE, TEN, HALF = number("1"), number("10"), ("num", Fraction(1, 2), 0)
INFINITY, REALS, NOTHING = ("name", "infty"), ("name", "blackboard R"), ("name", "emptyset")

# -- 2. The tree ------------------------------------------------------------------------------------------------------
#
# A tree is a tuple: an operation and its arguments.  Leaves hold plain values, ("num", Fraction, digits shown) and
# ("name", "x"); all other arguments that are tuples are trees: ("+", a, b, c), ("relation", "<= <", a, b, c), ...

class Parser:
    """Recursive descent, one method a precedence level.  Sums and products are flat, so only nesting costs depth."""

    def __init__(self, found: list[str]):
        self.tokens, self.at, self.depth, self.in_bars = [*found, ""], 0, 0, False
        self.branch, self.forked = 1, False               # the sign that \pm stands for; was there any?

    @property
    def next(self) -> str:
        return self.tokens[self.at]

    def take(self, *wanted: str) -> str:
        """Consume the next token if it is one of `wanted`, else return ''."""
        return self.advance() if self.tokens[self.at] in wanted else ""

    def advance(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def fail(self):
        raise Unreadable(f"unexpected {self.next!r}")

    def items(self) -> tuple:
        """Answers between commas, as a list; one is itself.  With plus-minus in it, it is read once for each sign."""
        found, word, outer = [], "", self.depth == 0 or self.tokens[:self.at] == ["\\{"]
        while True:
            start, saved, self.forked = self.at, self.tokens[:] if outer else [], self.forked and not outer
            found.append(self.level())
            if outer and self.forked:
                self.at, self.tokens, self.branch = start, saved, -1
                found.append(self.level())
                self.branch, self.forked = 1, False
            if not (separator := self.take(",", ";", "\\and", "\\or")):
                return ("list", word, *found) if len(found) > 1 else found[0]
            word = self.take("\\and", "\\or") or separator                   # "1, 2, and 3"

    def level(self, lowest: int = 0) -> tuple:
        """Binary operators by precedence climbing, from relations (rank 0) to sums (3); those of one rank make one node."""
        left = self.term()
        while (rank := _RANK.get(self.next, -1)) >= lowest and not (self.next == ":" and self.in_bars):
            parts, signs = [left], []
            while _RANK.get(self.next, -1) == rank and not (self.next == ":" and self.in_bars):
                signs.append(self.advance())
                part = self.level(rank + 1)
                parts.append(("neg", part) if rank == 3 and self.minus(signs[-1]) else part)
            if rank == 0: left = _relation(signs, parts)
            elif rank == 3: left = ("+", *parts)
            elif signs == [":"]: left = "*", left, ("inverse", parts[1])
            else: left = (signs[0], *parts) if len(set(signs)) == 1 else self.fail()
        return left

    def minus(self, sign: str) -> bool:
        self.forked |= sign in ("\\pm", "\\mp")
        return sign == "-" or sign == ("\\mp" if self.branch > 0 else "\\pm")

    def term(self) -> tuple:
        factors = [self.signed()]
        while True:
            last = factors[-1]
            if self.take("*"): factors.append(self.signed())
            elif self.take("/"): factors.append(("inverse", self.signed()))
            elif not self.starts_operand(): return ("*", *factors) if len(factors) > 1 else last
            elif last[0] in ("num", "neg") and (self.next[:1].isdigit() or self.next == "\\frac"):
                factors[-1] = self.mixed(last)
            elif self.next[:1].isdigit() and last[0] != "^" != self.tokens[self.at + 1]: self.fail()      # x2 is no 2x; x 2^n is
            else: factors.append(self.power())

    def mixed(self, before: tuple) -> tuple:
        """A number and a fraction: 1 1/2 is a sum, 3\\frac{x}{2} a product; other numbers side by side are no answer."""
        whole, plain = before[1] if before[0] == "neg" else before, self.next != "\\frac"
        fraction = self.primary()
        if plain: fraction = ("*", fraction, ("inverse", self.primary())) if self.take("/") else self.fail()
        top, bottom = fraction[1], fraction[2][1]
        if not (whole[0] == top[0] == bottom[0] == "num" and top[1] < bottom[1] and whole[2] == top[2] == bottom[2] == 0):
            return self.fail() if plain else ("*", before, self.power(fraction))
        value = self.postfix(("+", whole, fraction))
        return ("neg", value) if before[0] == "neg" else value

    def starts_operand(self) -> bool:
        token = self.next
        return token[:1].isalnum() or token in _OPENERS or token == "|" and not self.in_bars or token[:7] == "\\begin{"

    def signed(self) -> tuple:
        negative = False
        while sign := self.take(*_SIGNS): negative ^= self.minus(sign)
        return ("neg", self.power()) if negative else self.power()

    def power(self, node: tuple | None = None) -> tuple:
        self.depth += 1
        depth, node = self.depth, self.postfix(node or self.primary())
        while self.take("^"):
            self.depth += 1
            exponent = self.signed() if self.next[:1].isdigit() or self.next in _SIGNS else self.argument()
            node = self.postfix(("^", node, exponent))
        self.depth = depth - 1
        return node

    def postfix(self, node: tuple) -> tuple:
        """What follows an operand: factorials, percent, degrees, primes, indices and units."""
        for _ in range(4):                                # 9!!!!!!! is no answer
            if self.next not in _POSTFIX and self.next[:1] != '"': break
            if self.take("!"): node = "!!" if self.take("!") else "!", node
            elif sign := self.take("%", "\\degree"):
                node = "%" if sign == "%" else "degrees", node
                self.take("C", "F")
            elif node[0] == "name" and self.take("'"): node = "name", node[1] + "'"
            elif node[0] in ("name", "num") and self.take("_"):
                tag = self.raw_argument()
                if node[0] == "num" and not (re.fullmatch("[0-9]{1,2}", tag) and node[1].denominator == 1 and 1 < int(tag) < 37):
                    self.fail()
                node = ("name", f"{node[1]}_{tag}") if node[0] == "name" else node if tag == "10" else ("base", node[1], int(tag))
            while self.next[:1] == '"' and node[0] != "text":
                if self.next[1:].lower() in _HEDGES:      # a word that takes the number back is not a unit
                    self.fail()
                self.at += 1
                if self.take("^"): self.argument()
                if self.next == "/" and (self.tokens[self.at + 1][:1] == '"' or self.tokens[self.at + 1] in ("h", "s")):
                    self.at += 1 + (self.tokens[self.at + 1][:1] != '"')
        return node

    def argument(self) -> tuple:
        """A TeX argument: a group in braces, one digit, one letter or one command."""
        if len(self.next) > 1 and self.next.isdigit():
            digit, self.tokens[self.at] = self.next[0], self.next[1:]
            return number(digit)
        return self.primary()

    def raw_argument(self) -> str:
        """A TeX argument as it stands, not read: an index, the range of a sum."""
        start, depth = self.at, 0
        if self.next.isdigit(): return str(self.argument()[1])
        while self.at == start or depth > 0:
            depth += {"{": 1, "}": -1, "": 99}.get(self.next, 0)
            if depth > 9: self.fail()                     # the text ends before the brace does
            self.at += 1
        return "".join(self.tokens[start:self.at]).strip("{}")

    def primary(self) -> tuple:
        token = self.next
        self.at, self.depth = self.at + 1, self.depth + 1
        if self.depth > MAX_DEPTH: raise Unreadable("too deep")
        if token in ("f", "g") and self.next == "(":      # f(x+1) is no product
            node = "call", token, self.primary()
        elif token[:1].isalpha(): node = "name", token
        elif token[:1] == '"': node = self.words(token[1:])
        elif token[:1].isdigit(): node = self.decimal(token)
        elif token[1:] in _FUNCTIONS and not (token == "\\sqrt" and self.next == "["):
            node = self.function(token[1:])
        else: node = self.command(token)
        self.depth -= 1
        return node

    def decimal(self, text: str) -> tuple:
        if "." not in text or not self.take("\\overline"): return number(text)
        digits = self.raw_argument()                      # 0.8\overline{4}
        if not re.fullmatch("[0-9]{1,99}", digits): self.fail()
        return "num", number(text)[1] + Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** len(text.split(".")[1])), 0

    def words(self, said: str) -> tuple:
        while self.next[:1] == '"':
            said += " " + self.next[1:]
            self.at += 1
        if len(said) == 1 or said.lower() in _SAYINGS: return "name", _SAYINGS.get(said.lower(), said)
        if said.endswith(" is") and self.starts_operand() and not _HEDGES & set(said.lower().split()):
            return self.signed()                          # "the area is 5"
        return self.fail() if self.starts_operand() else ("text", said)

    def function(self, name: str) -> tuple:
        base = self.argument() if self.take("_") else TEN if name == "lg" else None
        exponent = self.argument() if self.take("^") else None
        if name in ("sqrt", "cbrt") or self.next in ("(", "{", "["): inside = self.argument()
        else:                                             # sin 2x
            factors = [self.signed()]
            while self.starts_operand() and self.next[1:] not in _FUNCTIONS and self.next not in ("(", "["):
                factors.append(self.power())
            inside = ("*", *factors)
        if exponent == ("neg", ONE) and "arc" + name in _FUNCTIONS: name, exponent = "arc" + name, None
        node = "call", "log" if name in ("lg", "ln") else name, inside
        if name in ("sqrt", "cbrt"): node = "^", inside, HALF if name == "sqrt" else ("inverse", number("3"))
        node = node if base is None else ("*", node, ("inverse", ("call", "log", base)))
        return node if exponent is None else ("^", node, exponent)

    def group(self, *closers: str) -> tuple:
        """What stands before the next of `closers`.  Inside of bars and set braces a bar or colon ends it."""
        bars, self.in_bars = self.in_bars, closers[0] in ("|", "\\}") or self.in_bars and closers[0] == "}"
        node = self.items()
        if closers == ("\\}",) and self.take("|", ":"):   # {x | 2 < x < 3} is its condition
            node = self.items()
        if closers == ("}",) and self.take("\\choose"): node = "binom", node, self.items()
        self.in_bars = bars
        return node if self.take(*closers) else self.fail()

    def command(self, token: str) -> tuple:
        if token in ("(", "["):
            node = self.group(")", "]")
            return ("sequence", token + self.tokens[self.at - 1], *node[2:]) if node[0] == "list" else node
        if token == "{": return self.group("}")
        if token == "\\{":
            node = NOTHING if self.take("\\}") else self.group("\\}")
            return node if node[0] in ("list", "relation") or node == NOTHING else ("list", "", node)
        if token in ("|", "\\lfloor", "\\lceil"):
            return ("call", "abs", self.group("|")) if token == "|" else ("call", token[2:], self.group("\\r" + token[2:]))
        if token in ("\\frac", "\\binom"):
            top, bottom = self.argument(), self.argument()
            return ("*", top, ("inverse", bottom)) if token == "\\frac" else ("binom", top, bottom)
        if token == "\\sqrt" and self.take("["):
            index = self.group("]")
            return "^", self.argument(), ("inverse", index)
        if token == "\\surd": return "^", self.primary(), HALF
        if token in _BIG:                                 # not evaluated: equal to the same expression only
            ranges = [self.raw_argument() if self.take(mark) else "" for mark in ("_", "^")]
            return token, " ".join(ranges), self.term()
        if token in _ACCENTS: return "name", ("blackboard" if token == "\\mathbb" else token) + " " + self.raw_argument()
        if token[:7] == "\\begin{": return self.environment(token)
        self.at -= 1
        return self.fail()

    def environment(self, name: str) -> tuple:
        """Matrices by rows; cases and aligned environments are lists of their rows."""
        rows: list[list] = [[]]
        if "array" in name:                               # its column format
            self.raw_argument()
        while not self.take(name.replace("begin", "end")):
            rows[-1].append(self.items())
            if self.take("\\\\"): rows.append([])
            elif not self.take("&") and self.next[:5] != "\\end{": self.fail()
        if not rows[0]: self.fail()
        matrix = "matrix", *(("row", *row) for row in rows if row)
        if "vmatrix" in name: return "call", "determinant", matrix
        return matrix if re.search("matrix|array", name) else ("list", "", *sum(rows, []))

def _relation(signs: list[str], sides: list[tuple]) -> tuple:
    """A chain, read so that its inequality signs point left (3 > x is x < 3), without a remark 'approximately ...'."""
    if "\\approx" in signs[:1] and label(sides[0]):       # x \approx 3.14
        signs[0] = "="
    cut = [*signs, "\\approx"].index("\\approx")
    signs, sides = signs[:cut], sides[:cut + 1]
    if signs and signs[0][0] == ">":
        signs, sides = [sign.replace(">", "<") for sign in signs[::-1]], sides[::-1]
    return ("relation", " ".join(signs), *sides) if signs else sides[0]

# -- 3. Values --------------------------------------------------------------------------------------------------------

DIGITS = decimal.Context(prec=60, Emax=10 ** 12, Emin=-10 ** 12,
                         traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow, decimal.Underflow])
CLOSE, DUST = Decimal("1e-45"), Decimal("1e-50")          # relative: equal values; what rounding leaves of a sum
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803")

class Big:
    """A complex number to 60 digits, for values that no fraction holds.  Parts that are rounding errors drop to zero."""
    __slots__ = ("re", "im")

    def __init__(self, re: Decimal | int, im: Decimal | int = 0):
        dust = DUST * (abs(re) + abs(im))
        self.re, self.im = (part if abs(part) > dust else Decimal(0) for part in (re, im))

    def __add__(self, other: Big) -> Big: return Big(self.re + other.re, self.im + other.im)
    def __sub__(self, other: Big) -> Big: return Big(self.re - other.re, self.im - other.im)
    def __neg__(self) -> Big: return Big(-self.re, -self.im)

    def __mul__(self, other: Big) -> Big:
        return Big(self.re * other.re - self.im * other.im, self.re * other.im + self.im * other.re)

    def __truediv__(self, other: Big) -> Big:
        square = other.re * other.re + other.im * other.im
        return self * Big(other.re / square, -other.im / square)

    def __abs__(self) -> Decimal:
        return (self.re * self.re + self.im * self.im).sqrt() if self.im else abs(self.re)

Value = Fraction | Big

def big(v: Value) -> Big:
    return v if isinstance(v, Big) else Big(Decimal(v.numerator) / Decimal(v.denominator))

def fraction(x: Decimal) -> Fraction:
    if abs(x.adjusted()) > 10_000: raise Undefined("too large or too small for a fraction")
    return Fraction(x)

def exp(z: Big) -> Big:
    """Euler's formula; the sine and cosine of the angle by their series, that of e^x sorted by powers of i."""
    if abs(z.im) > 10 ** 6: raise Undefined("angle too large")
    x, term, sums, n = z.im - (z.im / PI / 2).to_integral_value() * 2 * PI, Decimal(1), [Decimal(0)] * 4, 0
    while abs(term) > Decimal("1e-65"):
        sums[n % 4] += term
        n += 1
        term *= x / n
    return Big(z.re.exp() * (sums[0] - sums[2]), z.re.exp() * (sums[1] - sums[3])) if x else Big(z.re.exp())

def log(z: Big) -> Big:
    """Principal value.  The angle starts as a float; its error, some 1e-16, is its own sine but for its fifth power."""
    if not z.im and z.re > 0: return Big(z.re.ln())
    size = abs(z)
    guess = Decimal(math.atan2(z.im / size, z.re / size))
    error = (z / (Big(size) * exp(Big(0, guess)))).im
    return Big(size.ln(), guess + error + error ** 3 / 6)

def root(z: Big) -> Big:
    return Big(z.re.sqrt()) if not z.im and z.re >= 0 else exp(log(z) * Big(Decimal("0.5")))

_1, _2, _I = Big(1), Big(2), Big(0, 1)
_CONSTANTS = {"pi": Big(DIGITS.plus(PI)), "e": Big(DIGITS.exp(Decimal(1))), "i": _I}
_F = {"exp": exp, "log": log, "sinh": lambda z: (exp(z) - exp(-z)) / _2, "cosh": lambda z: (exp(z) + exp(-z)) / _2,
      "sin": lambda z: (exp(_I * z) - exp(-_I * z)) / (_2 * _I), "cos": lambda z: (exp(_I * z) + exp(-_I * z)) / _2,
      "arcsin": lambda z: -_I * log(_I * z + root(_1 - z * z)), "arccos": lambda z: Big(PI / 2) - _F["arcsin"](z),
      "arctan": lambda z: (log(_1 + _I * z) - log(_1 - _I * z)) / (_2 * _I)}
_F |= {"tan": lambda z: _F["sin"](z) / _F["cos"](z), "cot": lambda z: _F["cos"](z) / _F["sin"](z),
       "sec": lambda z: _1 / _F["cos"](z), "csc": lambda z: _1 / _F["sin"](z), "tanh": lambda z: _F["sinh"](z) / _F["cosh"](z)}

@lru_cache(maxsize=4096)
def name_value(name: str, point: int) -> Value:
    """Constants, and for every other name a random rational that depends on the name and the point only: for points 0
    and 3 in (0, 1), where arcsin and the like are real, then above and below; for 6, 7 and 8 whole, for factorials."""
    if name in ("infty", "emptyset", "blackboard R"): raise Undefined(name)
    seed = int.from_bytes(blake2b(f"{name}/{point}".encode("utf-8", "replace"), digest_size=8).digest(), "big")
    low, high = ((1, 996), (1009, 4001), (-3989, -101))[point % 3]
    return _CONSTANTS.get(name) or (Fraction(2 + seed % 39) if point > 5 else Fraction(low + seed % (high - low + 1), 997))

def order(a: Value, b: Value) -> int:
    """-1, 0 or 1 for a < b, a = b, a > b: exact for fractions, else to 45 digits."""
    if isinstance(a, Fraction) and isinstance(b, Fraction): return (a > b) - (a < b)
    a, b = big(a), big(b)
    if abs(a - b) <= CLOSE * max(abs(a), abs(b)): return 0
    return 1 if a.im or b.im or a.re > b.re else -1

# -- 4. Equality ------------------------------------------------------------------------------------------------------

class Judge:
    """One comparison: its budget of work, the rule that decided it, and the point at which it evaluates."""

    def __init__(self):
        self.work, self.rule, self.point = MAX_WORK, "different values", 0
        self.unknown, self.at = None, Fraction(0)         # a tree that has the value `at`, whatever its names are
        self.strayed = False                              # did a root or log of a negative number leave the reals?

    def spend(self, amount: int) -> None:
        self.work -= amount
        if self.work < 0: raise Undefined("too much work")

    def by(self, rule: str, verdict: bool = True) -> bool:
        self.rule = rule
        return verdict

    def value(self, node: tuple, radians: bool = False) -> Value:
        """The value of `node`: a Fraction as long as it is rational.  `radians`: must a degree sign be converted?"""
        self.spend(1)
        if node == self.unknown: return self.at
        op, args = node[0], node[1:]
        if op in ("num", "name", "text"): return args[0] if op == "num" else name_value(args[0], self.point)
        radians |= op == "call" and args[0][:3] in ("sin", "cos", "tan", "cot", "sec", "csc")
        values = [self.value(arg, radians) for arg in args if isinstance(arg, tuple)]
        for v in values:
            bits = v.numerator.bit_length() + v.denominator.bit_length() if isinstance(v, Fraction) else 2_000
            self.spend(MAX_WORK if bits > 2 * MAX_BITS else bits * bits // 2_000_000)
        result = self.apply(op, args, values, radians)
        return result if isinstance(result, Fraction) or result.re or result.im else Fraction(0)

    def apply(self, op: str, args: tuple, values: list[Value], radians: bool) -> Value:
        first, exact = values[0] if values else None, all(isinstance(v, Fraction) for v in values)
        if op == "+" and not exact:
            values = [big(v) for v in values]
            total, size = sum(values[1:], values[0]), max(map(abs, values))
            if any(v.re or v.im for v in values if abs(v) < DUST * abs(total)): raise Undefined("terms too far apart")
            return total if abs(total) > DUST * size else Fraction(0)
        if op == "+": return sum(values)
        if op == "*": return math.prod(values[1:], start=first) if exact else math.prod(map(big, values[1:]), start=big(first))
        if op == "neg": return -first
        if op == "%": return first / 100 if exact else first / Big(100)
        if op == "inverse": return 1 / first if exact else _1 / first
        if op == "^": return self.power(*values)
        if op == "degrees": return big(first) * Big(PI / 180) if radians else first
        if op == "call": return self.call(args[0], first)
        whole = exact and all(v.denominator == 1 and 0 <= v <= 3_000 for v in values)
        if op not in ("!", "!!", "binom") or not whole: raise Undefined(f"{op} has no value")
        self.spend(int(first) // 3)
        return Fraction(math.comb(*map(int, values)) if op == "binom" else math.prod(range(int(first), 0, -len(op))))

    def power(self, base: Value, exponent: Value) -> Value:
        self.spend(10)
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            n = exponent.numerator
            if isinstance(base, Big) and abs(n) < 64:
                return math.prod([base] * n, start=_1) if n >= 0 else _1 / math.prod([base] * -n, start=_1)
            n = max(-1, min(n, 1)) if base == 0 else n % 2 if base in (1, -1) else n
            if isinstance(base, Fraction):
                bits = abs(n) * max(base.numerator.bit_length(), base.denominator.bit_length())
                if bits <= MAX_BITS: return base ** n
        if base == 0: return Fraction(0) if big(exponent).re > 0 else 1 / Fraction(0)
        z, half = big(base), exponent == Fraction(1, 2)
        if not z.im and z.re < 0 and isinstance(exponent, Fraction):
            if exponent.denominator % 2:                  # the real odd root, as in (-8)^{1/3} = -2
                positive = self.power(Fraction(-base) if isinstance(base, Fraction) else -base, exponent)
                return -positive if exponent.numerator % 2 else positive
            self.strayed = True
        if half and isinstance(base, Fraction) and base > 0:
            exact = Fraction(math.isqrt(base.numerator), math.isqrt(base.denominator))
            if exact * exact == base: return exact
        return root(z) if half else exp(big(exponent) * log(z))

    def call(self, name: str, v: Value) -> Value:
        self.spend(20)
        if name in ("f", "g"):                            # an unknown function: any value, but the same for the same argument
            return name_value(f"{name}({v if isinstance(v, Fraction) else f'{v.re:.40e} {v.im:.40e}'})", self.point)
        if name == "abs": return abs(v) if isinstance(v, Fraction) else Big(abs(v))
        if name in ("floor", "ceil"):
            x = v if isinstance(v, Fraction) else fraction(v.re)
            if abs(x - round(x)) < Fraction(1, 10 ** 40): return Fraction(round(x))
            return Fraction(math.floor(x) if name == "floor" else math.ceil(x))
        if name not in _F: raise Undefined(f"{name} has no value")
        self.strayed |= name == "log" and big(v).re < 0
        return _F[name](big(v))

    def same_value(self, a: tuple, b: tuple) -> bool:
        """Schwartz-Zippel: equal at several random points is equal.  Constants need one evaluation."""
        if not free_names(a) | free_names(b):
            x, y = self.value(a), self.value(b)
            if order(x, y) == 0:
                return self.by("equal exactly" if isinstance(x, Fraction) and isinstance(y, Fraction) else "equal to 45 digits")
            decimal = max(shown_digits(a), shown_digits(b)) >= 9
            return decimal and abs(big(x) - big(y)) <= abs(big(x)) * Decimal("1.001e-9") and self.by("decimal agrees to 9 digits")
        seen = []
        for self.point in range(9):
            self.strayed = False
            try:
                x, y = self.value(a), self.value(b)
            except ArithmeticError:
                continue
            seen.append((not self.strayed and not big(x).im and not big(y).im, order(x, y) == 0))
            if seen[-1] == (True, False) or seen.count((True, True)) == 3: break
        used = [equal for real, equal in seen if real]
        used = used if len(used) > 1 else [equal for _, equal in seen]       # nowhere real: complex values decide
        return len(used) > 1 and all(used) and self.by(f"equal at {len(used)} random points")

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

    def holds(self, node: tuple) -> bool:
        """Is the number `self.at` in a set of numbers: an interval, a union, where a relation is true, ...?"""
        self.spend(3)
        op, args = node[0], children(node)
        if op in ("\\cup", "\\cap", "\\setminus", "list"):
            inside = [self.holds(arg) for arg in args]
            if op == "\\setminus": return inside[0] and not any(inside[1:])
            return all(inside) if op == "\\cap" or conditions(node) else any(inside)
        if op not in ("relation", "sequence"): return node == REALS or node != NOTHING and order(self.at, self.value(node)) == 0
        if node[1] == "\\in": return self.holds(args[1])
        signs = node[1].split() if op == "relation" else ["<=" if bracket in "[]" else "<" for bracket in node[1]]
        if op == "sequence": args.insert(1, self.unknown)
        for sign, x, y in zip(signs, args, args[1:]):
            try:
                way = infinite(x) - infinite(y) or order(self.value(x), self.value(y))
            except ArithmeticError:                       # sqrt(x) < 2 does not hold at -1
                return False
            if way not in {"<": (-1, -2), "<=": (-1, -2, 0), "=": (0,), "!=": (-1, 1)}[sign]: return False
        return True

    def same_set(self, a: tuple, b: tuple) -> bool | None:
        """Do two sets of real numbers agree at every end point, between and beyond them?  None if they are no such sets.
        One may be a relation that is not solved, |x| < 3: its sides must be equal, or have a pole, at the other's end points,
        and it is tried at more numbers."""
        one = real_set(a)
        two = one and real_set(b)
        if not two or a[0] == b[0] == "sequence" or len(one[0] | two[0]) > 1: return None
        ends = [end for end in one[1] + two[1] if end and not infinite(end)]
        unsolved = [node for node, (_, hidden) in ((a, one), (b, two)) if None in hidden]
        if len(unsolved) == 2 or unsolved and unsolved[0][0] != "relation": return None
        (self.unknown,) = one[0] | two[0] or {("name", "x")}
        for self.point in (0, 1) if any(map(free_names, ends)) else (0,):    # other names are parameters
            values = [self.value(end) for end in ends]
            middle = sorted(fraction(big(v).re) for v in values) or [Fraction(0)]
            middle = [middle[0] - 2, *middle, middle[-1] + 2]
            probes = values + [(x + y) / 2 for x, y in zip(middle, middle[1:])]
            for self.at in values * len(unsolved):
                if not self.is_end(unsolved[0]): return None
            if unsolved:
                probes += [middle[0] - 3 ** n for n in range(9)] + [middle[-1] + 3 ** n for n in range(9)]
                probes += [x + (y - x) * name_value("probe", 3 * n) for x, y in zip(middle, middle[1:]) for n in range(2)]
            for self.at in probes:
                if self.holds(a) != self.holds(b): return self.by("different sets of numbers", False)
        return self.by("the same set of numbers")

    def is_end(self, relation: tuple) -> bool:
        try:
            sides = [self.value(side) for side in relation[2:]]
        except ArithmeticError:
            return True
        return 0 in map(order, sides, sides[1:])

    def same(self, a: tuple, b: tuple) -> bool:
        """Are the two trees the same answer?  Sets self.rule; no value where one is needed means no."""
        self.spend(1)
        if a == b: return self.by("same expression")
        sets, self.unknown = self.same_set(a, b), None
        if sets or sets is not None and a[0] != b[0]: return sets
        left, right = flat(a), flat(b)
        if len(left) > 1 or len(right) > 1:
            one, two = entries(*left), entries(*right)
            return self.in_order(one, two) if one and two else self.same_list(left, right)
        a, b = left[0], right[0]
        if a[0] == "relation" or b[0] == "relation": return self.same_relation(a, b)
        if a[0] == b[0] and a[0] in ("sequence", "matrix", "row", "\\mod", ":", *_BIG):
            brackets = [[x for x in node if type(x) is str] for node in (a, b)]
            return brackets[0] == brackets[1] and self.in_order(children(a), children(b))
        if entries(a) and entries(b): return self.in_order(entries(a), entries(b))
        if a[0] == b[0] == "name": return self.by("different names", False)
        if "base" in (a[0], b[0]) or infinite(a) or infinite(b):
            return self.by("infinity or base", infinite(a) == infinite(b) != 0)
        try:
            if self.same_value(a, b): return True
            for sign, rule in (("%", "percent sign dropped"), ("degrees", "degrees in radians")):
                if (a[0] == sign) != (b[0] == sign) and self.same_value(*(unsigned(node, sign) for node in (a, b))):
                    return self.by(rule)
        except ArithmeticError as error:
            self.rule = f"no value: {error}"
        return False

    def in_order(self, left: list, right: list) -> bool:
        same = len(left) == len(right) > 0 and all(map(self.same, left, right))
        return self.by("entries match in order" if same else "an entry differs", same)

    def same_list(self, left: list[tuple], right: list[tuple]) -> bool:
        """Multisets.  Equality is nearly transitive, so the first partner found is as good as any."""
        for item in left if len(left) == len(right) else [None]:
            partner = next((i for i, other in enumerate(right) if item and self.same(item, other)), None)
            if partner is None: return self.by("a list item has no partner", False)
            right = right[:partner] + right[partner + 1:]
        return self.by("lists match item by item")

    def same_relation(self, a: tuple, b: tuple) -> bool:
        if a[0] != b[0]:
            (_, signs, *sides), other = (a, b) if a[0] == "relation" else (b, a)
            if signs == "\\in": return label(sides[0]) and self.same(sides[1], other)
            if set(signs.split()) != {"="}: return False
            if all(label(side) or self.same(side, sides[-1]) for side in sides[:-1]) and self.same(sides[-1], other):
                return True                               # 'name = ... = value' states its value; 4 = 3 states nothing
            given = free_names(("+", *sides)) - free_names(other)            # x + y = 1 gives 1 - x
            return len(sides) == 2 and len(given) == 1 and bool(free_names(other)) and self.proportional(
                ("relation", "=", *sides), ("relation", "=", ("name", *given), other))
        if a[1] == b[1] == "=" and a[2] != b[2] and a[2][:-1] == b[2][:-1] and a[2][-1][0] == b[2][-1][0] == "name" and (
                a[2][-1][1] not in free_names(b)):
            b = rename(b, b[2][-1], a[2][-1])             # f(t) = t + 1, f(x) = x + 1
        if a[1] == b[1] and all(map(self.same, a[2:], b[2:])): return self.by("same relation")
        if a[1] == b[1] and a[1] in ("=", "<", "<="): return self.proportional(a, b)
        return a[1][:1] == b[1][:1] == "=" and a[2] == b[2] and self.same_relation(a, b[-1]) and self.same_relation(b, a[-1])

def children(node: tuple) -> list[tuple]:
    return [arg for arg in node[1:] if isinstance(arg, tuple)]

def rename(node: tuple, old: tuple, new: tuple) -> tuple:
    return new if node == old else tuple(rename(arg, old, new) if isinstance(arg, tuple) else arg for arg in node)

def free_names(node: tuple) -> set[str]:
    """The names in a tree that stand for unknowns."""
    if node[0] in ("name", "text"): return {node[1]} - {*_CONSTANTS, "infty"}
    return {name for child in children(node) for name in free_names(child)}

def shown_digits(node: tuple) -> int:
    """Significant digits of a decimal literal, also signed, in percent or times a power of ten; 0 for all else."""
    if node[0] in ("neg", "%", "degrees") or node[0] == "*" and len(node) == 3 and node[2][:2] == ("^", TEN):
        return shown_digits(node[1])
    return node[2] if node[0] == "num" else 0

def unsigned(node: tuple, sign: str) -> tuple:
    """10% as 10; 30 degrees as pi/6."""
    if node[0] != sign: return node
    return node[1] if sign == "%" else ("*", node[1], ("name", "pi"), ("inverse", number("180")))

def infinite(node: tuple) -> int:
    """+1 or -1 for plus or minus infinity, else 0."""
    return -infinite(node[1]) if node[0] == "neg" else int(node == INFINITY)

def flat(node: tuple) -> list[tuple]:
    """The answers that a list, 'S = {1, 2}' or 'x in {1, 2}' stands for, without 'k in Z' beside an answer in k."""
    if node[:2] in (("relation", "\\in"), ("relation", "=")) and node[3][0] == "list" and label(node[2]):
        node = node[3]
    if node[0] != "list": return [node]
    found = [one for item in node[2:] for one in flat(item)]
    return [one for one in found if one[:2] != ("relation", "\\in") or one[3][-1] not in ("blackboard Z", "Z")] or found

def entries(*items: tuple) -> list[tuple]:
    """The entries of a tuple, of a matrix with one row or column, or of 'x = 1, y = 2'."""
    if len(items) > 1:
        return [item[3] for item in items] if all(i[:2] == ("relation", "=") and i[2][0] == "name" for i in items) else []
    node, rows = items[0], children(items[0])
    if node[0] == "matrix" and (len(rows) == 1 or len(rows[0]) == 2): return [item for row in rows for item in row[1:]]
    return rows if node[0] == "sequence" and (node[1] == "()" or len(rows) > 2) else []

def label(node: tuple) -> bool:
    """Can this left side be dropped from 'left = value'?  Names, words, f(x), T(10), P(A \\cap B), f^{-1}, sums of names."""
    if node[0] in ("name", "text"): return node not in (("name", "pi"), INFINITY)
    if node[0] in ("*", "^"):
        rest = node[2] == ("neg", ONE) if node[0] == "^" else all(label(n) or n[0] == "num" for n in node[2:])
        return rest and label(node[1])
    if node[0] == "call" and node[1] in ("f", "g") or node[0] in _BIG: return True
    return node[0] in ("+", "inverse", "call", "sequence", "\\cap", "\\cup") and all(map(label, children(node)))

def conditions(node: tuple) -> bool:
    """Is it a list 'x > 0, x < 1' of relations that hold together?"""
    return node[0] == "list" and node[1] != "\\or" and all(item[0] == "relation" and item[1] != "=" for item in node[2:])

def real_set(node: tuple, part: bool = False) -> tuple[set, list] | None:
    """({the unknown}, [end points, None for those that a relation hides]) of a set of real numbers, else None.
    As a part of a union 'x = 1' and {1, 2} are such sets, too."""
    op, args = node[0], children(node)
    if node in (REALS, NOTHING): return set(), []
    if op == "sequence" and len(args) == 2: return set(), args
    if op in ("\\cup", "\\cap", "\\setminus") or op == "list" and (node[1] == "\\or" or conditions(node)):
        parts = [real_set(arg, True) for arg in args]
        if not all(parts) or not any(map(real_set, args)): return None
        return set().union(*(names for names, _ in parts)), [end for _, ends in parts for end in ends]
    if op == "list" and part: return set(), args
    if op != "relation" or len(args) > 3 or not set(node[1].split()) <= {"<", "<=", "!=", "\\in", "=" * part}: return None
    if node[1] == "\\in": return (inside := real_set(args[1])) and ({args[0]}, inside[1])
    middle = args[1:2] if len(args) == 3 else args        # x of 0 < x < 1
    labels = [side for side in middle if label(side) and (side[0] != "call" or side[1] in ("f", "g"))]
    unknown = max(labels, key=str, default=None)          # of x > a it is x
    names = free_names(node)
    if unknown: return {unknown}, [side for side in args if side != unknown]
    return ({("name", *names)}, [None]) if len(names) == 1 else None

@lru_cache(maxsize=128)                                   # golds come back with every sample
def parse(text: str, grouped: bool) -> tuple:
    """The tree of an answer; ("unreadable", why) for what is none.  `grouped`: is 1,000 one number, or two?"""
    try:
        parser = Parser(tokens(text, grouped))
        node = parser.items()
        return parser.fail() if parser.next else node
    except Unreadable as error:
        return "unreadable", str(error)

def equal_by_value(answer: str, gold: str, grouped: bool = True) -> tuple[bool, str]:
    """(are two answers equal?, the rule that decided).  Never raises."""
    a, b = parse(answer, grouped), parse(gold, grouped)
    if "unreadable" in (a[0], b[0]):
        texts = ["".join(bare(text).split()) for text in (answer, gold)]
        same = a[0] == b[0] and "" != texts[0] == texts[1]
        who = [f"{name} is not readable: {n[1]}" for name, n in (("answer", a), ("gold", b)) if n[0] == "unreadable"]
        return same, "; ".join(who)
    judge = Judge()
    with decimal.localcontext(DIGITS):
        try:
            return judge.same(a, b), judge.rule
        except ArithmeticError as error:
            return False, f"no value: {error}"

def shown(node: tuple) -> str:
    """A tree on one line: (+ x (* 2 y))."""
    if node[0] in ("num", "name"): return str(node[1])
    return "(" + " ".join(shown(arg) if isinstance(arg, tuple) else str(arg) for arg in node) + ")"
