"""TeX and plain text, cut into the tokens of an answer: groups, commands, fonts, text, numbers, units.

A token is a string, and its first character is its class: a digit (numbers, 20:34, 0.(3)), a letter (names:
'x', 'alpha'), a quotation mark (words of prose and units: '"cm'), else an operator or a command. """
from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MAX_CHARS, MAX_TOKENS = 12_000, 2_000                     # beyond these only the same text is the same answer

class Unreadable(Exception):
    """The text is not an answer in our grammar."""

def table(text: str) -> dict[str, str]:
    return dict(zip(text.split()[::2], text.split()[1::2]))

_GREEK = ("alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi "
          "omega").split()
_LETTERS = {*_GREEK, *map(str.title, _GREEK), *"varepsilon varphi Pi ell dots triangle angle".split()}
_UNICODE = {ord(k): v + " " for k, v in table(
    r"− - – - — - × * ⋅ * · * ∗ * ÷ / ∕ / ⁄ / ≤ <= ⩽ <= ≥ >= ⩾ >= ≠ != ≈ \approx ∞ \infty π \pi "
    r"√ \surd ∛ cbrt ° \degree ∪ \cup ∩ \cap ∖ \setminus ± \pm ∓ \mp ∈ \in ≡ \equiv ∅ \emptyset "
    r"ℝ \mathbb{R} ℤ \mathbb{Z} ℕ \mathbb{N} ℚ \mathbb{Q} ’ ' ′ ' ⌊ \lfloor ⌋ \rfloor ⌈ \lceil "
    r"⌉ \rceil … \dots ： : ， , （ ( ） ) ［ [ ］ ] ； ; ＝ = ＋ + － - ⁺ ^+").items()}
_UNICODE |= {ord(unicodedata.lookup(f"GREEK SMALL LETTER {name.replace('lambda', 'lamda')}")): f"\\{name} "
             for name in _GREEK}
_UNICODE |= dict.fromkeys(map(ord, "“”‘€£¥\u00a0\u2009\u202f✓✔✅"), " ")
_RAISED = dict(zip(map(ord, "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ₀₁₂₃₄₅₆₇₈₉"), "0123456789-n0123456789"))
_COMMANDS = table(                                        # spellings of the same token; plain words as well
    r"\cdot * \times * \ast * \div / \le <= \leq <= \leqslant <= \lt < \ge >= \geq >= \geqslant >= \gt > "
    r"\ne != \neq != ** ^ \% % \lbrack [ \rbrack ] \langle ( \rangle ) \lvert | \rvert | \vert | "
    r"\lVert | \rVert | \backslash \setminus \dfrac \frac \tfrac \frac \cfrac \frac \dbinom \binom "
    r"\tbinom \binom \lbrace \{ \rbrace \} \circ \degree \deg \degree \pmod \mod \bmod \mod mod \mod "
    r"\sim \approx \simeq \approx \cong \approx \colon : \varnothing emptyset \emptyset emptyset "
    r"\infty infty \pi pi \dot \overline \bar \overline \prime ' infinity infty inf infty oo infty pi pi "
    r"percent % percentage % pct % degrees \degree degree \degree deg \degree and \and or \or \land \and "
    r"\lor \or \wedge \and \vee \or union \cup \overrightarrow \vec \widehat \hat \ldots \dots "
    r"\cdots \dots")
FUNCTIONS = {}                                            # each spelling: its name here; arcsinh inverts sinh
for _name in "sin cos tan cot sec csc cosec sinh cosh tanh coth sech csch".split():
    FUNCTIONS[_name] = _name.replace("cosec", "csc")
    for _prefix in ("arc", "ar", "a"):
        FUNCTIONS[_prefix + _name] = "arc" + FUNCTIONS[_name]
FUNCTIONS |= {_name: _name for _name in (
    "exp log abs sqrt cbrt floor ceil max min gcd lcm det Re Im conj cis binom sgn").split()}
FUNCTIONS |= table("ln log lg lg hcf gcd binomial binom nCr binom tg tan ctg cot arctg arctan sign sgn")
_SPELT = sorted({*FUNCTIONS} - set("abs ceil sec sign sgn lcm gcd hcf max min det Re Im conj binom".split()),
                key=len)                                  # sinx is sin x, but maxx is no max
