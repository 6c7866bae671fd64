"""Tests of rewards.py: the conventions one by one, extraction, equivalence, hostile text, Eq. 1, behaviours, real data."""

import json
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from lib import answers, bignum, tex
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
                     [("1, 23", "1.23"), ("3 14", "314"), ("0.1", "0,1", "one way"),
      ("1,23", "123"), ("1,000", "1"), ("(1,000)", "1000")]),
    "units": ([(r"10\text{ cm}^2", "10"), ("10 weeks", "10"), (r"\$10", "10"), (r"5\text{ m/s}", "5"), (r"45^\circ", "45"), ("12^{\\text{th}}", "12"),
                (r"\sin(30^\circ)", "1/2"), (r"\sin(90^\circ - x)", r"\cos x"),
               ("10 million", "10000000"), ("3 halves", "1.5"), ("5 squared", "25"), ("4 out of 5", "4/5"), ("12 miles per hour", "12"),
               (r"12\,\frac{\mathrm{km}}{\mathrm{h}}", "12"), (r"6\cdot 10^3 \text{ kg}\cdot\text{m/s}", "6000"),
               (r"\text{about } 12", "12"), ("12 sec", "12"), ("15th Day", "15"), ("only x=0", "0"), (r"2+3\mathrm{i}", "2+3i"),
               (r"\mathrm{3x+2}", "3x+2")],
              [("10 million", "10"), ("3 halves", "3"), ("5 factorial", "5"), ("5 hundred", "5"), ("5 squared", "5"), (r"4\text{i}", "4"),
               (r"2+3\mathrm{i}", "5"), (r"\mathrm{3x+2}", "5"), ("at least 5", "5"), ("5 or more", "5"), ("3 over 4", "3"),
               ("5 ft 3 in", "15"), ("5 ft 3 in", "5"), ("3 recurring", "3"),
               (r"10\text{ cm}", "100"), (r"\sin(30)", "1/2"), (r"\text{not } 3", "3"), (r"3\text{ maybe}", "3")]),
    "degrees": ([(r"30^\circ", "30"), (r"30^\circ", r"\frac{\pi}{6}"), (r"C = \frac{2\pi}{3}", r"120^\circ")],
                [(r"30^\circ", r"\frac{\pi}{5}"), ("30", r"\frac{\pi}{6}")]),
    "percent": ([(r"10\%", "0.1"), ("10%", "10"), ("50 percent", "1/2")], [("10%", "1000"), ("10%", "1"), (r"10\%", r"11\%")]),
    "decimal": ([("3.14159265", r"\pi"), ("3.141592654", r"\pi"), (r"2.314814815 \times 10^{-3}", "1/432"),
                 ("0.333333333", "1/3"), ("1.4142135623730951", r"\sqrt2"), ("0.5", "1/2"), ("4.0", "4")],
                [("0.333", "1/3"), ("0.33333333", "1/3"), ("1.41421356", r"\sqrt3"), ("3.15", "3.14159"), ("2.9999", "3"), ("0.333333334", "1/3"),
                 ("1234567890.1", "1234567890"), ("0.999999999", "1"), ("23.833333333336", "143/6"), ("46.538461538461541", "605/13"),
                 ("3.14159266", r"\pi"), ("0.500000000001", "1/2")]),
    "approx": ([(r"\frac13 \approx 0.333", "1/3")], [(r"\frac13 \approx 0.333", "0.333"), (r"\approx 3.2", "3")]),
    "name": ([("k = 5", "5"), ("f(x) = x^2", "x^2"), ("m+n = 2+3 = 5", "5"), (r"x \in [1,2]", "[1,2]"), ("(x,y) = (1,2)", "(1,2)"),
              ("x=1, y=2", "(1,2)"), ("y=2, x=1", "(1,2)"), ("b=2, a=1", "a=1, b=2"), ("(x,y)=(1,2)", "y=2, x=1"),
              ("x=6, x=-4", "x=-4, x=6"), ("x=6 or x=-4", "-4, 6"), ("x=3, y=4 or x=4, y=3", "(3,4),(4,3)"), ("2 = y", "2"), ("=5", "5"),
              ("P(X=2)=0.3", "0.3"), (r"\max f = 7", "7"), (r"\det(A)=5", "5"), (r"\text{The minimum is } -3", "-3"), ("n=1, 2", "1,2")],
             [("x=2 or x=3", "(2,3)"), ("x=3, y=4", "a=3, b=4"), ("m=2k, n=3k", "n=2k, n=3k"), ("x=5", "y=5"),
              ("y=7, x=5", "(7,5)", "one way"), ("P(X=2)=0.3", "2"), ("x=3,y=4 or x=4,y=3", "(3,4)"),
              ("4=3", "3"), ("3=4", "4"), ("2x=6", "6"), ("x^2=4", "4"), (r"3 \ne 4", "3"), ("x = 3 = 4", "4"), ("x=2, y=1", "(1,2)"), ("x=1, x=2", "1")]),
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
    "function": ([(r"\lfloor (n+1)/2 \rfloor", r"\lceil n/2 \rceil"), ("|x-5|", "|5-x|"), (r"\sqrt{(x+5)^2}", "|x+5|"),
                  (r"\max(x,-x)", "|x|"), (r"\cos(n\pi)", "(-1)^n"), (r"\binom{n}{2}", "n(n-1)/2"),
                  (r"\lfloor\log_2 n\rfloor+1", r"\lceil\log_2(n+1)\rceil"),
                  (r"\begin{cases} x & x \ge 0 \\ -x & \text{otherwise} \end{cases}", "|x|")],
                 [(r"\lfloor p/10 \rfloor", r"\lfloor p/9 \rfloor"), ("5-x", "|x-5|"), ("x+5", r"\sqrt{(x+5)^2}"), ("|x-6|+|x+6|", "12"),
                  (r"\ln x", r"\ln|x|"), (r"\lfloor x \rfloor", "x"), (r"\lceil x \rceil", r"\lfloor x \rfloor + 1"),
                  (r"\lceil \log_2 n\rceil", r"\lfloor \log_2 n \rfloor + 1"), (r"\max(x,1000)", "x"), (r"\lfloor x/10^6 \rfloor", "0"),
                  (r"\begin{cases} x & x>1 \\ 2 & \text{otherwise} \end{cases}", r"\begin{cases} x & x>2 \\ 2 & \text{otherwise} \end{cases}")]),
    "ratio": ([("1:2", "2:4"), ("7:32", r"\frac{7}{32}"), ("3:4:5", "3 : 4 : 5")], [("1:2", "2:1"), ("12:00", "1:00"), ("3:4:5", "3:4:6")]),
    "time": ([("8:34 pm", "20:34"), ("20:34:00", "20:34"), (r"3:45\text{ p.m.}", "3:45 PM"), ("3:45 PM", "3:45")],
             [("4:30 a.m.", "4:30 p.m."), ("15:10", "3:10"), ("13:12", "1:12"), ("8:34 am", "20:34"), ("10:30 am", "10:30 pm"), ("20:34:01", "20:34"), ("8:34 pm", "8:35")]),
    "base": ([("4210_{5}", "4210_5"), ("12_{10}", "12")], [("2516_8", "2516_7"), ("101_2", "5"), ("3_0", "3"), ("1_000", "1000")]),
    "log": ([(r"\log 2", r"\ln 2"), (r"\log_{10} 100", "2"), (r"\log_2 8", "3"), (r"\lg 1000", "3")], [(r"\log 100", "2"), (r"\log_2 8", r"\log_3 8")]),
    "option": ([("Option C", "C"), ("AC", "A, C"), (r"\text{(A) and (C)}", "C, A"),
      ("(C)", "c"), (r"\text{C}", "C."), (r"\textbf{(C)}\ 12", "C"), ("B: three", "B")], [("A, B", "A, C"), ("-A", "A"), ("A", "A, C"), ("(A, B)", "(B, A)"), ("DCBA", "ABCD"), (r"\text{(B) or } 7", "B"),
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
    wrong += [f"{a} should not equal {b}" for a, b, *one_way in different if answers_equal(a, b) or not one_way and answers_equal(b, a)]
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


@pytest.mark.parametrize("text, content", [
    (r"\boxed{42}. Mark your solution with \boxed", "42"), (r"\boxed{42} and \boxed{}", "42"), (r"\boxed{73**}", "73"), (r"\boxed{~42~}", "42"),
    (r"\boxed{42<|im_end|>}", "42"), (r"\boxed{}", None),
])
def test_what_is_left_in_a_box_or_after_it(text, content):
    assert extract_answer(text) == content


@pytest.mark.parametrize("text, content", [
    ("so 64 + 67 = **131**", "131"), ("Final answer: The final answer is Evelyn. I hope it is correct.", "Evelyn"), ("in all $14{,}916$", "14{,}916"),
    ("**Answer: 42**", "42"), ("the total is **131 apples**", "131"), ("<answer>42</answer>", "42"), ("the answer is -3, 4", "-3, 4"),
    ("2+3i", None), ("3 million", None), ("at least 3", None), ("between 2 and 3", None), ("x^3", None),
    ("The answer is D, because B fails.", "D"), ("3**", None), ("@3", None), ("~3", None), ("9**9**9 or 3", None),
])
def test_the_answer_of_a_text_without_a_box(text, content):
    assert extract_answer(text, boxed_only=False) == content


@pytest.mark.parametrize("text", "3** **3 *3 @3 3@ ~3 !3 &3 |3 <3 3> ?3 ;3 3# 3^ 3_ 3++ 3-- ==3 !=3 (3 3) [3 {3 3__ _3_ 3.real 0x3 3L 3j (3,)"
                         r" \\not3 \\cancel{3} \\number3 [3][0] {3}[0] eval(3) int(3) 3|4 3&&4 9**9**9 3//4 3;4".split())
def test_what_the_grammar_cannot_read_is_no_answer(text):
    assert not answers_equal(text, "3") and not answers_equal("3", text)


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
\lceil n/2 \rceil ~ \lfloor (n+1)/2 \rfloor
\lfloor \frac{n+1}{2} \rfloor ~ \lceil \frac{n}{2} \rceil
|5-x| ~ |x-5|
\max(a,b) ~ \frac{a+b+|a-b|}{2}
\ln|x| + C ~ C+\ln|x|
\frac{1}{2}\ln(x^2+1) ~ \ln\sqrt{x^2+1}
\sqrt{(x+5)^2} ~ |x+5|
x=-4, x=6 ~ x=6, x=-4
x = -4 \text{ or } x = 6 ~ \{-4, 6\}
a=1, b=2 ~ b=2, a=1
(a,b)=(1,2) ~ a=1, b=2
x=3,y=4 \text{ or } x=4,y=3 ~ (3,4),(4,3)
x=3,y=4 \text{ or } x=4,y=3 ~ (x,y)=(4,3),(3,4)
(x,y)=(3,4),(4,3) ~ (4,3),(3,4)
(x,y) \in \{(3,4),(4,3)\} ~ (4,3),(3,4)
x_1 = 2, x_2 = 3 ~ x_1=2, x_2=3
x_1 = 2, x_2 = 3 ~ 2, 3
x=2,3 ~ x=3,2
x=2 \text{ and } y=3 ~ (2,3)
10 million ~ 10,000,000
2.5 billion ~ 2.5 \times 10^9
3 thousand ~ 3000
12 miles per hour ~ 12
12\text{ miles per hour} ~ 12
12\,\frac{\mathrm{km}}{\mathrm{h}} ~ 12
12 \text{ km/h} ~ 12
12\ \mathrm{m/s^2} ~ 12
12\ \mathrm{m\cdot s^{-1}} ~ 12
9.8\,\mathrm{m}/\mathrm{s}^2 ~ 9.8
\text{about } 12 ~ 12
\text{approximately } 12 ~ 12
4:30 p.m. ~ 4:30 PM
16:30 ~ 4:30 p.m.
4:30\text{ p.m.} ~ 4:30 \text{ pm}
2+3\mathrm{i} ~ 2+3i
\mathrm{3x+2} ~ 3x+2
\mathrm{e}^{2} ~ e^2
3.14159265 ~ \pi
3.141592654 ~ \pi
0.333333333 ~ \frac13
0.666666667 ~ 2/3
3,14 ~ 3.14
1.234,5 ~ 1.234,5
\frac{360^\circ}{7} ~ \frac{360}{7}
{90^\circ} ~ 90
90^{\circ} ~ 90°
3!7! ~ 30240
3!\,7! ~ 30240
2!3!4! ~ 288
\begin{aligned} x &= 1 \\ y &= 2 \end{aligned} ~ x=1, y=2
\begin{cases} x, & \text{if } x \ge 0 \\ -x, & \text{if } x < 0 \end{cases} ~ |x|
\begin{cases} 1 & \text{if } n \text{ is even} \\ -1 & \text{if } n \text{ is odd} \end{cases} ~ (-1)^n
\begin{cases} n/2 & n \text{ even} \\ (n+1)/2 & \text{otherwise} \end{cases} ~ \lceil n/2 \rceil
\begin{cases} x+1 & x > 0 \\ 0 & \text{otherwise} \end{cases} ~ \begin{cases} 0 & x \le 0 \\ x+1 & x>0 \end{cases}
\asin(1/2) ~ \pi/6
\arcsin(1/2) ~ asin(1/2)
\operatorname{arsinh}(x) ~ \ln(x+\sqrt{x^2+1})
\sinh^{-1}(1) ~ \ln(1+\sqrt2)
\operatorname{sech} x ~ \frac{1}{\cosh x}
\coth x ~ \frac{\cosh x}{\sinh x}
\operatorname{cosec} x ~ \frac1{\sin x}
\max(3,7) ~ 7
\min\{3,7\} ~ 3
\gcd(12, 18) ~ 6
\operatorname{lcm}(4,6) ~ 12
\text{lcm}(4,6) ~ 12
binom(5,2) ~ 10
{}_5C_2 ~ 10
C_5^2 ~ 10
\binom52 ~ 10
\log_{10} 1000 ~ 3
\log_10 1000 ~ 3
log_2(8) ~ 3
\log_2 8 ~ 3
\operatorname{Re}(3+4i) ~ 3
\Im(3+4i) ~ 4
\overline{3+4i} ~ 3-4i
\operatorname{cis} \pi ~ -1
2\operatorname{cis}(60^\circ) ~ 1+\sqrt3 i
0.8333\ldots ~ 5/6
0.8333... ~ 5/6
0.8333… ~ 5/6
0.(3) ~ 1/3
0.1(6) ~ 1/6
0.\overline{142857} ~ 1/7
0.\dot{3} ~ 1/3
0.\bar{3} ~ 1/3
1.5 x 10^3 ~ 1500
1.5 × 10^3 ~ 1500
1.5\times10^{-3} ~ 0.0015
1.5e3 ~ 1500
\{1,2\}\cup\{3\} ~ \{1,2,3\}
\mathbb{R}\setminus\{-3\} ~ (-\infty,-3)\cup(-3,\infty)
\text{all real numbers except } -3 ~ x \ne -3
all real numbers except -3 ~ (-\infty,-3)\cup(-3,\infty)
\mathbb{Z}^+ ~ \mathbb{Z}^{+}
ℤ⁺ ~ \mathbb{Z}^+
ℝ∖{−3} ~ \mathbb{R} \setminus \{-3\}
(-oo, 1] ~ (-\infty, 1]
]0,1[ ~ (0,1)
]0,1[ ∪ ]2,3[ ~ (0,1)\cup(2,3)
]0,1[ \cup ]2,3[ ~ (0,1)\cup(2,3)
\frac1{\sqrt2}\begin{pmatrix}1\\1\end{pmatrix} ~ \begin{pmatrix}\frac{1}{\sqrt2}\\\frac{1}{\sqrt2}\end{pmatrix}
[[1,2],[3,4]] ~ \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix}^T ~ \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{vmatrix}1&2\\3&4\end{vmatrix} ~ -2
\det\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ -2
-\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}-1\\-2\end{pmatrix}
P(X=2)=0.3 ~ 0.3
P(X=2) = 0.3 ~ 3/10
\max f = 7 ~ 7
f_{\max} = 7 ~ 7
\det(A)=5 ~ 5
2 = y ~ y = 2
2 = y ~ 2
=5 ~ 5
The minimum is −3 ~ -3
\text{The minimum value is } -3 ~ -3
\sum_{k=1}^{10} k ~ 55
\sum_{k=1}^{4} k^2 ~ 30
\prod_{k=1}^{5} k ~ 120
\frac{5000!}{4999!} ~ 5000
x \equiv 3 \pmod 7 ~ x \equiv 10 \pmod{7}
x \equiv 3 \pmod{7} ~ x\equiv -4 (mod 7)
3 \pmod 7 ~ 10 \pmod 7
（1，2） ~ (1,2)
5 ✓ ~ 5
{\bf 42} ~ 42
\bf 42 ~ 42
2A_{16} ~ 2a_{16}
1101_{\text{two}} ~ 1101_2
15th Day ~ 15
15^{\text{th}} ~ 15
only x=0 ~ 0
\text{only } x=0 ~ x=0
14{,}916 ~ 14916
x^4 \ge 16 ~ x \le -2 \text{ or } x \ge 2
x^4>=16 ~ x<=-2 or x>=2
x^2 - 5x + 6 < 0 ~ (2,3)
x^2 - 2 > 0 ~ (-\infty,-\sqrt2)\cup(\sqrt2,\infty)
x^3 > x ~ (-1,0)\cup(1,\infty)
-3 < x < 5 ~ (-3,5)
x>-3 and x<5 ~ (-3,5)
y = 2x+3 ~ y=2x+3
f(x)=2x+3 ~ 2x+3
12 sec ~ 12
12 min ~ 12
\$5 ~ 5
5 dollars ~ 5
5\text{ USD} ~ 5
€5 ~ 5
12 apples ~ 12
12\text{ marbles} ~ 12
x^{2}+1 ~ 1+x^2
x(x+1)/2 ~ \frac{x^2+x}{2}
\frac{-1}{2} ~ -\frac12
-1/2 ~ \frac{1}{-2}
1/2,1/3 ~ 1/3, 1/2
1, 2, and 3 ~ 1,2,3
1 and 2 ~ 2, 1
\text{Monday} ~ monday
\text{no real solutions} ~ \emptyset
\varnothing ~ no solution
(x-1)^2+(y-2)^2=9 ~ x^2-2x+y^2-4y-4=0
y=\frac{1}{2}x+1 ~ x-2y+2=0
y-1=2(x-3) ~ y=2x-5
\sqrt[3]{2} ~ 2^{1/3}
\frac{\sqrt{2}}{2} ~ \frac{1}{\sqrt2}
\log_3 9 ~ 2
e^{\ln 5} ~ 5
\cos 2x ~ 1-2\sin^2 x
\tan x ~ \frac{\sin x}{\cos x}
sin(x)^2+cos(x)^2 ~ 1
\sin^2 x ~ (\sin x)^2
\frac{\pi}{3}+2k\pi ~ 2\pi k + \frac{\pi}{3}
x=\frac{\pi}{3}+2k\pi, k\in\mathbb{Z} ~ \frac{\pi}{3}+2k\pi
i^2 ~ -1
(1+i)^2 ~ 2i
(2,3] ~ 2<x\le 3
\{x \mid x>2\} ~ (2,\infty)
\{x\in\mathbb{R} : x>2\} ~ x>2
C + \frac{x^3}{3} ~ \frac{x^3}{3} + C
n(n-1)/2 ~ \binom{n}{2}
2^{n+1}-2 ~ 2(2^n-1)
\frac{n(n+1)(2n+1)}{6} ~ \frac{2n^3+3n^2+n}{6}
\binom{2n}{n} ~ \frac{(2n)!}{(n!)^2}
\cos(n\pi) ~ (-1)^n
1:2 ~ 2:4
1:2:3 ~ 2:4:6
3\frac12 ~ 3.5
-3\frac12 ~ -3.5
2 \frac{3}{4} ~ 11/4
50\% ~ 0.5
50% ~ 50
\frac12\% ~ 0.005
20 degrees ~ 20
20^\circ ~ \frac{\pi}{9}
\vec{AB} ~ \overrightarrow{AB}
\langle 1,2,3\rangle ~ (1,2,3)
(1,2,3) ~ \begin{pmatrix}1\\2\\3\end{pmatrix}
\begin{pmatrix}1&2&3\end{pmatrix} ~ (1,2,3)
\boxed{5} ~ 5
\dfrac{1}{2} ~ .5
5. ~ 5
+5 ~ 5
--5 ~ 5
0 ~ -0
1/3 + 1/6 ~ 1/2
3 cm ~ 3
3 cm^2 ~ 3
3\text{ cm}^2 ~ 3
3\text{ cubic meters} ~ 3
3 square feet ~ 3
2 hours 30 minutes ~ 2 hours 30 minutes
\lfloor x \rfloor + 1 ~ 1 + \lfloor x \rfloor
\frac{x}{|x|} ~ \frac{|x|}{x}
\sqrt{x}\sqrt{x+1} ~ \sqrt{x^2+x}
a_n = 2n+1 ~ 2n+1
a_{n} = 2n+1 ~ a_n = 2n + 1
f(n)=n+1 \text{ for all } n ~ f(n)=n+1
f(x) = x for all x ~ f(x)=x
x\in(1,2) ~ 1<x<2
x \in (-\infty, 1) \cup (2, \infty) ~ x<1 or x>2
x<1 \lor x>2 ~ x<1 or x>2
k > 4 ~ (4, \infty)
p \ge 0 ~ [0,\infty)
a \neq 0 ~ a\ne0
\text{True} ~ true
\text{Yes} ~ yes
x^2+y^2=1 ~ 2x^2+2y^2=2
3x=6y ~ x=2y
2^{1/2} ~ \sqrt2
\sqrt{8} ~ 2\sqrt2
\sqrt2\sqrt3 ~ \sqrt6
1-\frac{1}{e} ~ \frac{e-1}{e}
\frac{\ln 2}{\ln 3} ~ \log_3 2
2\sin(x)\cos(x) ~ \sin(2x)
\arctan(x) + \arctan(1/x) ~ \arctan(1/x)+\arctan(x)
\begin{bmatrix} 1 & 0 \\ 0 & 1 \end{bmatrix} ~ \begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}
\frac{7}{2}\text{ or }3.5 ~ 3.5, 7/2
\infty ~ +\infty
6.02 \times 10^{23} ~ 6.02e23
5\sqrt{3}\text{ units} ~ 5\sqrt3
36\pi \text{ cubic inches} ~ 36\pi
1,000,000 ~ 1000000
1 000 000 ~ 10^6
\text{(A)} ~ A
A. ~ A
\textbf{B} ~ B
(B) ~ b
The answer is D ~ D
C - the third one ~ C
\frac{1}{2}\ln|2x+1|+C ~ \frac{\ln|2x+1|}{2} + C
\ln|x-1| - \ln|x+1| ~ \ln\left|\frac{x-1}{x+1}\right|
|x|^2 ~ x^2
\sqrt{x^4} ~ x^2
|x-3|+|x+3| ~ |x+3|+|3-x|
\lfloor \sqrt{n} \rfloor ~ \left\lfloor n^{1/2} \right\rfloor
\left\lfloor\frac{n}{2}\right\rfloor\left\lceil\frac n2\right\rceil ~ \lfloor n^2/4 \rfloor
\lfloor \frac{n-1}{2} \rfloor ~ \lceil n/2 \rceil - 1
n - \lfloor n/2 \rfloor ~ \lceil n/2 \rceil
\frac{1-(-1)^n}{2} ~ n - 2\lfloor n/2 \rfloor
\min(a,b) + \max(a,b) ~ a+b
\max(x, -x) ~ |x|
\frac{n!}{(n-2)!} ~ n(n-1)
(n+1)! - n! ~ n \cdot n!
(n+1)!-1 ~ (n+1)n!-1
\binom{n+1}{2} ~ \frac{n(n+1)}{2}
\binom{m+n}{n} ~ \binom{m+n}{m}
\binom{n}{3} ~ n(n-1)(n-2)/6
C(n,2) ~ \frac{n(n-1)}{2}
C(10, 3) ~ 120
nCr(8,3) ~ 56
P(10,2) ~ P(10,2)
x=1 \text{ or } x=2 \text{ or } x=3 ~ 3,2,1
x = 1, x = 2, \text{ and } x = 3 ~ 1,2,3
x=0 \text{ and } y=0 ~ (0,0)
(x, y) = (0, 0), (1, 1) ~ (1,1),(0,0)
(0,0) \text{ and } (1,1) ~ (1,1),(0,0)
(a,b,c) = (1,2,3) ~ a=1, b=2, c=3
a = 1, b = 2, c = 3 ~ c=3, a=1, b=2
p=2, q=3 ~ (2,3)
m=3,n=5 ~ (m,n)=(3,5)
\{(1,2),(2,1)\} ~ (2,1),(1,2)
x=2, y=3; x=3, y=2 ~ (2,3),(3,2)
\begin{cases} x = 2 \\ y = 3 \end{cases} ~ (x,y) = (2,3)
\begin{cases} x = 2, \\ y = 3 \end{cases} ~ (2,3)
\left\{\begin{array}{l} x=2 \\ y=3 \end{array}\right. ~ x=2, y=3
f(x) = x, f(x) = -x ~ f(x) = \pm x
f(x)=0 \text{ or } f(x)=x ~ f(x)=x, f(x)=0
f(n) = n \text{ and } f(n) = 2n ~ f(n)=2n, f(n)=n
2.5 million ~ 2500000
\$3.5 \text{ million} ~ 3500000
\$2{,}500 ~ 2500
25 hundred ~ 2500
three ~ \text{three}
half ~ half
5 percent ~ 0.05
3.5 \% ~ 0.035
12\text{ inches} ~ 12
12'' ~ 12''
25^\circ\text{C} ~ 25
25\,^\circ\mathrm{C} ~ 25
60 \text{ km/h} ~ 60
60\ \text{mi}/\text{h} ~ 60
9.8 \text{ m/s}^2 ~ 9.8
9.8\ \frac{\text{m}}{\text{s}^2} ~ 9.8
5\ \text{kg}\cdot\text{m}^2 ~ 5
100\,\Omega ~ 100\Omega
1.6\times10^{-19}\text{ C} ~ 1.6\times 10^{-19}
\text{exactly } 7 ~ 7
\text{The value is } \frac12 ~ 0.5
\text{Total: } 5 ~ 5
Total = 5 ~ 5
\text{Area} = 12\pi ~ 12\pi
\text{Area of } ABC = 12 ~ 12
S = \pi r^2 ~ \pi r^2
V = \frac43\pi r^3 ~ \frac{4\pi r^3}{3}
\angle ABC = 60^\circ ~ 60
\overline{AB} = 5 ~ 5
|AB| = 5 ~ 5
AB = 5 ~ 5
f(3) = 7 ~ 7
f'(x) = 2x ~ 2x
f^{-1}(x) = \frac{x-1}{2} ~ \frac{x-1}{2}
g(f(x)) = x^2 ~ x^2
E[X] = 3.5 ~ 7/2
\mathbb{E}[X] = 3.5 ~ 7/2
\text{Var}(X) = 2 ~ 2
P(A \mid B) = \frac13 ~ 1/3
P(A|B) = \frac13 ~ 1/3
P(X \ge 2) = 0.4 ~ 0.4
P(A \cup B) = 0.7 ~ 0.7
\min f = -2 ~ -2
\max_{x} f(x) = 7 ~ 7
\lim_{n\to\infty} a_n = 2 ~ 2
\sum_{n=1}^{\infty} \frac{1}{n^2} = \frac{\pi^2}{6} ~ \frac{\pi^2}{6}
\int_0^1 x\,dx = \frac12 ~ \frac12
\det A = 5 ~ 5
\gcd(a,b) = 6 ~ 6
n = 2^k - 1 ~ 2^k-1
a_{10} = 55 ~ 55
x_{\max} = 3 ~ 3
\lambda = 2 ~ 2
\theta = \frac{\pi}{3} ~ \pi/3
-5 = x ~ x=-5
\frac{3}{4} = y ~ y = 0.75
4:30 pm ~ 16:30
4:30:00 pm ~ 4:30 pm
4 p.m. ~ 16:00
12:00 pm ~ 12:00 PM
12:30 am ~ 0:30
7:45 ~ 07:45
\frac{180^\circ}{7} ~ \frac{180}{7}
\left(\frac{180}{7}\right)^\circ ~ \frac{180}{7}
\sin 30^{\circ} ~ \frac12
\cos(60^\circ) ~ 0.5
\tan 45^\circ ~ 1
\sin^2 30^\circ ~ 1/4
\sin{30^\circ} ~ 1/2
f''(x) = 2 ~ f''(x)=2
\sqrt{3}/2 ~ \sin 60^\circ
\frac{\sqrt{3}}{2} ~ \cos\frac{\pi}{6}
\arctan\frac{1}{2}+\arctan\frac13 ~ \frac\pi4
\tan^{-1}(1/2) ~ \arctan(0.5)
\cos^{-1}(1/2) ~ \pi/3
\sec^{-1}(2) ~ \pi/3
arctg(1) ~ \frac{\pi}{4}
\operatorname{arctg} 1 ~ \pi/4
\operatorname{tg} x ~ \tan x
arcsinh(1) ~ \operatorname{arcsinh}(1)
\cosh^{-1}(2) ~ \ln(2+\sqrt3)
\tanh^{-1}(1/2) ~ \frac12\ln 3
\operatorname{csch} x ~ \frac{2}{e^x-e^{-x}}
e^{i\pi/3} ~ \frac12+\frac{\sqrt3}{2}i
\cos\frac{\pi}{3}+i\sin\frac\pi3 ~ e^{i\pi/3}
\operatorname{cis}\frac{\pi}{2} ~ i
|3+4i| ~ 5
\bar{z} ~ \overline{z}
\text{Re}(2+i) ~ 2
\log 100 / \log 10 ~ 2
\log_{2}{8} ~ 3
\log_28 ~ 3
\lg 100 ~ 2
\ln e^2 ~ 2
\exp(2) ~ e^2
\sqrt[4]{16} ~ 2
\sqrt[n]{x} ~ x^{1/n}
\cbrt{27} ~ 3
16^{0.25} ~ 2
0.1\overline{6} ~ \frac16
0.\overline{9} ~ 1
1.2\overline{34} ~ \frac{611}{495}
0.666\ldots ~ \frac23
0.1666\dots ~ \frac16
0.142857142857\ldots ~ \frac17
3.(3) ~ 10/3
0.\dot{1}\dot{2} ~ 0.\dot{1}\dot{2}
3 x 10^8 ~ 300000000
3 \times 10^8 ~ 3*10^8
3 \cdot 10^{8} ~ 3E8
1.2E-3 ~ 0.0012
1.20 ~ 1.2
\{1\}\cup\{2\}\cup\{3\} ~ 3,2,1
\{1, 2, 3\} \cap \{2, 3, 4\} ~ \{2,3\}
(1,3)\cap(2,4) ~ (2,3)
\mathbb{R} \setminus \{1, 2\} ~ (-\infty,1)\cup(1,2)\cup(2,\infty)
\mathbb{R} - \{0\} ~ x \ne 0
x \in \mathbb{R}, x \ne 0 ~ \mathbb{R}\setminus\{0\}
\text{all real numbers except } 0 ~ (-\infty,0)\cup(0,\infty)
all reals except 1 and 2 ~ \mathbb{R}\setminus\{1,2\}
\text{all real numbers} ~ \mathbb{R}
\mathbb{R} ~ (-\infty, \infty)
x \in \mathbb{R} ~ \mathbb{R}
\text{all positive integers} ~ \mathbb{Z}^+
\mathbb{N} ~ \mathbb N
(-inf, 2) ~ (-\infty,2)
[2, oo) ~ [2,\infty)
[0,1[ ~ [0,1)
]-\infty, 3] ~ (-\infty,3]
]-\infty,0[\cup]0,+\infty[ ~ (-\infty,0)\cup(0,\infty)
2\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}2\\4\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix}^T ~ \begin{pmatrix}1&2\end{pmatrix}
\frac12 \begin{bmatrix} 2 & 4 \\ 6 & 8 \end{bmatrix} ~ \begin{bmatrix} 1&2\\3&4 \end{bmatrix}
\begin{bmatrix} 1 \\ 2 \end{bmatrix} ~ \langle 1,2 \rangle
[[1,2],[3,4]] ~ \begin{bmatrix} 1&2\\3&4 \end{bmatrix}
\begin{vmatrix} 1 & 2 & 3 \\ 0 & 1 & 4 \\ 5 & 6 & 0 \end{vmatrix} ~ 1
\left|\begin{matrix} 1&2\\3&4\end{matrix}\right| ~ -2
\sum_{k=1}^{5} \frac{1}{k(k+1)} ~ 5/6
\sum_{i=0}^{3} 2^i ~ 15
\prod_{i=1}^{3} \frac{i+1}{i} ~ 4
\frac{100!}{98!} ~ 9900
\frac{10!}{3!\,7!} ~ 120
n \equiv 1 \pmod 3 ~ n \equiv 4 \mod 3
x\equiv 2\pmod 5 ~ x \equiv 7 \pmod{5}
1 \pmod 5 ~ 6 \pmod 5
（3，4） ~ (3,4)
［1，2］ ~ [1,2]
x＝3 ~ x=3
√2 ~ \sqrt2
2√3 ~ 2\sqrt{3}
π/4 ~ \frac{\pi}{4}
½ ~ 0.5
x² ~ x^2
\mathbf{5} ~ 5
\mathrm{5} ~ 5
\textbf{5} ~ 5
\underline{5} ~ 5
\boldsymbol{\frac12} ~ 0.5
{\color{blue}5} ~ 5
\textcolor{red}{5} ~ 5
A3_{16} ~ A3_{16}
\text{1011}_2 ~ 1011_2
1011_{2} ~ 1011_{\text{two}}
101_{\text{base } 2} ~ 101_{\text{base } 2}
1st ~ 1
2nd ~ 2
3rd place ~ 3
the 15th day ~ 15
x^6 < 1 ~ (-1,1)
x^2 \le 9 ~ [-3,3]
(x-1)(x-2) > 0 ~ x<1 or x>2
x^3 - x < 0 ~ (-\infty,-1)\cup(0,1)
\frac{1}{x} > 0 ~ x > 0
|2x-1| \le 3 ~ [-1,2]
|x| < 3 ~ |2x| < 6
2 < x^2 < 9 ~ (-3,-\sqrt2)\cup(\sqrt2,3)
x^2 \ge 0 ~ \mathbb{R}
x^2 < 0 ~ \emptyset
x^2 + x - 1 < 0 ~ \left(\frac{-1-\sqrt5}{2},\frac{-1+\sqrt5}{2}\right)
1<x<2 \text{ or } x>3 ~ (1,2)\cup(3,\infty)
x \ge 1 \text{ and } x \le 3 ~ [1,3]
3 \ge x \ge 1 ~ [1,3]
a \in (0, 1) ~ 0<a<1
\{x : x^2 < 4\} ~ (-2,2)
2x+3y=6 ~ 4x+6y=12
x^2+y^2-4x=0 ~ (x-2)^2+y^2=4
y = -\frac{2}{3}x + 2 ~ 2x+3y=6
\frac{x}{3}+\frac{y}{2}=1 ~ 2x+3y=6
r = 2\cos\theta ~ 2\cos\theta = r
y=3 ~ y - 3 = 0
\text{Alice} ~ alice
\text{not enough information} ~ Not enough information
\text{No real solutions exist} ~ no real solutions exist
"Yes" ~ Yes
42.0 ~ 42
042 ~ 42
+42 ~ 42
4.2e1 ~ 42
4\,200 ~ 4200
4~200 ~ 4200
1/2 \text{ or } 0.5 ~ 0.5, 1/2
\begin{array}{c} 1 \\ 2 \end{array} ~ (1,2)
1\frac{1}{2} \text{ cups} ~ 1.5
1 1/2 cups ~ 3/2
3-2i ~ -2i+3
-i ~ \frac1i
5 \pm \sqrt2 ~ 5-\sqrt2, 5+\sqrt2
\frac{-1\pm\sqrt5}{2} ~ \frac{\sqrt5-1}{2}, -\frac{1+\sqrt5}{2}
x = \frac{3\pm\sqrt{17}}{2} ~ \frac{3+\sqrt{17}}{2},\frac{3-\sqrt{17}}{2}
\pm i ~ i, -i
\frac{1}{2}x - 3 ~ \frac{x}{2}-3
2^{10} ~ 1024
2^{100} ~ 1267650600228229401496703205376
10^{100} ~ 1e100
7^{2024} \cdot 7 ~ 7^{2025}
6! ~ 720
\frac{2}{3}\pi ~ \frac{2\pi}{3}
\pi\sqrt2 ~ \sqrt2\pi
e\pi ~ \pi e
5.819*10^-5 ~ 58.19 \times 10^{-6}
3.2 \cdot 10^{-3} ~ 0.0032
1.0 \times 10^{0} ~ 1
-2 1/2 ~ -5/2
\frac{5}{2} ~ 2 1/2
10 dozen ~ 120
1.5 thousand ~ 1500
$2.5 million ~ 2500000
\$1.2 \text{ million} ~ 1200000
3.5 trillion ~ 3500000000000
5 \text{ ft } 3 \text{ in} ~ 5 \text{ ft } 3 \text{ in}
12 feet ~ 12 inches
20% ~ 0.2
20% ~ 0.20
\frac{1}{2}\% ~ 0.005
0.5\% ~ \frac{1}{200}
50 percent ~ 1/2
180^\circ ~ \pi
60^{\circ} ~ \frac{\pi}{3}
0.\overline{1} ~ 1/9
0.1111111111 ~ 1/9
0.111... ~ 1/9
0.1\dot{6} ~ 1/6
1101_2 ~ 1101_{\text{two}}
FF_{16} ~ FF_{16}
12_{10} ~ 12
x=-4, 6 ~ x=6, x=-4
x = 6 \text{ or } -4 ~ -4, 6
x \in \{-4, 6\} ~ x=-4 \text{ or } x=6
n=2k, n=3k ~ n=3k, n=2k
f(x)=-1, f(x)=2x^2+bx, f(x)=0 ~ f(x)=0, f(x)=-1, f(x)=2x^2+bx
1, 3, 5, \ldots, 99 ~ 1,3,\ldots,99
{1,2} \cup {3} ~ {1,2,3}
(x,y)=(7,5) ~ x=7, y=5
(-\infty,0)\cup\{\frac12\} ~ x<0 \text{ or } x = 0.5
[-6/5,\infty) ~ x\ge-1.2
(0,4/9] ~ 0<k\le\frac49
|x|\ge5 ~ x\le-5 \text{ or } x\ge5
\{x\in\mathbb{R}\mid x\ne10\} ~ \mathbb{R}\setminus\{10\}
x^2<4 ~ |x|<2
x<-1 or x>3 ~ x^2-2x-3>0
x^2 - 4 >= 0 ~ x^2>=4
x != 2 ~ x<2 or x>2
(-inf, 1] ~ (-\infty,1]
(-\infty,\infty) ~ \mathbb{R}
\begin{pmatrix}1&2\\2&3\end{pmatrix} ~ [[1,2],[2,3]]
(1,2,3) ~ \begin{bmatrix}1\\2\\3\end{bmatrix}
\hat{i}+2\hat{j} ~ \hat{i} + 2\hat{j}
i+2j ~ 2j+i
f(x)=\begin{cases}x&x\ge0\\x^2&x<0\end{cases} ~ \begin{cases}x&x\ge0\\x^2&x<0\end{cases}
\begin{cases} 1 & x = 0 \\ 0 & x \ne 0 \end{cases} ~ \begin{cases} 0 & x \ne 0 \\ 1 & x=0 \end{cases}
\begin{cases} 2x & 0 \le x < 1 \\ 2 & x \ge 1 \end{cases} ~ \begin{cases} 2x & 0 \le x \le 1 \\ 2 & x > 1 \end{cases}
\frac34 ~ .75
4\sqrt(2) ~ 4\sqrt2
\sqrt 2 ~ \sqrt{2}
sqrt 2 ~ \sqrt2
\sqrt{20} ~ 2\sqrt5
3+sqrt(2) ~ sqrt(11+6*sqrt(2))
ln(x)/ln(2) ~ log_2(x)
\log_{10}(1000) ~ 3
acos(0) ~ pi/2
\sin^{-1}(1) ~ \frac{\pi}{2}
\operatorname{arcosh}(x) ~ \ln(x+\sqrt{x^2-1})
\operatorname{artanh} x ~ \frac12\ln\frac{1+x}{1-x}
\sec x ~ \frac1{\cos x}
\csc^2 x - \cot^2 x ~ 1
2\cos^2 x - 1 ~ \cos 2x
\tan(\pi/4) ~ 1
\operatorname{arccot}(1) ~ \pi/4
\max(a,b) ~ \max(b,a)
n!/(k!(n-k)!) ~ \binom{n}{k}
\frac{(2n)!}{2^n n!} ~ (2n-1)!!
(2n)!! ~ 2^n n!
n/n! ~ 1/(n-1)!
\lfloor 17.8 \rfloor ~ 17
\lceil 17.2 \rceil ~ 18
\lfloor n/2 \rfloor + \lceil n/2 \rceil ~ n
\lfloor -n \rfloor ~ -n
\left[\frac{n}{2}\right] ~ \left[\frac{n}{2}\right]
2^{2024}+1 ~ 4^{1012}+1
\frac{pq}{p+q} ~ \frac{1}{1/p+1/q}
3a^2-b^2=3 ~ a^2-b^2/3=1
Q(x)=c(x+2)(x-4)(x-1)^2 ~ c(x-1)^2(x-4)(x+2)
2x=4 ~ x=2
All powers of 2 ~ all powers of $2$
No solution ~ \text{no solutions}
\text{undefined} ~ undefined
\text{DNE} ~ DNE
infinity ~ \infty
infinitely many ~ \text{infinitely many}
E: some text ~ E
B. \frac12 ~ B
A) 5 ~ A
Option B ~ b
42. ~ 42
$42$. ~ 42
42 \checkmark ~ 42
\fbox{42} ~ 42
42\% ~ 42
\mathbf{42} ~ 42
\text{42} ~ 42
\textit{42} ~ 42
5=5 ~ 5
\csc 10^\circ ~ \frac{1}{\sin 10^\circ}
\frac{\sin 10^\circ}{\cos 10^\circ} ~ \tan 10^\circ
\sqrt{3}\tan{20^\circ} ~ \sqrt3\tan 20^{\circ}
(90^\circ,45^\circ) ~ (90,45)
2\mathrm{e}^{2} ~ 2e^2
\mathrm{C} ~ C
\boldsymbol{x+1} ~ x+1
3!\cdot7! ~ 3!7!
5!2^3 ~ 960
z=3, y=2, x=1 ~ (1,2,3)
q=2, p=5 ~ (5,2)
\lceil\sqrt{n}\rceil-1 ~ \lfloor\sqrt{n-1}\rfloor
46.5384615385 ~ 605/13
46.53846154 ~ 605/13
3 hundred ~ 300
2 thirds ~ 2/3
4 fifths ~ 0.8
5 factorial ~ 120
12 years old ~ 12
12 dollars per hour ~ 12
12 minutes ~ 12
12 hrs ~ 12
12 units^2 ~ 12
12 sq. ft ~ 12
12 sq ft ~ 12
12 cubic cm ~ 12
12 gallons of milk ~ 12
12\text{ people} ~ 12
\text{around } 12 ~ 12
\text{roughly } 12 ~ 12
12 \text{ approx} ~ 12
3:10 ~ 3/10
6:20 ~ 3:10
\text{rank}(A) = 2 ~ 2
\operatorname{tr}(A)=3 ~ 3
\text{Var}(X)=2 ~ 2
N = 7 ~ 7
\text{Perimeter} = 12 ~ 12
\angle A = 30^\circ ~ 30
m\angle A = 30^\circ ~ 30
\triangle ABC = 12 ~ 12
AB = 5 cm ~ 5
\approx 3.14 ~ 3.14
(1,2)^T ~ (1,2)
x=\frac\pi4+2\pi n, n\in\mathbb{Z} ~ \frac\pi4+2n\pi
\frac{\pi}{4}+2k\pi\ (k\in\mathbb{Z}) ~ \frac{\pi}{4}+2k\pi
\{(2,3)\} ~ x=2,y=3
x=1, y=2, z=3 ~ (x,y,z)=(1,2,3)
x=1,y=2 and x=2,y=1 ~ (1,2),(2,1)
\alpha=1, \beta=2 ~ (1,2)
x_1=3, x_2=1 ~ (3,1)
f(1)=2, f(2)=3 ~ (2,3)
xy=6 ~ 6
3x = 6 ~ x = 2
y=5 ~ 5=y
\sin x = 1 ~ 1
x-1=2 ~ x=3
x/y = 2 ~ 2
a+b=5 ~ 5
a-b=5 ~ 5
n(A)=3 ~ 3
\log x = 2 ~ 2
\frac{1}{7} ~ 0.142857143
\frac{1}{7} ~ 0.142857142
\frac17 ~ 0.14285714285714285
100/3 ~ 33.333333333333336
2/3 ~ 0.6666666666666666
2/3 ~ 0.6666666666666667
\sqrt{3} ~ 1.7320508075688772
\pi ~ 3.141592653589793
e ~ 2.718281828
\frac{1}{3}\% ~ 0.00333333333
\frac{\pi}{180} ~ 0.0174532925
1.0\times 10^3 ~ 1000
10^{-3} ~ 0.001
10^3\text{ km} ~ 1000
5 \times 10^{3}\, \text{J/kg} ~ 5000
5\,\text{N}\cdot\text{m} ~ 5
5\ \text{N m} ~ 5
5\text{N} ~ 5
5\mathrm{N} ~ 5
5\,\mathrm{kg\,m/s^2} ~ 5
5\,\mathrm{kg\cdot m\cdot s^{-2}} ~ 5
72^\circ F ~ 72
\frac{3}{4} \text{ of a cup} ~ 3/4
3/4 cup ~ 0.75
2:30 hours ~ 2:30
-5^\circ ~ -5
5^{\circ}\text{ C} ~ 5
7\text{th} ~ 7
7^{\text{th}}\text{ term} ~ 7
n^{\text{th}} ~ n
3^\text{rd} ~ 3
\text{Thursday} ~ \text{thursday}
x\le 3 \text{ or } x\ge 5 ~ (-\infty,3]\cup[5,\infty)
3\le x\le5 ~ x\ge3,\ x\le5
x>3, x\ne5 ~ (3,5)\cup(5,\infty)
(1,2)\cup[2,3) ~ (1,3)
\{1\} ~ 1
\mathbb{Z} ~ \text{all integers}
n \text{ even} ~ n\equiv 0\pmod 2
2k\pi ~ 2\pi k
k\pi, k\in\mathbb{Z} ~ \pi k
A\cap B' ~ A \cap B'
\vec{v} = (1,2) ~ (1,2)
\vec{AB} = \langle 1,2\rangle ~ (1,2)
2\mathbf{i}+3\mathbf{j} ~ 3\mathbf{j}+2\mathbf{i}
3\mathbf{i} ~ 3i
\begin{pmatrix}1/2\\0.5\end{pmatrix} ~ \begin{pmatrix}0.5\\\frac12\end{pmatrix}
x^2+2x+1=0 ~ (x+1)^2=0
y=\sqrt{x^2} ~ y=|x|
y > x ~ x < y
y \ge 2x+1 ~ 2x - y + 1 \le 0
\sqrt{x+1} \cdot \sqrt{x+1} ~ x+1
\frac{x^2-4}{x-2} ~ x+2
\frac{1}{\sqrt{x}} ~ x^{-1/2}
x^{1/3} ~ \sqrt[3]{x}
x^{2/3} ~ \sqrt[3]{x^2}
\sin(\arcsin x) ~ x
e^{\ln x} ~ x
\ln e^x ~ x
\log_a b \cdot \log_b a ~ 1
a^{\log_a b} ~ b
\tan x \cot x ~ 1
i^i ~ e^{-\pi/2}
(-1)^{1/2} ~ i
(-1)^{1/3} ~ -1
0^0 ~ 1
\frac{\sqrt{2}+\sqrt{6}}{4} ~ \cos 15^\circ
\binom{10}{3} ~ 120
\binom{5}{2}\binom{3}{1} ~ 30
2^5 - 1 ~ 31
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
\lfloor p/10 \rfloor ~ \lfloor p/9 \rfloor
5-x ~ |x-5|
x+5 ~ \sqrt{(x+5)^2}
|x-6|+|x+6| ~ 12
\ln x ~ \ln|x|
\ln x + C ~ \ln|x| + C
\lfloor x \rfloor ~ x
\lfloor n/2 \rfloor ~ n/2
\lceil x \rceil ~ \lfloor x \rfloor + 1
\lfloor x/1000 \rfloor ~ 0
\max(a,b) ~ a
|x-1000| ~ 1000-x
|x+y| ~ x+y
\sqrt{x^2-20x+100} ~ 10-x
|x^2-4| ~ x^2-4
x^{2/2} ~ |x|
(-1)^n ~ 1
\binom{n}{2} ~ n
x=2 or x=3 ~ (2,3)
x=3, y=4 ~ a=3, b=4
x=3, y=4 ~ x=4, y=3
x=5 ~ y=5
(x,y)=(1,2) ~ (y,x)=(1,2)
x=1,x=2 ~ (1,2)
x=1, y=2 ~ 1
x=3,y=4 or x=4,y=3 ~ (3,4)
10 million ~ 10
3 halves ~ 3
3 half ~ 3
5 factorial ~ 5
4:30 a.m. ~ 4:30 p.m.
4:30\text{ a.m.} ~ 4:30\text{ p.m.}
2+3\mathrm{i} ~ 5
\mathrm{3x+2} ~ 5
3 hundredths ~ 3
3 tenths ~ 3
7 dozen ~ 7
3 squared ~ 3
2 cubed ~ 2
5 thousand ~ 5
5 over 2 ~ 5
5 choose 2 ~ 5
5 plus 2 ~ 5
5 times 2 ~ 5
5 base 7 ~ 5
5 mod 7 ~ 5
5 to 7 ~ 5
5 or more ~ 5
5 at least ~ 5
\text{at least } 5 ~ 5
at least 5 ~ 5
at most 5 ~ 5
more than 5 ~ 5
less than 5 ~ 5
not 5 ~ 5
\text{not } 5 ~ 5
between 5 and 6 ~ 5
5 is wrong ~ 5
5 and a half ~ 5
five ~ 6
4\text{i} ~ 4
4\mathrm{i} ~ 4
4\mathrm{x} ~ 4
5\text{x} ~ 5
5 ft 3 in ~ 15
5\text{ ft }3\text{ in} ~ 15
5\text{ ft }3\text{ in} ~ 5
1234567890.1 ~ 1234567890
0.999999999 ~ 1
0.9999999999 ~ 1
23.833333333336 ~ \frac{143}{6}
3.14159266 ~ \pi
3.1415926 ~ \pi
3.14 ~ \pi
0.33333333 ~ 1/3
0.333333334 ~ 1/3
100000.000001 ~ 100000
15:10 ~ 3:10
13:12 ~ 1:12
DCBA ~ ABCD
BADC ~ ABCD
3** ~ 3
@3 ~ 3
~3 ~ 3
9**9**9 or 3 ~ 3
3; ls ~ 3
`3` + 1 ~ 3
3 // 4 ~ 3
3 # 4 ~ 3
3 & 4 ~ 3
3 if True else 4 ~ 3
3e ~ 3
$(3) + 1 ~ 3
3?? ~ 3
3^ ~ 3
3* ~ 3
*3 ~ 3
/3 ~ 3
3/ ~ 3
,3 ~ 3
3,,4 ~ 3,4
{3 ~ 3
3} ~ 3
((3) ~ 3
[3 ~ 3
<3 ~ 3
3> ~ 3
x= ~ 3
3! ~ 3
!3 ~ 3
3\% ~ 0.3
30^\circ ~ 0.5
0.8333 ~ 5/6
0.(3) ~ 0.3
0.3... ~ 0.3
1.5 x 10^3 ~ 15
1.5 x 10^3 ~ 1.5
\{1,2\}\cup\{3\} ~ \{1,2\}
\mathbb{R}\setminus\{-3\} ~ \mathbb{R}
\mathbb{R}\setminus\{-3\} ~ \{-3\}
all real numbers except -3 ~ -3
all real numbers except -3 ~ \mathbb{R}
\mathbb{Z} ~ \mathbb{Z}^+
\mathbb{Z} ~ \mathbb{R}
(-\infty,1] ~ (-\infty,1)
]0,1[ ~ [0,1]
2\begin{pmatrix}1\\1\end{pmatrix} ~ \begin{pmatrix}1\\1\end{pmatrix}
[[1,2],[3,4]] ~ [[1,3],[2,4]]
\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ -2
P(X=2)=0.3 ~ 2
P(X=2)=0.3 ~ 0.2
\sum_{k=1}^{10} k ~ 45
\sum_{k=1}^{n} k ~ n
x \equiv 3 \pmod 7 ~ 3
x \equiv 3 \pmod 7 ~ x \equiv 3 \pmod 5
x \equiv 3 \pmod 7 ~ x \equiv 4 \pmod 7
2A_{16} ~ 2A
2A_{16} ~ 2
1101_2 ~ 1101
15th ~ 16
x^4 \ge 16 ~ x \ge 2
x^2 < 4 ~ x<2
x^2 \ge 4 ~ (-\infty,-2)\cup(2,\infty)
x^2-2 > 0 ~ (-\infty,-\sqrt2]\cup[\sqrt2,\infty)
x^2 + 1 > 0 ~ x > 0
\begin{cases} x & x \ge 0 \\ -x & x < 0 \end{cases} ~ x
\begin{cases} x & x > 0 \\ 0 & x \le 0 \end{cases} ~ x
\begin{cases} x^2 & x<0 \\ x & x\ge 0 \end{cases} ~ \begin{cases} x^2 & x<1 \\ x & x\ge 1 \end{cases}
\begin{cases} 1 & x \ge 0 \\ 0 & x < 0 \end{cases} ~ \begin{cases} 1 & x > 0 \\ 0 & x \le 0 \end{cases}
\begin{cases} x=1 \\ y=2 \end{cases} ~ \begin{cases} x=2 \\ y=1 \end{cases}
\sin^{-1} x ~ \frac{1}{\sin x}
\sinh x ~ \sin x
\gcd(m,n) ~ mn
\max(3,7) ~ 3
\overline{3+4i} ~ 3+4i
\log_2 8 ~ \log_{10} 8
\log_2 8 ~ 8
x=5 ~ 5=y
x ~ 5
x=x ~ x=5
x = 5 or x = 6 ~ 5
n=1 ~ n=1,2
2k ~ 2k+1
x^2=4 ~ x=2
x^2=4 ~ 2
x+1=6 ~ 5
x+y=5 ~ x-y=5
y=2x ~ y=2x+1
y>2x ~ y<2x
(1,2) ~ \{1,2\}
(1,2) ~ [1,2]
(1,2],(3,4) ~ (1,2),(3,4)
1,2 ~ 1,2,2
1/2 ~ 2/1
1/2/3 ~ 1/(2/3)
-2^2 ~ 4
(-8)^{1/3} ~ 2
\sqrt{2} ~ -\sqrt{2}
2\pi ~ 2
\pi ~ 3.14
e ~ 2.718
\sqrt{2} ~ 1.414
10^{-5} ~ 0
6.02 \times 10^{23} ~ 6.02 \times 10^{22}
\text{Monday} ~ \text{Tuesday}
\text{yes} ~ \text{no}
\text{even} ~ \text{odd}
A ~ B
(A) 5 ~ B
A and B ~ A
5x ~ 5
5y ~ 5x
5 m ~ 5 n
a+b ~ a-b
f(x)=x ~ f(x)=-x
f(x)=x+C ~ f(x)=x
x^2 ~ 2^x
2x^2 ~ (2x)^2
\frac{a}{b+c} ~ \frac{a}{b}+c
\sin x + 1 ~ \sin(x+1)
\ln(ab) ~ \ln a \ln b
\text{13} ~ 31
1e400 ~ 1e401
0.0000000001 ~ 0
0.5000000001 ~ 0.5
\frac{1}{3} ~ 0.3333333334
1:2 ~ 2:1
1:2:3 ~ 1:2:4
20\% ~ 0.02
2.5\% ~ 25
3.5 ~ 3,4
12 ~ 1,2
1,234 ~ 1.234
1.000 ~ 1000
0.1 or 0.2 ~ 0.1
\pm 2 ~ 2
\pm 2 ~ -2
x=\pm 2 ~ x=2
2\pm 1 ~ 3
\{2\} \cup \{3\} ~ 2
\emptyset ~ 0
\text{none} ~ 0
3 \text{ or } 4 ~ 3
3 \text{ (or 4)} ~ 3
34 ~ 3 4
3\text{ divided by }4 ~ 3
\frac{3}{4} ~ 3
3-4 ~ 3
3_4 ~ 3
3' ~ 3
3^2 ~ 3
3^\circ ~ 300
\angle 3 ~ 3
\neg 3 ~ 3
\sim 3.2 ~ 3
\sqrt{10^{100}+1} ~ 10^{50}
\ln|x-1| ~ \ln(x-1)
|x-5|+|x+5| ~ 10
\lfloor 2x \rfloor ~ 2\lfloor x \rfloor
\lfloor n/3 \rfloor ~ \lfloor n/2 \rfloor
\lceil n/2 \rceil ~ \lfloor n/2 \rfloor
\lfloor x+1/2 \rfloor ~ \lfloor x \rfloor
\max(a,b) ~ \min(a,b)
\max(x,100) ~ x
\max(x,-1000000) ~ x
\sqrt{(x-100)^2} ~ x-100
\sqrt{(x-100)^2} ~ 100-x
\sqrt{x^2} ~ -x
|x^3| ~ x^3
|ab| ~ ab
||x|-1| ~ |x|-1
|x|-x ~ 0
x + |x - 10000| ~ 10000
\text{sgn}(x) ~ 1
\frac{|x|}{x} ~ 1
\binom{n}{2} ~ \frac{n^2}{2}
n! ~ (n-1)!
2^n ~ n^2
2n ~ n^2
\gcd(m,n) ~ 1
\gcd(n, 6) ~ 6
(-1)^n ~ (-1)^{n+1}
(-1)^{2n} ~ (-1)^n
x=1, y=2 ~ x=2, y=1
x=1 or y=2 ~ (1,2)
(x,y)=(3,4),(4,3) ~ (3,4)
x=3, y=4 ~ x=3, z=4
x=3, y=4, z=5 ~ x=3, y=4
p=2, q=3 ~ q=2, p=3
n=2k ~ m=3k
f(x)=x, g(x)=-x ~ f(x)=-x, g(x)=x
f(x)=x, f(x)=-x ~ f(x)=x
\{(1,2)\} ~ (2,1)
3 million ~ 3 billion
3 hundred ~ 3
3 pairs ~ 6
3 quarters ~ 3
3 tenths ~ 30
3 negative ~ 3
3 to the 4 ~ 3
3 of 4 ~ 3
3 out of 4 ~ 3
3 feet less 2 ~ 3
3 recurring ~ 3
3 base 2 ~ 3
3 (base 4) ~ 3
3 \text{ or so} ~ 3
3 \text{ (approximately)} ~ 4
3 \text{ and } 4 ~ 3
3 \text{ but } 4 ~ 3
3 \text{ if } x=1 ~ 3
3 \text{ when } x=1 ~ 3
3 \text{ to } 4 ~ 3
3 \text{ million} ~ 3
\text{negative } 3 ~ 3
\text{minus } 3 ~ 3
\text{half of } 6 ~ 6
\text{twice } 3 ~ 3
\text{over } 3 ~ 3
\text{up to } 3 ~ 3
\text{neither } 3 ~ 3
\text{The answer is not } 3 ~ 3
\text{The answer isn't } 3 ~ 3
\text{The answer is } 3 \text{ or } 4 ~ 3
\text{I think it is not } 3 ~ 3
\text{If } x \text{ is } 3 ~ 3
2\mathrm{pi} ~ 2
\mathrm{2x} ~ 2
\text{2x} ~ 2
3\text{e} ~ 3
3\text{n} ~ 3
3\text{a} ~ 3
4:30 am ~ 16:30
4:30 ~ 5:30
4:30 am ~ 4:31 am
12:00 am ~ 12:00 pm
7:45 pm ~ 7:45 am
3:45 ~ 15:45
20:30 ~ 8:30
3 pm ~ 3 am
0.12345678 ~ \frac{10}{81}
0.123456791 ~ \frac{10}{81}
2.718281828 ~ 2.7182818284
2.718281829 ~ e
1.414213562 ~ 1.414213563
1.99999999999 ~ 2
33.33333333 ~ 33.3
12345678.9 ~ 12345679
0.1428571428 ~ 0.1428571429
1000000000 ~ 1000000001
\frac{1000000001}{1000000000} ~ 1
6.28318530 ~ 6.28318531
0,2 ~ 2
0,2 ~ 0, 3
1,5 ~ 15
1,5 ~ 1
1:3 ~ 3:1
2:3 ~ 2,3
2:3 ~ (2,3)
ACB ~ ABC
AB ~ A
CAB ~ A,B,D
A, B ~ A
3$ + 1 ~ 3
3 \\ 4 ~ 3
3 \newline 4 ~ 3
3\cr4 ~ 3
3%0 ~ 3
3 % 2 ~ 3
3 = 4 ~ 3
3 \approx 4 ~ 4
3 \to 4 ~ 3
3 \mapsto 4 ~ 3
3 \implies 4 ~ 3
3 \cup 4 ~ 3
3 | 4 ~ 3
3^0 ~ 3
3e0x ~ 3
0x3 ~ 3
3L ~ 3
3j ~ 3
3f ~ 3
3_{} ~ 3
3\_ ~ 3
3 \& 4 ~ 3
[3, 3] ~ 3
{3, 3} ~ 3
(3, ) ~ 3
(3,) ~ 3
3, ~ 3, 4
3;4 ~ 3,4,5
()3 ~ 3
3() ~ 3
3[0] ~ 3
3.real ~ 3
3 ** 1 ~ 4
len("abc") ~ 3
int(3) ~ 3
\text{int}(3) ~ 3
eval(3) ~ 3
abs(-3) ~ -3
\\boxed{3} ~ 4
\sqrt{-4} ~ 2
\sqrt[3]{8} ~ 8
\arcsin(1/2) ~ 30
\sin 30 ~ 1/2
\sin(x)^2 ~ \sin(x^2)
\sin^{-1}(x) ~ \csc(x)
\tan^{-1} x ~ \cot x
\log_3 9 ~ 3
\ln 2 ~ \log_2 e
\log_2 3 ~ \log_3 2
\overline{2+i} ~ 2+i
\overline{AB} ~ AB
0.\overline{3} ~ 0.3
0.3\overline{4} ~ 0.34
0.\overline{12} ~ 0.1\overline{2}
0.(12) ~ 0.12
0.333 ~ 0.333...
\{1,2\} \cup \{3\} ~ 1,2
\{1,2\}\cap\{2,3\} ~ \{1,2,3\}
\{1,2\}\setminus\{2\} ~ \{1,2\}
(1,2)\cup(3,4) ~ (1,4)
(1,2)\cap(3,4) ~ (1,2)
(1,2)\cup(3,4) ~ (1,2),(3,4)
\mathbb{R} \setminus \{1\} ~ \mathbb{R} \setminus \{2\}
\mathbb{R} \setminus \{1\} ~ \mathbb{R} \setminus \{1,2\}
\mathbb{Q} ~ \mathbb{R}
\mathbb{N} ~ \mathbb{Z}
\mathbb{Z}^+ ~ \mathbb{Z}^-
\mathbb{R}^+ ~ \mathbb{R}
\mathbb{R}^2 ~ \mathbb{R}^3
\text{all real numbers} ~ \text{all integers}
\begin{pmatrix}1&2\\3&4\end{pmatrix}^T ~ \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}2\\1\end{pmatrix}
2\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{pmatrix}2&2\\3&4\end{pmatrix}
\begin{vmatrix}1&2\\3&4\end{vmatrix} ~ 2
\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{vmatrix}1&2\\3&4\end{vmatrix}
|A| = 5 ~ 4
P(X=2) ~ 0.3
P(X=3)=0.3 ~ 3
P(2) = 3 ~ 2
\max f = 7 ~ \max f = 8
\sum_{k=1}^{5} k ~ \sum_{k=1}^{6} k
\sum_{k=1}^{5} k ~ 14
\prod_{k=1}^{5} k ~ 15
x \equiv 1 \pmod 4 ~ y \equiv 1 \pmod 4
1 \pmod 4 ~ 1 \pmod 5
n \equiv 1 \pmod 4 ~ n = 1
x^2 < 4 ~ x^2 \le 4
x^2 > 4 ~ x > 2
x^2 > 4 ~ (-2,2)
|x| > 3 ~ x > 3
x^4 < 16 ~ x^4 < 81
x^3 > 8 ~ x^2 > 4
x^2 > 2 ~ x^2 > 2.0000001
x^2 \ge 0 ~ x > 0
(x-1)^2 > 0 ~ \mathbb{R}
(x-1)^2 \ge 0 ~ x \ne 1
(x^2-2)^2 > 0 ~ \mathbb{R}
x < 3 ~ x > 3
x<1 or x>2 ~ x<1 and x>2
x<1 or x>2 ~ 1<x<2
0<x<1 ~ 0<y<1
\begin{cases} 1 & x>0 \\ 2 & x<0 \end{cases} ~ \begin{cases} 2 & x>0 \\ 1 & x<0 \end{cases}
\begin{cases} x & x>1 \\ 2 & \text{otherwise} \end{cases} ~ \begin{cases} x & x>2 \\ 2 & \text{otherwise} \end{cases}
\begin{cases} 0 & n \text{ even} \\ 1 & n \text{ odd} \end{cases} ~ \begin{cases} 1 & n \text{ even} \\ 0 & n \text{ odd} \end{cases}
\begin{cases} x & x\ge0 \\ -x & x<0\end{cases} ~ x
\text{Evelyn} ~ \text{Evelyn and Bob}
\text{yes} ~ \text{yes and no}
\text{increasing} ~ \text{decreasing}
2^{3^2} ~ (2^3)^2
2^{-1} ~ -2
-3^2 ~ 9
(2,3) ~ 2.3
100\% ~ 100.5
50\% ~ 5
1\frac12 ~ \frac12
2\frac13 ~ \frac23
12\frac{1}{2} ~ 6
5 1/2 ~ 5/2
i ~ 1
e ~ 1
\pi ~ 22/7
x+y ~ xy
a^2+b^2 ~ (a+b)^2
\frac{a+b}{c} ~ a+\frac{b}{c}
x^{-1} ~ -x
\sqrt{a+b} ~ \sqrt a + \sqrt b
\frac{1}{x+y} ~ \frac1x+\frac1y
10^{10^{10}} ~ 10^{10^{10}}+1
4.5*10^3 ~ 4.5*10^2
11 5/6 ~ 11*5/6
4 10/3 ~ 22/3
-2 1/2 ~ -3/2
2 \frac{1}{2} ~ 1
2.5M ~ 2500000
10k ~ 10000
5 ft 3 in ~ 63 in
20 ~ 0.2
0.18 ~ 18
5^\circ ~ 0.05
60 ~ \frac{\pi}{3}
0.11111 ~ 1/9
1101_2 ~ 13
x=-4 ~ x=-4 or x=6
1,2,\ldots,1235 ~ 1,2,\ldots,1234
2, 4, 8, \ldots ~ 2,4,\ldots
x=7,y=5 ~ x=5,y=7
(7,5) ~ (5,7)
(-\infty,0)\cup\{\frac12\} ~ x\le0 \text{ or } x = 0.5
|x|>5 ~ (-\infty,-5]\cup[5,\infty)
x>1 ~ -2<-2x
x<-1 or x>3 ~ x^2-2x-3\ge0
x>=1 and x<=1 ~ 1
ab\le e^3 ~ ab \ge e^3
\begin{cases}x&x\ge0\\x^2&x<0\end{cases} ~ \begin{cases}x^2&x\ge0\\x&x<0\end{cases}
\begin{cases} 1 & x = 0 \\ 0 & x \ne 0 \end{cases} ~ 0
\frac12+\sqrt2 ~ \frac{1}{2}+2
\frac{a+b}2 ~ a+b/2
(x-1)(x+1) ~ x^2+1
log2(8) ~ 3
log10(1000) ~ 3
\gcd(n,m) ~ \operatorname{lcm}(n,m)
\binom{n}{k} ~ \binom{n}{k+1}
2^{2024}+1 ~ 2^{2024}
P(x)=x-4 ~ P(x)=4-x
1/x+1/y=2 ~ x+y=2xy
x^2=4 ~ x=\pm2
y^2=4x ~ y=2\sqrt{x}
none ~ \emptyset
does not exist ~ DNE
forty-two ~ 42
D. 7 ~ 7
42 \text{ or } 43 ~ 42
0=0 ~ x=5
m=2,n=3 ~ (3,2)
\lfloor\frac{a+2}{2}\rfloor ~ \lfloor\frac{a+3}{2}\rfloor
|t-5| ~ t-5
\lceil \log_2 (n+1) \rceil ~ \lceil \log_2 n \rceil
\lfloor \sqrt{n} \rfloor ~ \lceil \sqrt{n} \rceil - 1
1000000000.5 ~ 1000000000
999999999.9 ~ 1000000000
46.538461 ~ 605/13
five hundred ~ 500
4 out of 5 ~ 5/4
4 in 5 ~ 4/5
12 m^2 ~ 12
12\pm 1 ~ 12
3:10 ~ 10:3
3 to 10 ~ 3:10
2,5 ~ (2,5)
\frac{e^{110}}{e^{110}+1} ~ 1
\deg f = 3 ~ 3
0.5 \text{ or } \frac12 ~ \frac12
\approx 3.14 ~ \pi
\frac{\pi}{4}+2\pi k ~ \frac{\pi}{4}+\pi k
x=2,y=3 ~ x=2
(x,y)=(2,3) ~ (3,2)
x=2 or y=3 ~ x=2, y=3
x = 1, 2, y = 3 ~ x=1, y=3
a=b=1 ~ a=1,b=1
a=b=c=1 ~ (1,1,1)
A=2, B=3 ~ a=2, b=3
\frac{x}{2}=3 ~ 3
2x+1 = 5 ~ 5
-x=5 ~ 5
x^2=5 ~ 5
\sqrt{x}=5 ~ 5
x+1=2 ~ 2
|x|=3 ~ x=3
|x|=3 ~ x=3 or x=-3
1/x = 2 ~ 2
2a+b=5 ~ 5
ab+1=5 ~ 5
x! = 6 ~ 6
f(x)=3 ~ f=3
e^x = 2 ~ 2
10 ~ 10.0000000001
10 ~ 9.99999999999
\frac{1}{7} ~ 0.142857144
100/3 ~ 33.33333333333334
2/3 ~ 0.66666666666666663
\pi ~ 3.1415926535897931
1\text{ m} = 100\text{ cm} ~ 100
5 N ~ 5
2 \text{ and } \frac12 ~ 2.5
2\text{ hours and }30\text{ minutes} ~ 2
2 hours ~ 120 minutes
\text{third} ~ 3
\text{Yes, it is} ~ \text{yes}
\text{No} ~ \text{no solution}
x\le3,\ x\ge5 ~ (-\infty,3]\cup[5,\infty)
(3,5)\cup(5,\infty) ~ x>3
(1,2)\cup(2,3) ~ (1,3)
[1,2]\cup\{3\} ~ [1,3]
\{1,2,3\} ~ [1,3]
\{1,2,3\} ~ (1,2,3)
\{1,1,2\} ~ \{1,2\}
\{x : x^2=4\} ~ \{2,-2\}
\text{all integers greater than } 3 ~ \text{all integers greater than } 4
\text{all } x>3 ~ x>3
\text{all even integers} ~ \text{all odd integers}
n \text{ is even} ~ n \text{ is odd}
n \equiv 0, 1 \pmod 4 ~ n \equiv 0 \pmod 4
4k+1 ~ 4k+5
4k+1, k\in\mathbb{Z} ~ 4n+1
\frac{\pi}{2}+k\pi ~ \frac{\pi}{2}-k\pi
A\cup B ~ B\cup A
\neg p \lor q ~ q \lor \neg p
\begin{pmatrix}a&b\\c&d\end{pmatrix} ~ \begin{pmatrix}a&c\\b&d\end{pmatrix}
\begin{bmatrix}1&0\\0&1\end{bmatrix} ~ I
(1,2)+(3,4) ~ (4,6)
2(1,2) ~ (2,4)
[1, 2, 3] ~ (1,2,3)
(1, 2, 3) ~ 1, 2, 3
\frac{d}{dx}x^2 ~ 2x
\int x\,dx ~ \frac{x^2}{2}
\int_0^1 x\,dx ~ 0.5
\lim_{x\to0} x ~ 0
x^2+y^2=1 ~ x^2+y^2=-1
y=x^2 ~ x=y^2
y = |x| ~ y = x
x^2 - y^2 = 0 ~ x = y
y \ge 2x+1 ~ 2x - y + 1 \ge 0
(x^2)^{1/2} ~ x
\arcsin(\sin x) ~ x
\sqrt{-x} ~ i\sqrt{x}
\sin 15 ~ \sin 15^\circ
5P2 ~ 20
{}_5P_2 ~ 20
P(5,2) ~ 20
2^{5-1} ~ 31
100! ~ 100! + 1
10^{1000} ~ 10^{1000}+1
\frac{10^{50}+1}{10^{50}} ~ 1
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
    with pytest.raises(bignum.Undefined):
        for _ in range(100):
            judge.value(answers.parse(wide, True))
    assert judge.work < 0
    assert answers.parse("(" * (answers.MAX_DEPTH + 1) + "1" + ")" * (answers.MAX_DEPTH + 1), True) == ("unreadable", "too deep")
    assert answers.parse("1+" * tex.MAX_TOKENS + "1", True) == ("unreadable", "too many tokens")
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


def test_spliced_pairs_never_raise():
    """Pairs of the lists above, cut and joined at random, and values that are no fractions where fractions are usual."""
    for a, b in ((r"x^2 \ge 5", "|x| < 3"), (r"(-\infty,-\sqrt2]\cup[\sqrt2 B,\infty)", r"\frac{1}{x} > 0"), (r"6\cdot 10^{.5}", r"6\cdot 10^{3}"),
                 (r"\begin{cases} 1 & \text{if } e n \text{ is odd} \\ 2 & \text{otherwise} \end{cases}", "12"), (r"\prod_i=1}^{3} i", "3")):
        assert not answers_equal(a, b) and not answers_equal(b, a)
    rng = random.Random(4)
    texts = [text for line in (EQUAL + DIFFERENT).strip().splitlines() for text in line.split(" ~ ")]
    for _ in range(1500):
        a, b, c = rng.sample(texts, 3)
        spliced = a[:rng.randrange(len(a) + 1)] + b[rng.randrange(len(b) + 1):]
        assert answers_equal(spliced, c) in (True, False) and answers_equal(c, spliced) in (True, False)


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


def test_labelled_cases_of_2026():
    cases = [c for c in rows("verifier/cases-2.jsonl") if not c["soft"]]
    said = [answers_equal(c["pred"], c["gold"]) if c["kind"] == "answer" else verify(c["pred"], c["gold"], c["boxed_only"]) for c in cases]
    accepted = [c["id"] for v, c in zip(said, cases) if v and not c["equal"]]
    assert sum(v == c["equal"] for v, c in zip(said, cases)) >= 0.98 * len(cases) and not accepted, accepted


def test_golds_changed_in_one_place_and_rewritten():
    from tests.tools import mutate
    golds = sorted({p["answer"] for p in rows("math500/test.jsonl")})[::5]
    changed = [(kind, text, gold, rewards.compare(text, gold)) for gold in golds for kind, text in mutate.changed(gold)]
    accepted = [c for c in changed if c[3][0] and c[3][1] != "percent sign dropped" and c[0] not in ("words after", "words before")]
    assert len(changed) > 1500 and len(accepted) <= 0.01 * len(changed), accepted
    refused = [(text, gold) for gold in golds for _, text in mutate.rewritten(gold) if not answers_equal(text, gold)]
    assert not refused


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
