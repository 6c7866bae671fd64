"""The value of a tree: a fraction as long as it is rational, else a number of lib/bignum.py.  Standard
library only.

Trees are tuples (lib/answers.py makes them): an operation and its arguments.  Answers come from a policy that
is paid for passing, so the size of numbers and the number of steps are bounded. """
from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b

from lib.bignum import (CALLS, DUST, EXACT, I, ONE, PI, Big, Undefined, Value, between, big, exp, fraction,
                        last_digit, log, order, real_roots, root)

MAX_BITS, MAX_WORK = 60_000, 6_000                        # size of exact numbers; steps of one comparison
BIG = ("\\lim", "\\sum", "\\prod", "\\int")
INFINITY, REALS, NOTHING = ("name", "infty"), ("name", "blackboard R"), ("name", "emptyset")
UNIT, TEN = (("num", Fraction(n), 0) for n in (1, 10))
COUNTS = {"binom": math.comb, "gcd": math.gcd, "lcm": math.lcm}
COUNTING = ("!", "!!", "binom")
WHOLE = (2, 3, 5, 4, 8, 7, 1, 9, 16, 6, 0, 15, 12, -1, -2, -7, 25, 64, 100, 999, 1_000)     # whole points
WHOLE_NAMES, _TRIED = "ijklmn", (1, -1, 9, -9, 17, 33, -33, 100, -100, 900, -900)

# -- 1. Trees -----------------------------------------------------------------------------------------------

def children(node: tuple) -> list[tuple]:
    return [arg for arg in node[1:] if isinstance(arg, tuple)]

def entries(node: tuple) -> list[tuple]:
    """The entries of a tuple or of a matrix with one row or column."""
    rows = children(node)
    if node[0] == "matrix" and (len(rows) == 1 or len(rows[0]) == 2):
        return [item for row in rows for item in row[1:]]
    return rows if node[0] == "sequence" and (node[1] == "()" or len(rows) > 2) else []

def free_names(node: tuple) -> set[str]:
    """The names in a tree that stand for unknowns."""
    if node[0] in ("name", "text"):
        return {node[1]} - {"pi", "e", "i", "infty", "otherwise"}
    found = {name for child in children(node) for name in free_names(child)}
    return found - {node[1][1]} if node[0] in BIG and len(node) == 5 else found

def infinite(node: tuple) -> int:
    """+1 or -1 for plus or minus infinity, else 0."""
    return -infinite(node[1]) if node[0] == "neg" else int(node == INFINITY)

def conditions(node: tuple, part: bool = False) -> bool:
    """Is it a list of inequalities, or of lists of them?"""
    inequality = node[0] == "relation" and node[1] not in ("=", "\\equiv")
    return node[0] == "list" and all(conditions(item, True) for item in node[2:]) or part and inequality

def residue(node: tuple) -> tuple | None:
    """(x, 3, 5) of x = 3 mod 5."""
    name, right = (node[2], node[-1]) if node[:2] == ("relation", "\\equiv") else (None, node)
    return (name, *right[1:]) if right[0] == "\\mod" and len(right) == 3 else None

def mentions(node: tuple, operations) -> bool:
    operation = node[1] if node[0] == "call" else node[0]
    return operation in operations or any(mentions(child, operations) for child in children(node))

def whole_names(node: tuple) -> set[str]:
    """The names in what counts, rounds, or is an exponent of a negative number."""
    found = {name for child in children(node) for name in whole_names(child)}
    if node[0] in ("!", "!!", "\\mod") or node[0] == "call" and node[1] in {*COUNTS, "floor", "ceil"}:
        found |= free_names(node)
    elif node[0] == "^" and node[1][0] == "neg" and node[1][1][0] == "num":
        found |= free_names(node[2])
    return found

def edges(node: tuple) -> set[tuple]:
    """The terms whose sign must not change if a function is to keep the same formula."""
    found = {edge for child in children(node) for edge in edges(child)}
    if node[0] == "call" and node[1] in ("abs", "log", "sgn"):
        found |= factors(node[2])
    elif node[0] == "^" and not (node[2][0] == "num" and node[2][1].denominator == 1) and free_names(node[1]):
        found |= factors(node[1])
    elif node[0] == "call" and node[1] in ("max", "min"):
        found |= {("+", x, ("neg", y)) for n, x in enumerate(node[2:]) for y in node[2:][:n]}
    elif node[0] == "case" and node[2][0] == "relation":
        found |= {("+", x, ("neg", y)) for x, y in zip(node[2][2:], node[2][3:])}
    return found