UNITS = set("m s g h l L N J W V K C F A T H Hz kHz cm mm km kg mg ft mph kph lb lbs oz ml mL hr hrs rad sq "
            "mi yd USD".split())
_SHORT = set("the The of is are to no No yes Yes all for if not per by at on an as only old day ago men way "
             "pet dog cat You How Her His else out cup can pen box bag "
             "egg toy ton car bus bed".split())

# Words of prose.  Nouns and units are an open class; what calculates, denies or hedges is a closed one.
TIMES = dict(hundred=100, thousand=1000, million=10 ** 6, billion=10 ** 9, trillion=10 ** 12, dozen=12)
PARTS = dict(half=2, halves=2, quarter=4, quarters=4, hundredth=100, hundredths=100, thousandth=1000)
for _n, _name in enumerate("third fourth fifth sixth seventh eighth ninth tenth".split(), 3):
    PARTS |= {_name: _n, _name + "s": _n}
POWERS = dict(squared=2, cubed=3)
REMARKS = set("where for if when even odd".split())
STOP = {*TIMES, *PARTS, *POWERS, *REMARKS, *(
    "not no nor neither either maybe perhaps probably possibly unless but except without less than least "
    "most over under above below between through until times plus minus choose base modulo divided "
    "multiplied wrong incorrect false untrue ignore approximately roughly about nearly almost point is "
    "are was be to from such that recurring repeating factorial root log mod am pm thousandths millionth "
    "millionths tens hundreds thousands millions billions trillions dozens negative reciprocal bar").split()}
ABOUT = set("the about approximately only exactly just simply precisely roughly around".split())
IS = {"is", "are", "equals", "be", "was"}
SAYINGS = dict.fromkeys(("empty set", "the empty set", "no solution", "no solutions", "no real solution",
                         "no real solutions"), "emptyset")
SAYINGS |= dict.fromkeys(("all real numbers", "all reals", "real numbers", "the real numbers"),
                         "blackboard R")
SAYINGS |= dict.fromkeys(("all integers", "integers", "the integers"), "blackboard Z")
SAYINGS |= dict.fromkeys(("positive integers", "all positive integers"), "blackboard Z+")
SAYINGS["infinitely many"] = "infty"
BASES = {w: str(n) for n, w in enumerate("two three four five six seven eight nine ten".split(), 2)}

_DROPPED = (                                              # commands that set type
    r"\\left\s*\\\{\s*(?=\\begin)|\\(?:left|right)\s*\.|\\(?:left|right|middle|[bB]igg?[lrm]?|"
    r"(?:display|text|script)style|(?:no)?limits|tiny|small|large|Large|LARGE|huge|Huge|(?:black)?square|"
    r"Box|qed|checkmark|bf|rm|it|sf|tt|cal|notag)(?![A-Za-z])|\\q?quad|"
    r"\\(?:phantom|label|tag|color|textcolor|[hv]space)\*?\s*\{[^{}]*\}|"
    r"\\(?:f?box(?:ed)?|underline|bold|boldsymbol|math(?:bf|it|normal)|bm|pmb)(?=\s*\{)|\\[,;:!> $]|~|\$")
_NUMBER = (
    r"\d{1,2}:\d\d(?::\d\d)?(?![\d:])|\d*\.\d*\(\d{1,20}\)(?!\d)|"                         # 20:34, 0.(3)
    r"(?:\d+[A-Fa-f]|[A-F]+\d)[\dA-Fa-f]*(?=_\{?(?:1[1-6]|\\text))|"                        # 2A_{16}
    r"\d{1,3}(?:(?:\{,\}|\\,\\!|,\\!|\\,|\\!|\\\ |[ ~])[ ]?\d{3})+(?![\d{])(?:\.\d+)?|"     # 1{,}000
    r"(?:\d+\.\d+|\d+(?:\.(?![\dA-Za-z]))?(?!\d)|\.\d+)(?:[eE][+-]?\d+(?![A-Za-z\d]))?")
