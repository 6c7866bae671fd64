"""Complex numbers to 60 digits, or 150, the functions of a pocket calculator on them, roots of polynomials.

The numbers of lib/values.py where no fraction holds them.  Standard library only.
"""
from __future__ import annotations

import decimal
import math
from decimal import Decimal
from fractions import Fraction
from functools import reduce

from lib.tex import table

class Undefined(ArithmeticError):
    """The expression has no value at this point, or one too large for our bounds."""

_TRAPS = [decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow, decimal.Underflow]
DIGITS, MORE_DIGITS = (decimal.Context(prec=n, Emax=10 ** 12, Emin=-10 ** 12, traps=_TRAPS)
                       for n in (60, 150))
CLOSE, DUST = 15, 10                                      # digits in which equal values, and sums, may differ
PI = Decimal("3.1415926535897932384626433832795028841971693993751058209749445923078164062862089986280348"
             "2534211706798214808651328230664709384460955058223172535940812848111745028410270193852110555964")

def last_digit(more: int) -> Decimal:
    """10 to the minus (digits of the context - more)."""
    return Decimal((0, (1,), more - decimal.getcontext().prec))

class Big:
    """A complex number.  Parts that are rounding errors drop to zero."""
    __slots__ = ("re", "im")

    def __init__(self, re: Decimal | int, im: Decimal | int = 0):
        if re and im:
            dust = last_digit(DUST) * (abs(re) + abs(im))
            re, im = (part if abs(part) > dust else Decimal(0) for part in (re, im))
        self.re, self.im = Decimal(re), Decimal(im)

    def __add__(self, other: Big) -> Big:
        return Big(self.re + other.re, self.im + other.im)

    def __sub__(self, other: Big) -> Big:
        return Big(self.re - other.re, self.im - other.im)

    def __neg__(self) -> Big:
        return Big(-self.re, -self.im)

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

def fraction(v: Value) -> Fraction:
    """A real value as a fraction."""
    if isinstance(v, Fraction):
        return v
    if v.im or abs(v.re.adjusted()) > 10_000:
        raise Undefined("not real, or too large or too small for a fraction")
    return Fraction(v.re)

def exp(z: Big) -> Big:
    """Euler's formula; the sine and cosine of the angle by their series, that of e^x sorted by powers of
    i."""
    if not z.im:
        return Big(z.re.exp())
    if abs(z.im) > 10 ** 6:
        raise Undefined("angle too large")
    x, term, sums, n = z.im - (z.im / PI / 2).to_integral_value() * 2 * PI, Decimal(1), [Decimal(0)] * 4, 0
    smallest = last_digit(-5)
    while abs(term) > smallest:
        sums[n % 4] += term
        n += 1
        term *= x / n
    size = z.re.exp() if z.re else 1
    return Big(size * (sums[0] - sums[2]), size * (sums[1] - sums[3]))

def log(z: Big) -> Big:
    """Principal value.  The angle starts as a float; a step takes its error to the seventh power."""
    if z.re == z.im == 0:
        raise Undefined("log of 0")
    if not z.im:
        return Big(abs(z.re).ln(), PI * (z.re < 0))
    size = abs(z)
    angle = Decimal(math.atan2(z.im / size, z.re / size))
    for _ in range(1 + (decimal.getcontext().prec > 60)):
        error = (z / (Big(size) * exp(Big(0, angle)))).im
        angle += error + error ** 3 / 6 + 3 * error ** 5 / 40
    return Big(size.ln(), angle)

def root(z: Big) -> Big:
    """The square root with a real part that is not negative."""
    larger = ((abs(z) + abs(z.re)) / 2).sqrt()
    smaller = z.im / 2 / larger if z.im else z.im
    return Big(larger, smaller) if z.re >= 0 else Big(abs(smaller), larger.copy_sign(z.im))

def turn(z: Big) -> tuple[Big, Big]:
    """Cosine and sine."""
    e = exp(I * z)
    return ((e + ONE / e) / TWO, (e - ONE / e) / (TWO * I)) if z.im else (Big(e.re), Big(e.im))

def tan(z: Big) -> Big:
    cosine, sine = turn(z)
    return sine / cosine