def factors(node: tuple) -> set[tuple]:
    """The factors of a product, the bases of powers."""
    if node[0] == "*":
        return {factor for child in children(node) for factor in factors(child)}
    return factors(node[1]) if node[0] in ("^", "inverse", "neg") else {node} if free_names(node) else set()

def rename(node: tuple, old: tuple, new: tuple) -> tuple:
    if node == old:
        return new
    return tuple(rename(arg, old, new) if isinstance(arg, tuple) else arg for arg in node)

def inverse(n: int) -> tuple:
    return "inverse", ("num", Fraction(n), 0)

def last_place(node: tuple) -> tuple | None:
    """One unit of the last place that a decimal shows, also signed, in percent or times a power of ten."""
    if node[0] == "num":
        return ("num", Fraction(1, 10 ** node[2]), 0) if node[2] else None
    if node[0] == "neg":
        return last_place(node[1])
    power = node[0] == "*" and len(node) == 3 and node[2][:2] == ("^", TEN) and not free_names(node[2])
    inside = last_place(node[1]) if power or node[0] in ("%", "degrees") else None
    return inside and (node[0], inside, *node[2:])

def unsigned(node: tuple, sign: str) -> tuple:
    """10% as 10; 30 degrees as pi/6."""
    if node[0] != sign:
        return node
    return node[1] if sign == "%" else ("*", node[1], ("name", "pi"), inverse(180))

def label(node: tuple) -> bool:
    """Can this left side be dropped from 'left = value'?  Names, words, f(x), T(10), P(X = 2), f^{-1}, sums
    of names."""
    op, args = node[0], children(node)
    if op in ("name", "text"):
        return node not in (("name", "pi"), INFINITY)
    if op == "^":
        return node[2] == ("neg", UNIT) and label(node[1])
    if op == "*":                                         # T(10), P(X = 2), but not x/2
        return label(args[0]) and all(label(arg) or arg[0] in ("num", "relation", "sequence") for arg in args)
    if op == "call" and node[1] in ("f", "g", "h", "max", "min", "det", "gcd", "lcm") or op in BIG:
        return len(node) != 5 or bool(free_names(node))
    args = [arg[1] if op == "+" and arg[0] == "neg" else arg for arg in args]
    return op in ("+", "inverse", "call", "sequence", "\\cap", "\\cup", ":") and all(map(label, args))

def real_set(node: tuple, part: bool = False) -> tuple[set, list, list] | None:
    """({the unknown}, [end points], [relations that hide theirs]) of a set of real numbers, else None.
    As parts of a union, 'x = 1' and {1, 2} are also such sets."""
    op = node[0]
    if op in ("num", "+", "*", "neg", "^"):               # most answers
        return None
    args = children(node)
    if node in (REALS, NOTHING):
        return set(), [], []
    if op == "sequence" and len(args) == 2 or op == "list" and part and node[1] == "{}":
        return set(), args, []
    if op in ("\\cup", "\\cap", "\\setminus") or op == "list" and (node[1] == "\\or" or conditions(node)):
        parts = [real_set(arg, True) for arg in args]
        if not all(parts) or not any(map(real_set, args)):
            return None
        names, ends, hidden = zip(*parts)
        return set().union(*names), sum(ends, []), sum(hidden, [])
    if op != "relation" or len(args) > 3 or not set(node[1].split()) <= {"<", "<=", "!=", "\\in", "=" * part}:
        return None
    if node[1] == "\\in":
        return (inside := real_set(args[1])) and ({args[0]}, *inside[1:])
    middle = args[1:2] if len(args) == 3 else args        # x of 0 < x < 1
    plain = [side for side in middle if side[0] == "name" and label(side) or side[:2] == ("call", "f")]
    unknown, names = max(plain, key=str, default=()), free_names(node)       # of x > a it is x
    ends = [side for side in args if side != unknown]
    if unknown and not any(free_names(unknown) & free_names(end) for end in ends):
        return {unknown}, ends, []
    return ({("name", *names)}, [], [node]) if len(names) == 1 else None

def shown(node: tuple) -> str:
    """A tree on one line: (+ x (* 2 y))."""
    if node[0] in ("num", "name"):
        return str(node[1])
    return "(" + " ".join(shown(arg) if isinstance(arg, tuple) else str(arg) for arg in node) + ")"