_LEXICON = (
    r"(?P<space>\s+|{twice}(?:{dropped}))|(?P<drop>\\[()\[\]])|(?P<row>{row})|(?P<number>{number})"
    r"|(?P<text>{twice}\\(?:text(?!color|style)[a-z]*|[mh]box)\*?\s*\{{)"
    r"|(?P<upright>{twice}\\(?:math(?:rm|sf|tt)|operatorname)\*?\s*\{{)"
    r"|(?P<op>\.\.\.+|{twice}\\(?:begin|end)\s*\{{\w+\*?\}}|{twice}\\[A-Za-z]+|{twice}\\[{{}}%&|_]|<=|>="
    r"|!=(?!=)|==|\*\*|[-+*/^_=<>(){{}}\[\]|,;:!%&'])|(?P<half>[apAP]\.\s?[mM]\b\.?)|(?P<word>[A-Za-z]+)")
_TOKEN = {twice: re.compile(_LEXICON.format(twice=r"\\?" * twice, dropped=_DROPPED, number=_NUMBER,
                                            row="(?!)" if twice else r"\\\\(?:\s*\[[^\]\\]*\])?"), re.A)
          for twice in (False, True)}                     # without environments \\frac is \frac
GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?", re.A)
_DRESS = re.compile(
    _DROPPED + r"|\\(?:text[a-z]*|[mh]box|math[a-z]+|operatorname)\*?\s*\{([^{}]*)\}|\\[()\[\]]")
RELATIONS = "= \\equiv < <= > >= != \\in \\approx \\mid".split()

def number(text: str) -> tuple:
    """A number leaf: its value, and how many decimal places it shows if it is a decimal (0: it is exact)."""
    if text.isdigit() and len(text) < 20:
        return "num", Fraction(int(text)), 0
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, places = mantissa.partition(".")
    if len(mantissa) > 4_000 or len(exponent) > 4:
        raise Unreadable("number too long")
    value = Fraction(int(whole + places), 10 ** len(places)) * Fraction(10) ** int(exponent or 0)
    return "num", value, max(0, len(places) - int(exponent or 0)) if places else 0

def ascii_spelling(text: str) -> str:
    """x² as x^{2}, ½ as \\frac{1}{2}, α as \\alpha, ≤ as <=.  Digits of other scripts stay: unreadable."""
    text = re.sub("[⁰¹²³⁴-⁹⁻ⁿ]+", lambda m: "^{" + m[0].translate(_RAISED) + "}", text.translate(_UNICODE))
    text = re.sub("[₀-₉]+", lambda m: "_{" + m[0].translate(_RAISED) + "}", text)
    text = re.sub("[\U0001d400-\U0001d7cb]", lambda m: unicodedata.normalize("NFKC", m[0]), text)   # fonts
    for sign in set(re.findall("[¼-¾⅐-⅞]", text)):
        value = Fraction(unicodedata.numeric(sign)).limit_denominator(10)
        text = text.replace(sign, f"\\frac{{{value.numerator}}}{{{value.denominator}}}")
    return text

def bare(text: str) -> str:
    """The text without commands that only set type."""
    return _DRESS.sub(r" \1 ", text).strip() if re.search(r"[\\$~]", text) else text

def tokens(text: str, grouped: bool) -> list[str]:
    """The tokens of an answer.  `grouped`: is 1,000 outside brackets one number?"""
    if len(text) > MAX_CHARS:
        raise Unreadable("too long")
    if not text.isascii():
        text = ascii_spelling(text)
    text = text.strip(" \n\t\"`")
    if not text.endswith("..."):
        text = re.sub(r"[\s\\]*[.,;]?[\s\\]*$", "", text)
    pattern, found, at, stack, prose = _TOKEN["\\begin" not in text], [], 0, [], False
    while at < len(text):                                 # stack: (what opened, index of its first token)
        alone = grouped and text[at].isdigit() and all(kind in ("text", "upright") for kind, _ in stack)
        token = alone and GROUPED.match(text, at) or pattern.match(text, at)
        if not token and text[at] in ".?" and (prose or found and found[-1][0] == '"'):
            at += 1
            continue
        if not token or len(found) > MAX_TOKENS:
            raise Unreadable("too many tokens" if token else f"character {text[at]!r}")
        kind, value = token.lastgroup or "number", token[0]
        if value == "$" and stack and stack[-1][0] == "text":
            prose = not prose
        elif value == "~" and not found:
            raise Unreadable("~ before an answer")
        elif kind == "space" and value.count("\n") > 1 and found and "\\begin" not in text:
            found.append(";")                             # a blank line separates answers
        elif kind == "number":
            plain = value.isdigit() or not re.search(r"[\\,{ ~]", value)
            found.append("0" * (value[0] == ".") + (value if plain else re.sub(r"[^\d.]", "", value)))
        elif kind in ("text", "upright"):
            stack.append((kind, len(found)))
            prose = kind == "text"
        elif kind == "half":
            found.append('"' + value[0].lower() + "m")
        elif kind == "row":
            found.append("\\\\")
        elif kind == "op" or value == "mod":
            _operator("\\mod" if value == "mod" else value[value.startswith("\\\\"):], found, stack)
            prose = bool(stack) and stack[-1][0] == "text"
        elif value in ("st", "nd", "rd", "th") and (text[at - 1].isdigit() or "^" in found[-2:]):
            _lower(found, stack)                          # 15th
        elif kind == "word":
            found += _split_word(value, prose, bool(stack) and stack[-1][0] == "upright", found[-1:])
        at = token.end()
    if any(kind in ("text", "upright") for kind, _ in stack):
        raise Unreadable("a brace is not closed")
    if found[:1] == ["]"] or found[-1:] == ["["] or "]" in found and "\\cup" in found:
        _turn_brackets(found)
    return found