def arctan(z: Big) -> Big:
    return (log(ONE + I * z) - log(ONE - I * z)) / (TWO * I) if z.im else Big(log(Big(1, z.re)).im)

def arcsin(z: Big) -> Big:
    return -I * log(I * z + root(ONE - z * z))

ONE, TWO, I = Big(1), Big(2), Big(0, 1)
CALLS = {"exp": exp, "log": log, "cos": lambda z: turn(z)[0], "sin": lambda z: turn(z)[1], "tan": tan,
      "cosh": lambda z: (exp(z) + exp(-z)) / TWO, "sinh": lambda z: (exp(z) - exp(-z)) / TWO,
      "tanh": lambda z: TWO / (ONE + exp(-z - z)) - ONE, "arcsin": arcsin, "arctan": arctan,
      "arccos": lambda z: Big(PI / 2) - arcsin(z), "arccot": lambda z: Big(PI / 2) - arctan(z),
      "arcsinh": lambda z: log(z + root(z * z + ONE)), "Re": lambda z: Big(z.re), "Im": lambda z: Big(z.im),
      "arccosh": lambda z: log(z + root(z + ONE) * root(z - ONE)),
      "arctanh": lambda z: (log(ONE + z) - log(ONE - z)) / TWO,
      "conj": lambda z: Big(z.re, -z.im), "cis": lambda z: exp(I * z), "abs": lambda z: Big(abs(z))}
for _name, _other in table("sec cos csc sin cot tan sech cosh csch sinh coth tanh").items():
    CALLS[_name] = lambda z, f=CALLS[_other]: ONE / f(z)
    CALLS.setdefault("arc" + _name, lambda z, f=CALLS["arc" + _other]: f(ONE / z))
EXACT = {"abs": abs, "Re": lambda x: x, "conj": lambda x: x, "Im": lambda x: Fraction(0),
          "sgn": lambda x: Fraction((x > 0) - (x < 0)), "floor": lambda x: Fraction(math.floor(x)),
          "ceil": lambda x: Fraction(math.ceil(x))}

def order(a: Value, b: Value) -> int:
    """-1, 0 or 1 for a < b, a = b, a > b: exact for fractions, else to the digits of the context less 15."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return (a > b) - (a < b)
    a, b = big(a), big(b)
    if abs(a - b) <= last_digit(CLOSE) * max(abs(a), abs(b)):
        return 0
    return 1 if a.im or b.im or a.re > b.re else -1

def between(values: list[Value]) -> list[Fraction]:
    """Numbers between and beyond real values."""
    at = sorted(map(fraction, values)) or [Fraction(0)]
    at = [at[0] - 2, *at, at[-1] + 2]
    return [(x + y) / 2 for x, y in zip(at, at[1:]) if y - x > Fraction(1, 10 ** 40)]

def real_roots(c: list[Fraction]) -> list[Value]:
    """The real roots of c[0] + c[1] x + ..., in order, exact where they are rational: between the roots of
    its derivative a polynomial changes its sign at most once."""
    while c and not c[-1]:
        c = c[:-1]
    if len(c) < 3:
        return [-c[0] / c[1]] if len(c) == 2 else []
    slope = [n * k for n, k in enumerate(c)][1:]
    at = lambda x, c=c: reduce(lambda total, k: total * x + k, reversed(c))
    bound, found = 1 + max(abs(k / c[-1]) for k in c), []
    turns = sorted(map(fraction, real_roots(slope)))
    for low, high in zip([-bound, *turns], [*turns, bound]):
        if at(low) * at(high) < 0:
            for _ in range(24):
                middle = Fraction(round((low + high) * 2 ** 49), 2 ** 50)
                low, high = (middle, high) if at(low) * at(middle) > 0 else (low, middle)
            for _ in range(4):                            # Newton's steps, as far as rounding allows
                high = Fraction(round((high - at(high) / (at(high, slope) or 1)) * 10 ** 70), 10 ** 70)
        simple = high.limit_denominator(10_000)
        if at(simple) == 0:
            found.append(simple)
        elif abs(at(high)) < Fraction(1, 10 ** 50):
            found.append(Big(Decimal(high.numerator) / Decimal(high.denominator)))
    return [x for n, x in enumerate(found) if n == 0 or order(x, found[n - 1])]