# -- 2. Evaluation ------------------------------------------------------------------------------------------

@lru_cache(maxsize=4096)
def name_value(name: str, point: int) -> Fraction:
    """For every name a random rational that depends on the name and the point only: in (0, 1), below, large
    of either sign, above, in (0, 1) again (where arcsin and the like are real), and just below zero."""
    if name in ("infty", "emptyset") or name.startswith("blackboard"):
        raise Undefined(name)
    digest = blake2b(f"{name}/{point}".encode("utf-8", "replace"), digest_size=8).digest()
    seed = int.from_bytes(digest, "big")
    low, high = ((1, 996), (-3989, -1101), (19_940_000, 99_700_000), (-99_700_000, -19_940_000),
                 (1009, 4001), (1, 996), (-996, -1))[point]
    return Fraction(low + seed % (high - low + 1), 997)

class Evaluator:
    """Values at one point: its number, the names that have a value of their own there, and the budget of
    work."""

    def __init__(self):
        self.work, self.price, self.point = MAX_WORK, 1, 0
        self.given: dict[str, Value] = {}
        self.strayed = False                              # did a root or log leave the real numbers?

    def spend(self, amount: int) -> None:
        self.work -= amount
        if self.work < 0:
            raise Undefined("too much work")

    def value(self, node: tuple, radians: bool = False) -> Value:
        """The value of `node`.  `radians`: must a degree sign be converted?"""
        self.spend(1)
        op, args = node[0], node[1:]
        if op == "num":
            return args[0]
        if op in ("name", "text"):
            return self.name(args[0])
        if op == "cases":                                 # the value where the first condition holds
            chosen = (case[1] for case in args if case[2] == ("name", "otherwise") or self.holds(case[2]))
            return self.value(next(chosen, ("no case",)))
        if op in BIG:
            return self.total(*node)
        radians |= op == "call" and args[0][:3] in ("sin", "cos", "tan", "cot", "sec", "csc", "cis")
        if op == "call" and args[0] == "det":
            return self.determinant([row[1:] for row in args[1][1:]] if args[1][0] == "matrix" else [])
        values = [self.value(arg, radians) for arg in args if isinstance(arg, tuple)]
        for v in values:
            bits = v.numerator.bit_length() + v.denominator.bit_length() if type(v) is Fraction else 2_000
            if bits >= 2_000:
                self.spend(MAX_WORK if bits > 2 * MAX_BITS else bits * bits // 4_000_000)
        result = self.apply(op, args, values, radians)
        return result if isinstance(result, Fraction) or result.re or result.im else Fraction(0)

    def name(self, name: str) -> Value:
        if name in self.given:
            return self.given[name]
        if name == "i":
            return I
        if name in ("pi", "e"):
            return Big(+PI) if name == "pi" else exp(ONE)
        return name_value(name, self.point)

    def total(self, op: str, name: tuple | str, low: tuple, high: tuple = (), body: tuple = ()) -> Value:
        """A finite sum or product."""
        if not body:
            raise Undefined(f"{op} has no value")
        first, last = fraction(self.value(low)), fraction(self.value(high))
        if first.denominator * last.denominator != 1 or last - first > 1_000:
            raise Undefined("no whole bounds, or too many terms")
        outer, total = dict(self.given), Fraction(op == "\\prod")
        for n in range(int(first), int(last) + 1):
            self.given[name[1]] = Fraction(n)
            total = self.apply("+" if op == "\\sum" else "*", (), [total, self.value(body)], False)
        self.given = outer
        return total

    def determinant(self, rows: list[tuple]) -> Value:
        if not rows or len(rows) > 4 or any(len(row) != len(rows) for row in rows):
            raise Undefined("no determinant")
        if len(rows) == 1:
            return self.value(rows[0][0])
        terms = []
        for n, x in enumerate(rows[0]):
            minor = self.determinant([row[:n] + row[n + 1:] for row in rows[1:]])
            terms.append(self.apply("*", (), [self.value(x), minor, Fraction((-1) ** n)], False))
        return self.apply("+", (), terms, False)

    def apply(self, op: str, args: tuple, values: list[Value], radians: bool) -> Value:
        first, exact = values[0] if values else None, all(isinstance(v, Fraction) for v in values)
        if op == "+" and not exact:
            values = [big(v) for v in values]
            total, size = sum(values[1:], values[0]), max(map(abs, values))
            if any(v.re or v.im for v in values if abs(v) < last_digit(DUST) * abs(total)):
                raise Undefined("terms too far apart")
            return total if abs(total) > last_digit(DUST) * size else Fraction(0)
        if op == "+":
            return sum(values)
        if op == "*":
            return math.prod(values) if exact else math.prod(map(big, values[1:]), start=big(first))
        if op == "neg":
            return -first
        if op == "%":
            return first / 100 if exact else first / Big(100)
        if op == "inverse" or op == ":" and len(values) == 2:
            top, bottom = (Fraction(1), first) if op == "inverse" else values
            return top / bottom if exact else big(top) / big(bottom)
        if op == "^":
            return self.power(*values)
        if op == "degrees":
            return big(first) * Big(PI / 180) if radians else first
        if op == "call":
            return self.call(args[0], values, exact)
        if op == "clock" and not args[1]:                 # a ratio as well
            return first
        if op in ("!", "!!") and exact and first.denominator == 1 and 0 <= first <= 6_000:
            self.spend(int(first) // 6)
            return Fraction(math.factorial(int(first)) if op == "!" else math.prod(range(int(first), 0, -2)))
        raise Undefined(f"{op} has no value")

    def power(self, base: Value, exponent: Value) -> Value:
        self.spend(10)
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            n = exponent.numerator
            if isinstance(base, Big) and abs(n) < 64:
                return math.prod([base] * n, start=ONE) if n >= 0 else ONE / math.prod([base] * -n, start=ONE)
            n = max(-1, min(n, 1)) if base == 0 else n % 2 if base in (1, -1) else n
            if isinstance(base, Fraction):
                bits = abs(n) * max(base.numerator.bit_length(), base.denominator.bit_length())
                if bits <= MAX_BITS:
                    return base ** n
        if base == 0:
            return Fraction(0) if big(exponent).re > 0 else 1 / Fraction(0)
        z, half = big(base), exponent == Fraction(1, 2)
        if not z.im and z.re < 0 and isinstance(exponent, Fraction):
            if exponent.denominator % 2:                  # the real odd root, as in (-8)^{1/3} = -2
                positive = self.power(-base, exponent)
                return -positive if exponent.numerator % 2 else positive
            self.strayed = True
        if half and isinstance(base, Fraction) and base > 0:
            exact = Fraction(math.isqrt(base.numerator), math.isqrt(base.denominator))
            if exact * exact == base:
                return exact
        self.spend((40 if z.im else 20) * self.price)
        return root(z) if half else exp(big(exponent) * log(z))

    def call(self, name: str, values: list[Value], exact: bool) -> Value:
        self.spend((40 if name[:3] == "arc" else 20) * self.price)
        if name in ("f", "g", "h"):                       # unknown: the same value for the same arguments
            shown = [str(v) if isinstance(v, Fraction) else f"{v.re:.40e} {v.im:.40e}" for v in values]
            return name_value(f"{name}({shown})", self.point)
        if name in COUNTS:
            if not exact or any(v.denominator != 1 or not 0 <= v <= 6_000 for v in values) or len(values) < 2:
                raise Undefined(f"{name} has no value")
            self.spend(int(values[0]) // 6)
            return Fraction(COUNTS[name](*map(int, values)))
        if name in ("max", "min"):
            return (max if name == "max" else min)(values, key=lambda v: v if exact else big(v).re)
        if name in ("floor", "ceil"):
            x = fraction(values[0])
            values, exact = [Fraction(round(x)) if abs(x - round(x)) < Fraction(1, 10 ** 40) else x], True
        if name not in {**CALLS, **EXACT} or len(values) != 1:
            raise Undefined(f"{name} has no value")
        if exact and name in EXACT:
            return EXACT[name](values[0])
        self.strayed |= name == "log" and big(values[0]).re < 0
        return CALLS[name](big(values[0]))

    def holds(self, node: tuple, at: Value | None = None) -> bool:
        """Is a condition true at this point, or the number `at` in a set of numbers?"""
        self.spend(3)
        op, args = node[0], children(node)
        if op in ("\\cup", "\\cap", "\\setminus", "list"):
            inside = [self.holds(arg, at) for arg in args]
            if op == "\\setminus":
                return inside[0] and not any(inside[1:])
            return all(inside) if op == "\\cap" or conditions(node) and node[1] != "\\or" else any(inside)
        if op not in ("relation", "sequence"):
            return node == REALS or node != NOTHING and at is not None and order(at, self.value(node)) == 0
        if node[1] == "\\in":
            return self.holds(args[1], self.value(args[0]) if at is None else at)
        if residue(node):
            x, rest, modulus = (fraction(self.value(part)) for part in residue(node))
            return (x - rest) % modulus == 0
        signs = node[1].split() if op == "relation" else ["<=" if sign in "[]" else "<" for sign in node[1]]
        try:
            sides = [(infinite(arg), Fraction(0) if infinite(arg) else self.value(arg)) for arg in args]
        except ArithmeticError:                           # sqrt(x) < 2 does not hold at -1
            return False
        if op == "sequence":
            sides.insert(1, (0, at))
        for sign, (far, x), (farther, y) in zip(signs, sides, sides[1:]):
            way = far - farther or order(x, y)
            if way not in {"<": (-1, -2), "<=": (-1, -2, 0), "=": (0,), "!=": (-1, 1)}.get(sign, ()):
                return False
        return True

    def polynomial(self, node: tuple, name: str) -> list[Fraction] | None:
        """The coefficients of `node` as a polynomial in `name` of degree 7 or less, from its values at 11,
        12, ..."""
        total, factor, last = [Fraction(0)] * 9, [Fraction(1)], [None]       # Newton's forward differences
        for n in range(9):
            self.given[name] = Fraction(n + 11)
            try:
                new = [self.value(node)]
            except ArithmeticError:
                return None
            if not isinstance(new[0], Fraction):
                return None
            for before in last[:n]:
                new.append(new[-1] - before)
            for k, c in enumerate(factor):
                total[k] += new[-1] * c
            if n > 2 and new[-1] == last[-1] == 0:
                break
            last, factor = new, [(x - (n + 11) * y) / (n + 1) for x, y in zip([0, *factor], [*factor, 0])]
        for x in (Fraction(-100_003), Fraction(-2, 7), Fraction(1, 3)):      # |x| looks like x from there
            self.given[name] = x
            try:
                if self.value(node) != sum(c * x ** n for n, c in enumerate(total)):
                    return None
            except ArithmeticError:
                return None
        return total

    def points(self, a: tuple, b: tuple):
        """Give every name a value: random ones of every size and sign; whole ones where something counts or
        rounds; and ones on each side of where an argument of |...|, a root, a log, a maximum or a condition
        changes its sign."""
        whole = sorted(whole_names(a) | whole_names(b))
        numbers = WHOLE[:-5 if mentions(a, COUNTING) or mentions(b, COUNTING) else None]
        sharp = edges(a) | edges(b)
        plain = not (whole or sharp or mentions(a, CALLS) or mentions(b, CALLS))
        broken = [name for name in whole if name[0] not in WHOLE_NAMES]      # floor(x) also between integers
        for n in range(4 if plain else 7 + len(numbers) * bool(whole) + 6 * bool(broken)):
            self.point = n % 7
            self.given = {name: Fraction(numbers[(n + 3 * k) % len(numbers)]) for k, name in enumerate(whole)}
            for name in broken if not 7 <= n < 7 + len(numbers) else ():
                self.given[name] += Fraction(n % 5 + 1, 6)
            yield False
        self.point, self.given = 0, {name: Fraction(3) for name in whole}
        names = sorted(set().union(*map(free_names, sharp)) - set(whole))
        for name in names[:max(1, 4 - len(names))]:
            for x in self.sides([edge for edge in sharp if name in free_names(edge)], name):
                self.point, self.given[name] = 0, x
                yield True
            self.given.pop(name, None)
        self.given = {}

    def sides(self, sharp: list[tuple], name: str) -> list[Value]:
        """The roots of edges and values of `name` between them; tried out where one is no polynomial."""
        roots, tried = [], {}
        for edge in sharp:
            coefficients = self.polynomial(edge, name)
            roots += real_roots(coefficients or [])
            for self.given[name] in (Fraction(n, 7) for n in _TRIED if coefficients is None):
                try:
                    tried.setdefault((edge, order(self.value(edge), Fraction(0))), self.given[name])
                except ArithmeticError:
                    self.spend(1)
        return roots + (between(roots) if roots else []) + list(tried.values())