def _operator(value: str, found: list[str], stack: list) -> None:
    value = _COMMANDS.get(value, value).replace(" ", "")
    if value[1:] in FUNCTIONS:
        value = "\\" + FUNCTIONS[value[1:]]
    if value in ("{", "(", "[", "\\{"):
        stack.append((value, len(found)))
    elif value in ("}", ")", "]", "\\}") and stack:
        kind, start = stack.pop()
        mathematics = any(token[0] not in '"*/^-{}12345' for token in found[start:])
        if kind == "upright" and len(found) > start + 1 and mathematics:
            found[start:] = ["{", *found[start:], "}"]    # \mathrm{3x+2}
        if kind in ("text", "upright"):
            return
    elif value in ("\\degree", "'"):
        _lower(found, stack)
    elif value == "\\mod" and found[-1:] == ["("]:        # (mod 7)
        found.pop()
        stack[-1] = "text", len(found)
    elif value in RELATIONS and found[-1:] == ["&"]:      # x &= 1 in an aligned environment
        found.pop()
    elif value[:3] == "...":
        value = "dots"
    found.append(value[1:] if value[1:] in _LETTERS else value)

def _lower(found: list[str], stack: list) -> None:
    """A degree sign, a prime and 'th' stand raised, but are no exponents: no ^ before them, no braces around
    them."""
    if found[-2:] == ["^", "{"]:
        found.pop()
        braces = max(n for n, (kind, _) in enumerate(stack) if kind == "{")
        stack[braces] = "text", len(found)
    if found[-1:] == ["^"]:
        found.pop()

def _split_word(word: str, prose: bool, upright: bool, before: list[str]) -> list[str]:
    """xy is x y, sinx is sin x; words of prose and units stay whole."""
    number = before and before[0][0].isdigit()
    if word.lower() in ("am", "pm") and number and (prose or word.isupper() or ":" in before[0]):
        return ['"' + word.lower()]
    if len(word) > 1 and word.lower() in _COMMANDS:
        return [_COMMANDS[word.lower()]]
    if word == "U" and before and before[0] in (")", "]", "\\}"):
        return ["\\cup"]
    if word in FUNCTIONS and not (prose and word == "sign"):
        return ["\\" + FUNCTIONS[word]]
    if prose or upright and (len(word) > 1 or word in UNITS):
        return ['"' + word]
    if word in _LETTERS and len(word) > 2:
        return [word]
    function = next((f for f in reversed(_SPELT) if word.startswith(f)), "")
    english = word[1:].islower() and len(word) > max(3 - word[0].isupper(), len(function) + 1)
    if len(word) > 1 and (word in UNITS or word in _SHORT or english):
        return ['"' + word]
    return ["\\" + FUNCTIONS.get(function, "")] * bool(function) + list(word[len(function):])

def _turn_brackets(found: list[str]) -> None:
    """]0, 1[ is (0, 1): a bracket that closes where nothing is open opens, and the other way round."""
    inside = False
    for i, token in enumerate(found):
        if token in ("(", "[", ")", "]"):
            if inside == (token in "([") and token in "()":
                return
            if inside == (token in "(["):
                found[i] = "(" if token == "]" else ")"
            inside = not inside
