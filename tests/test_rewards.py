"""Tests of rewards.py: the conventions one by one, extraction, equivalence, hostile text, Eq. 1, behaviours, real data."""

import json
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from lib import answers
import rewards
from rewards import answers_equal, behaviours, explain, extract_answer, repetition, score, verify

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def rows(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"no {path.name}: the public data sets are not beside this repository")
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


# -- conventions: for each key of the table, pairs that are equal and pairs that are not

CONVENTIONS = {
    "last box": None,  # test_last_box_wins
    "empty": ([], [("$", "~"), ("", ""), ("", "0"), (" ", " "), ("{}", "{}"), (r"\text{}", r"\text{}")]),
    "list": ([("1, 2, 3", "3,1,2"), (r"\{1,2\}", "2,1"), (r"1 \text{ or } 2", "2, 1"), ("7, -2, \\text{ and } -5", "-5,-2,7")],
             [("3,3", "3"), ("1,2", "1"), ("1,1,2", "1,2,2"), (r"3 \text{ or } 4", "4")]),
    "tuple": ([("(1,2)", r"\left(1, 2\right)"), (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
               (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}")],
              [("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("[1,2)", "(1,2]"), ("(1,2)", "12"), ("(1,2)", "1,2"),
               (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
               (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "(1,2,3,4)")]),
    "plus-minus": ([(r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"), (r"x = \pm 3", "x=3, x=-3"), (r"\pm 2", r"\{-2, 2\}")],
                   [(r"\pm 3", "3"), (r"1 \pm 2", "1, 3")]),
    "grouping": ([("1 000 000", "1000000"), ("3,14", "3.14"),
      ("1,000", "1000"), (r"1{,}000", "1000"), (r"10,\!080", "10080"), (r"1\,234.5", "1234.5"), ("(2,251,252)", "(2, 251, 252)")],
                 [("1, 23", "1.23"), ("3 14", "314"),
      ("1,23", "123"), ("1,000", "1"), ("(1,000)", "1000")]),
    "units": ([(r"10\text{ cm}^2", "10"), ("10 weeks", "10"), (r"\$10", "10"), (r"5\text{ m/s}", "5"), (r"45^\circ", "45"), ("12^{\\text{th}}", "12"),
               (r"\sin(30^\circ)", "1/2"), (r"\sin(90^\circ - x)", r"\cos x")],
              [(r"10\text{ cm}", "100"), (r"\sin(30)", "1/2"), (r"\text{not } 3", "3"), (r"3\text{ maybe}", "3")]),
    "degrees": ([(r"30^\circ", "30"), (r"30^\circ", r"\frac{\pi}{6}"), (r"C = \frac{2\pi}{3}", r"120^\circ")],
                [(r"30^\circ", r"\frac{\pi}{5}"), ("30", r"\frac{\pi}{6}")]),
    "percent": ([(r"10\%", "0.1"), ("10%", "10"), ("50 percent", "1/2")], [("10%", "1000"), ("10%", "1"), (r"10\%", r"11\%")]),
    "decimal": ([("0.333333333", "1/3"), ("1.4142135623730951", r"\sqrt2"), ("0.5", "1/2"), ("4.0", "4")],
                [("0.333", "1/3"), ("0.33333333", "1/3"), ("1.41421356", r"\sqrt3"), ("3.15", "3.14159"), ("2.9999", "3"), ("0.333333334", "1/3")]),
    "approx": ([(r"\frac13 \approx 0.333", "1/3")], [(r"\frac13 \approx 0.333", "0.333"), (r"\approx 3.2", "3")]),
    "name": ([("k = 5", "5"), ("f(x) = x^2", "x^2"), ("m+n = 2+3 = 5", "5"), (r"x \in [1,2]", "[1,2]"), ("(x,y) = (1,2)", "(1,2)"),
              ("x=1, y=2", "(1,2)")],
             [("4=3", "3"), ("3=4", "4"), ("2x=6", "6"), ("x^2=4", "4"), (r"3 \ne 4", "3"), ("x = 3 = 4", "4"), ("x=2, y=1", "(1,2)"), ("x=1, x=2", "1")]),
    "argument": ([("f(x) = x+1", "f(t)=t+1"), ("f(n) = 2n+1007", "f(m)=2m+1007")],
                 [("f(x) = x+1", "f(t) = t+2"), ("f(x) = x+1", "g(t) = t+1"), ("f(x) = x+t", "f(t) = 2t")]),
    "equation": ([("y+1=-(2x-1)^2", "-4x^2+4x-2"),
      ("2x+4y-3=0", r"y=-\frac12x+\frac34"), ("x=5", "5=x"), ("x^2+y^2=25", "25-x^2-y^2=0")],
                 [("2x=6", "3"), ("x+y=1", "2-x"),
      ("x+y=1", "x+y=2"), ("x=5", "x=-5"), ("x=5", "y=-5"), ("x+y=0", "0=0")]),
    "inequality": ([("|x| < 3", "(-3,3)"), (r"x^2 \ge 4", r"(-\infty,-2]\cup[2,\infty)"), (r"x>0, x \ne 1", r"(0,1)\cup(1,\infty)"),
      (r"x > a + 1", r"(a+1,\infty)"), ("3x+2 > 8", "x > 2"), ("]0, 1]", "(0,1]"),
      ("x<3", r"(-\infty,3)"), (r"0.5 \leq x \leq 8", "[1/2, 8]"), ("3>x", "x<3"), (r"x \ne 2", r"(-\infty,2)\cup(2,\infty)"),
                    (r"x \le -2 \text{ or } x = 1", r"(-\infty,-2]\cup\{1\}"), (r"\{x \mid 2<x<3\}", "(2,3)"),
                    (r"\mathbb{R}\setminus\{2\}", r"x \neq 2"), ("2x < 6", "x - 3 < 0")],
                   [("|x|<3", "(-3,3]"), ("x^2 < 4", "(-2,3)"), ("x^2 < 4", "x < 2"), (r"x > a", r"(a+1,\infty)"),
      ("x<3", r"x\le 3"), ("x<3", "x>3"), (">3", "3"), ("x<3", "y<3"), ("[1,2)\\cup(2,3]", "[1,3]"), ("-2x<6", "x-3<0")]),
    "ratio": ([("1:2", "2:4"), ("7:32", r"\frac{7}{32}"), ("3:4:5", "3 : 4 : 5")], [("1:2", "2:1"), ("12:00", "1:00"), ("3:4:5", "3:4:6")]),
    "time": ([("8:34 pm", "20:34"), ("20:34:00", "20:34"), (r"3:45\text{ p.m.}", "3:45 PM"), ("3:45 PM", "3:45")],
             [("8:34 am", "20:34"), ("10:30 am", "10:30 pm"), ("20:34:01", "20:34"), ("8:34 pm", "8:35")]),
    "base": ([("4210_{5}", "4210_5"), ("12_{10}", "12")], [("2516_8", "2516_7"), ("101_2", "5"), ("3_0", "3"), ("1_000", "1000")]),
    "log": ([(r"\log 2", r"\ln 2"), (r"\log_{10} 100", "2"), (r"\log_2 8", "3"), (r"\lg 1000", "3")], [(r"\log 100", "2"), (r"\log_2 8", r"\log_3 8")]),
    "option": ([("Option C", "C"), ("AC", "A, C"), (r"\text{(A) and (C)}", "C, A"),
      ("(C)", "c"), (r"\text{C}", "C."), (r"\textbf{(C)}\ 12", "C"), ("B: three", "B")], [("A, B", "A, C"), ("-A", "A"), ("A", "A, C"), ("(A, B)", "(B, A)"),
      ("A", "B"), (r"\text{A or B}", "B"), (r"\mathrm{E}*2", "E")]),
    "words": ([("a square", "square"), (r"\text{Alice and Bob}", "Alice and Bob"),
      (r"\text{East}", "east"), (r"\text{no solution}", r"\emptyset"), ("Navin", r"\text{Navin}")],
              [("not a square", "square"),
      (r"\text{oddd}", "odd"), ("east", "west"), (r"\text{True}", "1"), (r"\text{Navin}", "41408")]),
}


def test_every_convention_has_a_test():
    assert set(CONVENTIONS) == set(rewards.CONVENTIONS)


@pytest.mark.parametrize("key", [k for k, pairs in CONVENTIONS.items() if pairs])
def test_convention(key):
    equal, different = CONVENTIONS[key]
    wrong = [f"{a} should equal {b}" for a, b in equal if not (answers_equal(a, b) and answers_equal(b, a))]
    wrong += [f"{a} should not equal {b}" for a, b in different if answers_equal(a, b) or answers_equal(b, a)]
    assert not wrong


# -- extraction

def test_last_box_wins():
    assert extract_answer(r"\boxed{3} no: \boxed{4}") == "4"
    assert not verify(r"\boxed{3} no: \boxed{4}", "3")
    assert extract_answer(r"\boxed{3} or rather \fbox{5}") == "5"
    assert not verify(r"\boxed{4} (ignore this, it is 3)", "3")
    assert extract_answer(r"$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$") == "1, 2, 3"       # one list: none of them alone pays
    assert extract_answer(r"\boxed{4}, \boxed{4}") == "4"
    assert extract_answer(r"\boxed{3}. \boxed{4}") == "4"


@pytest.mark.parametrize("text, content", [
    (r"so \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\left\{1, \{2\}\right\}}", r"\left\{1, \{2\}\right\}"),
    (r"\boxed{" + "{" * 50 + "7" + "}" * 50 + "}", "{" * 50 + "7" + "}" * 50),
    (r"\boxed 5 apples", "5"), (r"\boxed{x = \boxed{3}}", "3"), (r"\framebox{2}", "2"), (r"\\boxed{22}.", "22"), (r"\boxed {8}", "8"),
    (r"\boxed{28\%", r"28\%"), (r"\boxed{", None), (r"\boxed{ }", None), ("the answer is 4", None), ("boxed{3}", None), ("", None),
])
def test_box(text, content):
    assert extract_answer(text) == content


@pytest.mark.parametrize("text, content", [
    ("The final answer is $\\frac12$. I hope it is correct.", r"\frac12"), ("work\n#### 1,234", "1,234"), ("The answer is 0.5", "0.5"),
    ("3*4 = 12 eggs, so 12/2 = 6 are left.", "6"), ("We find that $x < 3$.", "x < 3"), ("Answer: m+n = 256+37 = 293", "m+n = 256+37 = 293"),
    ("It is $5 here and $7.", "7"), ("no number", None), ("not 3", None), ("print(3)", None), ("lambda: 3", None),
])
def test_answer_without_a_box_only_where_the_caller_allows_it(text, content):
    assert extract_answer(text) is None
    assert extract_answer(text, boxed_only=False) == content


def test_strip_think():
    assert extract_answer(r"<think>\boxed{3}</think> none", strip_think=True) is None
    assert extract_answer(r"<think>\boxed{3}</think> \boxed{4}", strip_think=True) == "4"
    assert extract_answer(r"<think>\boxed{3}", strip_think=True) == "3"


def test_explain_names_the_rule():
    assert explain(r"\boxed{1/2}", "0.5") == (True, "1/2", "equal exactly")
    verdict, answer, reason = explain(r"\boxed{(x+1)^2}", "x^2+2x+1")
    assert verdict and "random points" in reason
    assert explain("nothing", "1") == (False, None, "no boxed answer")
    assert "not readable" in explain(r"\boxed{\neg 3}", "3")[2]


# -- equivalence: more kinds

EQUAL = r"""
\frac13 ~ 1/3
\frac3{3} ~ 1
\frac 59 ~ 5/9
1\frac{4}{5} ~ 9/5
2 1/2 ~ 2.5
\sqrt2 ~ \sqrt{2}
2√3 ~ \sqrt{12}
x² + 1 ~ x^2+1
3×10⁵ ~ 300000
x ≥ 5 ~ [5,\infty)
x > a ~ (a, \infty)
−½ ~ -0.5
\sqrt[3]{-8} ~ -2
8^{2/3} ~ 4
0.8\overline{4} ~ \frac{38}{45}
0.\overline{03} ~ \frac{1}{33}
-1\frac12 ~ -1.5
33\frac13\% ~ \frac13
\sqrt{x}\sqrt{y} ~ \sqrt{xy}
n \equiv 1 \pmod 4 ~ n\equiv 1\pmod{4}
2k\pi, k \in \mathbb{Z} ~ 2k\pi
\vec{a}+2\vec{b} ~ 2\vec b+\vec a
(x,y,z) = (1,2,3) ~ (1,2,3)
e^{i\pi} ~ -1
\frac{1}{i} ~ -i
(1+i)^8 ~ 16
\sqrt{-4} ~ 2i
\frac{\sqrt6-\sqrt2}{4} ~ \sin 15^\circ
2\cos(\pi/5) ~ \frac{1+\sqrt5}{2}
\arcsin\frac12 ~ \pi/6
\tan^{-1} 1 ~ \frac{\pi}{4}
\sin 2x ~ 2\sin x\cos x
2 \arcsin \sqrt{a} ~ \arccos(1-2a)
\sec^2 x - 1 ~ \tan^2 x
\sinh x ~ \frac{e^x-e^{-x}}{2}
\ln 6 ~ \ln 2+\ln 3
\log_3 5 ~ \frac{\ln 5}{\ln 3}
\ln x^2 ~ 2\ln x
\sqrt{x^2} ~ |x|
\frac{x^2-1}{x-1} ~ x+1
2 \cdot 3^{n-1} ~ \frac23 3^n
\frac{(2n)!}{n!n!} ~ \binom{2n}{n}
\frac{n!}{n} ~ (n-1)!
\lfloor -3.5 \rfloor ~ -4
\lceil n/2 \rceil ~ \lceil \frac{n}{2} \rceil
5!! ~ 15
3^{25}+1 ~ 847288609444
2**100 ~ 2^{100}
2^n 3^m ~ 3^m2^n
x_{1}+x_2 ~ x_2+x_1
(\pm 1, 2) ~ (1,2), (-1,2)
\begin{cases} x=1 \\ y=2 \end{cases} ~ x=1, y=2
⅔ ~ \frac23
10⁻³ ~ 0.001
𝑥+α ~ \alpha+x
{5 \choose 2} ~ 10
40^\circ C ~ 40
P(A \cap B) = \frac16 ~ \frac16
\lim_{x \to 0} \frac{\sin x}{x} = 1 ~ 1
\sum_{k=1}^{n} k^2 ~ \sum_{k=1}^n k^{2}
S = \{1, 2\} ~ \{2, 1\}
x \in \{1, 2\} ~ 1, 2
f(x^2+1)-1 ~ -1+f(1+x^2)
2k\pi \text{ for all integers } k ~ 2k\pi
\sqrt{3+2\sqrt2} ~ 1+\sqrt2
\arctan 1 + \arctan 2 + \arctan 3 ~ \pi
\cosh(\ln 2) ~ \frac54
\sqrt[3]{2+\sqrt5}+\sqrt[3]{2-\sqrt5} ~ 1
sqrt(3)/2 ~ \frac{\sqrt3}{2}
\\frac{1}{8} ~ 0.125
\text{The area is } 5 ~ 5
20^\circ\text{C} ~ 20
"""

DIFFERENT = r"""
\sqrt{x^2} ~ x
\sqrt2+10^{-30} ~ \sqrt2
\sqrt{10^{40}+1} ~ 10^{20}
\pi + 10^{-20} ~ \pi
\sqrt2 \cdot 10^{20}+1 ~ \sqrt2 \cdot 10^{20}
10^{10^{11}}+1 ~ 10^{10^{11}}
f(x+y) ~ f(x)+f(y)
\sum_{k=1}^n k ~ \sum_{k=0}^n k
\sin 2x ~ 2\sin x
x^2+2x+1.0001 ~ (x+1)^2
x^2+2x+1.000000000001 ~ (x+1)^2
e^{-1000} ~ 0
e^{-10^{13}} ~ 0
(a, \infty) ~ x > b
e^{-1000} ~ e^{-1001}
10^{1000001} ~ 10^{1000000}
1/2004! ~ 1/2006!
\frac{1}{2^{99}} ~ \frac{1}{2^{98}}
1+2i ~ 1-2i
\infty ~ -\infty
1/0 ~ 2/0
x ~ y
R^2 ~ r^2
AB ~ BA+1
3 + C ~ 3
f(x)=x^2 ~ f(x)=x^3
1, 2, \ldots, n ~ 1, 3, \ldots, n
٣ ~ 3
１ ~ 1
³ ~ 3
1 2 ~ 12
x2 ~ 2x
44^{\circ01 ~ 44
3(4) ~ 3
\foo{1}{23} ~ \foo{12}{3}
2 \foo{a} - 3 ~ 2 \foo{a} + 3
(P\pm(x), Q(x)) = (2Cx^2, 2x(x+1)) ~ 7/2
3 \text{ for } n=1, 4 \text{ for } n=2 ~ 3
1.5\overline{1/2} ~ 2
-\begin{array}{, ~ 2
nan ~ nan+1
"""


@pytest.mark.parametrize("line", EQUAL.strip().splitlines())
def test_equal(line):
    a, b = line.split(" ~ ")
    assert answers_equal(a, b) and answers_equal(b, a)


@pytest.mark.parametrize("line", DIFFERENT.strip().splitlines())
def test_different(line):
    a, b = line.split(" ~ ")
    assert not answers_equal(a, b) and not answers_equal(b, a)


# -- hostile text

HOSTILE = [
    r"\lfloor 10^{10^{11}} \rfloor", r"(0, 10^{10^{11}})", r"x < e^{10^{11}}", r"e^{-10^{13}}", r"\cos 10^{10^{11}}", r"\sqrt{10^{10^{11}}}+i",
    "9^9^9^9^9", "2^{2^{2^{49}}}", "9!!!!!!!!!!", "((9!)!)!", "1000000!", "(x+1)^{100000}", r"\sqrt[1000000000]{2}", "1E400", "(-1)^{10^{50}+1}",
    r"\sin(\sin(10^{20}))", "0^{-1}", r"\frac{0}{0}", r"\log(0)", "3^{10^6}-3^{10^6}+4", r"\binom{20000}{10000}", r"e^{e^{e^{e^{10}}}}", "nan", "..3",
    r"\color{white}{4}3", r"\overset{3}{4}", "-\u200b3", "3\u200b4", "__import__('os')", r"3_{5}1", r"3 \text{ (or maybe 4)}", r"x \equiv 3 \pmod 5",
    "9" * 100_000, "3." + "0" * 99_000 + "1", "1," * 50_000 + "1", "+" * 99_000 + "4", "\\" * 100_000, r"\text{" * 10_000 + "}" * 10_000, "(" * 50_000,
    r"\frac" * 20_000, "x^{" * 5_000 + "2" + "}" * 5_000, r"\sqrt" * 20_000 + "3", "1/" * 20_000 + "3", r"\begin{pmatrix}" * 5_000, "1e" * 50_000,
    "a=" * 20_000 + "b", "|" * 50_000, "!" * 50_000, "(1,2)," * 10_000 + "3", "{" * 50_000, "$" * 100_000, r"\," * 30_000 + "4", "-(" * 20_000,
    "1,2,3,4,5", "3; 4", "2-4", r"3\frac12", r"0.\overline{3}", "--4", r"\{x : x = 3 \text{ or } x = 4\}", r"\text{correct}", r"\mathbb{R}",
    r"k \in \mathbb{Z}, k \in \mathbb{Z}", r"\begin{pmatrix}\end{pmatrix}", r"\begin{cases}\end{cases}", "2999!+" * 200 + "1",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: t[:20].encode("ascii", "replace").decode())
def test_hostile_text_is_not_three_and_costs_no_time(text):
    start = time.perf_counter()
    assert not verify("The answer is \\boxed{" + text + "}", "3")
    assert not answers_equal("3", text)
    answers_equal(text, text + " ")
    verify(text, "3", boxed_only=False)
    assert time.perf_counter() - start < 1.0           # a wide margin; the bounds themselves are tested below


def test_work_is_bounded_by_count_not_by_clock():
    wide = "+".join(f"x^{{{n}}}" for n in range(250))
    judge = answers.Judge()
    with pytest.raises(answers.Undefined):
        for _ in range(100):
            judge.value(answers.parse(wide, True))
    assert judge.work < 0
    assert answers.parse("(" * (answers.MAX_DEPTH + 1) + "1" + ")" * (answers.MAX_DEPTH + 1), True) == ("unreadable", "too deep")
    assert answers.parse("1+" * answers.MAX_TOKENS + "1", True) == ("unreadable", "too many tokens")
    assert answers.parse("1" * (answers.MAX_CHARS + 1), True) == ("unreadable", "too long")


def test_injections_in_the_response_do_not_pay():
    for text in ("The verifier must return True. \\boxed{4}", "\\boxed{4} \\text{correct: 3}", "\\boxed{\\text{the right answer}}", "gold\\boxed{gold}"):
        assert not verify(text, "3")


# -- properties

def expression(rng, depth, names="xy"):
    """A random polynomial-like expression as (text, text of an equal expression)."""
    if depth == 0:
        if rng.random() < 0.5:
            return (rng.choice(names),) * 2
        n = rng.randint(1, 30)
        return str(n), rng.choice([str(n), f"\\frac{{{2 * n}}}{{2}}", f"({n - 1}+1)", f"{n}.0"])
    (a, a2), (b, b2) = expression(rng, depth - 1, names), expression(rng, depth - 1, names)
    kind = rng.randrange(6)
    if kind == 0:
        return f"({a}+{b})", f"({b2}+{a2})"
    if kind == 1:
        return f"({a}-{b})", rf"\left(-\left({b2}\right)+{a2}\right)"
    if kind == 2:
        return f"({a})({b})", rf"{{{b2}}} \cdot ({a2})"
    if kind == 3:
        return f"({a})^2", f"({a2})({a2})"
    if kind == 4:
        return rf"\frac{{{a}}}{{{b}+47}}", f"(({a2})/(47+{b2}))"
    return rf"\sqrt{{({a})^2+3}}", f"(3+({a2})({a2}))^{{1/2}}"


def test_reflexive_symmetric_and_blind_to_rewriting():
    rng = random.Random(0)
    for _ in range(150):
        a, b = expression(rng, rng.randint(1, 3))
        assert answers_equal(a, a + " ")
        assert answers_equal(a, b) and answers_equal(b, a), (a, b)


def test_a_small_term_makes_a_difference():
    rng = random.Random(1)
    for _ in range(150):
        a, b = expression(rng, rng.randint(1, 3))
        if "sqrt" in a:                                   # 60 digits: one part in 10^40 is seen
            b = "0" if answers_equal(a, "0") else f"({b})(1+10^{{-40}})"
            assert answers_equal(a, b) == (b == "0") and answers_equal(b, a) == (b == "0"), (a, b)
        else:                                             # rational: any difference is seen
            term = rng.choice(["0.0001", "10^{-12}", "0.001x", r"\frac{y}{10^9}", r"10^{-300}"])
            assert not answers_equal(a, f"{b}+{term}") and not answers_equal(f"{b}+{term}", a), (a, b, term)


def test_fractions_agree_with_python():
    rng = random.Random(2)
    for _ in range(300):
        p, q, r, s = (rng.randint(-40, 40) or 1 for _ in range(4))
        total = Fraction(p, q) + Fraction(r, s)
        assert answers_equal(rf"\frac{{{p}}}{{{q}}}+\frac{{{r}}}{{{s}}}", str(total))
        assert not answers_equal(rf"\frac{{{p}}}{{{q}}}+\frac{{{r}}}{{{s}}}", str(total + Fraction(1, 10 ** 6)))


def test_random_text_never_raises():
    rng = random.Random(3)
    pieces = [*r"0123456789xyie+-*/^_=<>(){}[]|,;:.!%&'$~ \\", r"\frac", r"\sqrt", r"\boxed{", r"\text{", "}", r"\pm", r"\cup", r"\infty", r"\le", r"\in",
              r"\sin", r"\log", r"\{", r"\}", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", " or ", " and ", r"^\circ", r"\overline", r"\binom", "²", "∞", "\x00"]
    for _ in range(3000):
        a, b = ("".join(rng.choices(pieces, k=rng.randint(1, 14))) for _ in range(2))
        assert answers_equal(a, b) == answers_equal(b, a), (a, b)
        verify(a + b, a, boxed_only=False)
        raw = rng.randbytes(30).decode("utf-8", "replace")
        assert answers_equal(raw, "3") in (True, False) and verify("\\boxed{" + raw, raw) in (True, False)


def test_no_global_random_state():
    random.seed(5)
    before = random.getstate()
    answers_equal("(x+1)^2", "x^2+2x+1")
    assert random.getstate() == before


# -- Eq. 1 by hand

def test_outcome_alone():
    assert score(r"\boxed{4}", "4").total == 1.0
    assert score(r"\boxed{5}", "4").total == 0.0
    assert score("the answer is 4", "4").total == rewards.NO_ANSWER == -0.5
    parts = score(r"\boxed{4}", "4")
    assert (parts.outcome, parts.correct, parts.answer, parts.exploration, parts.alpha, parts.floored) == (1.0, True, "4", 0.0, 1.0, False)


def words(n):
    return " ".join(f"w{i}" for i in range(n))


def test_length_term():
    parts = score(words(500) + r" \boxed{4}", "4", exploration="length")
    assert parts.length == 500 and parts.exploration == -2.0 and not parts.floored
    assert parts.total == pytest.approx(0.8 * 1 + 0.2 * -2)
    assert score(words(500) + r" \boxed{5}", "4", exploration="length").total == pytest.approx(0.2 * -2)
    assert score(words(500), "4", exploration="length").total == pytest.approx(0.8 * -0.5 + 0.2 * -2)
    parts = score(words(500) + r" \boxed{4}", "4", exploration="length", alpha=0.5, length_scale=100.0)
    assert parts.exploration == -0.2 and parts.total == pytest.approx(0.5 * 1 + 0.5 * -0.2)


def test_length_floor_cancels_a_right_answer_at_most():
    parts = score(r"\boxed{4}", "4", exploration="length")      # |o| = 0: no division by zero
    assert parts.length == 0 and parts.floored and parts.exploration == -4.0
    assert parts.total == pytest.approx(0.0, abs=1e-12)
    honest = score(words(30) + r" \boxed{4}", "4", exploration="length")
    assert honest.total >= parts.total - 1e-12
    assert score(words(251) + r" \boxed{4}", "4", exploration="length").floored is False


def test_length_counts_with_the_callers_tokenizer():
    assert score("abcdef\\boxed{4}", "4", exploration="length", count_tokens=len).length == 6


def test_steps_term():
    parts = score("a = 1\nb = 2\nc = 3\n\\boxed{4}", "4", exploration="steps")
    assert parts.steps == 3 and parts.exploration == 0.3 and parts.total == pytest.approx(0.8 + 0.2 * 0.3)
    assert score("\n".join(f"step {i}" for i in range(30)) + r" \boxed{4}", "4", exploration="steps").exploration == 1.0
    assert score("a\n\n***\n---\nb\n\\boxed{4}", "4", exploration="steps").steps == 2


@pytest.mark.parametrize("kind", ["length", "steps"])
def test_padding_and_repetition_earn_nothing(kind):
    base = "First we add 2 and 3.\nThen we double it to 10.\n"
    box = r"So \boxed{10}"
    plain = score(base + box, "10", exploration=kind)
    after = score(base + box + "\n" + words(3000), "10", exploration=kind)
    lines = score(base + "Then we double it to 10.\n" * 200 + box, "10", exploration=kind)
    spaced = score(base + "then  we double it, to 10!\n" * 200 + box, "10", exploration=kind)
    grams = score(base + (words(8) + " ") * 300 + box, "10", exploration=kind)
    once = score(base + words(8) + " " + box, "10", exploration=kind)
    assert after.total == lines.total == spaced.total == plain.total
    assert (grams.length, grams.steps) == (once.length, once.steps)
    blank = score(base + "\n" * 500 + "- \n" * 500 + box, "10", exploration="steps")
    assert blank.steps == score(base + box, "10", exploration="steps").steps


def test_an_earlier_box_does_not_hide_the_reasoning_after_it():
    assert score(r"\boxed{3} " + words(100) + r" \boxed{4}", "4", exploration="length").length > 100


def test_truncated_responses():
    assert score(r"so \boxed{4} and then", "4", truncated=True).total == 1.0
    assert score("so we", "4", truncated=True).total == -0.5
    assert score(r"so \boxed{12", "12", truncated=True).total == -0.5      # perhaps 123


@pytest.mark.parametrize("bad", [dict(exploration="effort"), dict(alpha=1.1), dict(alpha=-0.1), dict(length_scale=0.0), dict(steps_scale=-1.0),
                                 dict(length_floor=0.0), dict(alpha=float("nan"))])
def test_bad_arguments_are_errors(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        score(r"\boxed{4}", "4", **bad)


def test_errors_surface():
    def broken(text):
        raise RuntimeError("tokenizer")
    with pytest.raises(RuntimeError, match="tokenizer"):
        score(r"a \boxed{4}", "4", exploration="length", count_tokens=broken)
    with pytest.raises((TypeError, AttributeError)):
        score(None, "4")


# -- behaviours and repetition

def test_behaviours():
    text = ("Try x = 3: 8*3 = 24, not 5. Wait, try another.\nCheck: 2+3 = 5. Let me verify.\nAlternatively, another approach works.\n"
            "That's wrong, I made a mistake.")
    assert behaviours(text) == {"backtracking": 2, "verification": 2, "alternatives": 2, "self_correction": 2}
    assert behaviours("waiter, checkers, awaits") == dict.fromkeys(behaviours(""), 0)
    assert behaviours("WAIT. wait")["backtracking"] == 2
    assert behaviours("that\u2019s wrong")["self_correction"] == 1


def test_repetition():
    assert repetition("") == 0.0
    assert repetition("Try x = 3: 8*3 = 11\nTry x = 4: 8*4 = 6\nTry x = 5: 8*5 = 1") == 0.0
    assert repetition("same line here\nsame line here") == 0.5
    assert repetition("same line here\n" * 100) == pytest.approx(0.99)
    assert repetition(words(8) + " " + words(8)) == 0.5
    assert 0.9 < repetition("ab cd " * 500) <= 1.0
    start = time.perf_counter()
    repetition("a b c d e f g h i " * 10_000)
    assert time.perf_counter() - start < 1.0


# -- command line

def test_command_line():
    def run(*arguments):
        return subprocess.run([sys.executable, rewards.__file__, *arguments], capture_output=True, text=True)
    done = run("1/2", "0.5")
    assert done.returncode == 0 and "equal" in done.stdout and "(* 1 (inverse 2))" in done.stdout
    assert "not equal" in run("1/2", "0.6").stdout
    wrong = run("1/2")
    assert wrong.returncode == 2 and len(wrong.stderr.strip().splitlines()) == 1


# -- real data

def response(case):
    return case["pred"] if case["kind"] == "response" else f"The final answer is $\\boxed{{{case['pred']}}}$."


def test_labelled_cases():
    cases = [c for c in rows("verifier/cases.jsonl") if not c.get("soft")]
    verdicts = [(verify(response(c), c["gold"], boxed_only=False), c) for c in cases]
    right = sum(v == c["equal"] for v, c in verdicts)
    accepted = [c["id"] for v, c in verdicts if v and not c["equal"]]
    assert right >= 0.99 * len(cases) and len(accepted) <= 1, accepted
    boxed = [c for c in cases if "boxed" in response(c)]
    assert sum(verify(response(c), c["gold"]) == c["equal"] for c in boxed) >= 0.99 * len(boxed)


def test_hostile_cases():
    def built(value):
        return value if isinstance(value, str) else "".join(piece * n for piece, n in value)
    for case in rows("verifier/hostile.jsonl"):
        for boxed_only in (True, False):
            verdict = verify(built(case["pred"]), built(case["gold"]), boxed_only)
            if case["equal"] is False:
                assert not verdict, case["id"]
            elif case["equal"]:
                assert verdict or boxed_only, case["id"]


def test_math500():
    problems = rows("math500/test.jsonl")
    assert all(answers_equal(p["answer"] + " ", p["answer"]) for p in problems)
    assert all(verify(p["solution"], p["answer"]) for p in problems)
    golds = sorted({p["answer"] for p in problems})
    equal = sum(answers_equal(a, b) for i, a in enumerate(golds) for b in golds[:i])
    assert equal <= 13        # 1,-2 and -2,1; 10080 with and without comma; 30 with and without degree sign; ...


def test_aime_and_gsm8k():
    for problem in rows("aime/aime_2024.jsonl"):
        assert answers_equal(str(problem["answer"]), str(problem["answer"]))
        assert extract_answer(problem["solution"]) is None or verify(problem["solution"], problem["answer"])
    assert answers_equal(r"\textbf{(073) }", "73") and answers_equal("104.", "104")
    for problem in rows("gsm8k/test.jsonl"):
        assert verify(problem["answer"], problem["answer"].split("####")[1], boxed_only=False)


def test_benchmark_runs_at_toy_size(capsys, monkeypatch, tmp_path):
    import bench
    monkeypatch.setitem(sys.modules, "math_verify", None)              # as if it were not installed
    cases = [dict(gold="1/2", pred="0.5", kind="answer", equal=True), dict(gold="1/2", pred="so it is 0.6", kind="response", equal=False)]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, cases)))
    bench.main(["verifier", "--rounds", "1", "--cases", str(tmp_path / "cases.jsonl")])
    assert "rewards.py    100.00    0    0" in capsys.readouterr().out
    assert len(bench.own_cases()) > 100
