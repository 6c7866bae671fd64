"""The reward of RLSP: an outcome verifier, Eq. 1, counters of search behaviour.

"On the Emergence of Thinking in LLMs I: Searching for the Right Intuition" (arXiv 2502.06773):

    R = alpha * c + (1 - alpha) * R_ex                                                       (Eq. 1)

c says whether the boxed answer is right; R_ex rewards exploration, right or wrong.
PPO learns to do what it is paid for, so a right answer refused or a wrong one accepted costs more
here than anywhere else.  This file finds the answer in a response and compares it, as text where it
is text; lib/answers.py reads and compares mathematics.  `python rewards.py ANSWER GOLD` shows the
verdict, the rule that decided and how both were read.  Only the standard library is needed.
"""
from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Callable

from lib.answers import GROUPED, MAX_CHARS, bare, equal_by_value, parse
from lib.values import shown


# -- 1. Conventions: this table decides what mathematics does not.  Each row has a test. -----------


CONVENTIONS = {
    "last box": "the last \\boxed, \\fbox or \\framebox that is not empty is the answer; boxes "
                "joined by commas or 'and' are one list",
    "empty": "an empty answer is equal to nothing, not even to an empty gold",
    "list": "1,2,3 and {1,2,3} and '1 or 2 or 3' are unordered, and multiplicity counts: 3,3 is "
            "not 3",
    "tuple": "(1,2), [1,2), matrices and vectors are ordered; brackets count; a column is the "
             "tuple of its entries",
    "plus-minus": "a \\pm b is the list a+b, a-b",
    "grouping": "1,000 outside brackets, and 1{,}000, 1\\,000 or 1 000 anywhere, is 1000; (1,000) "
                "is a pair; 3,14 is 3.14 unless the gold is a list: 0.1 is not 0,1",
    "units": "units and nouns after a number, money signs and degree signs are dropped; million, "
             "halves and squared are computed; 'not', 'or' and 'at least' make an answer "
             "unreadable; inside sin() degrees stay degrees",
    "degrees": "30 degrees is 30, and also pi/6 if only one side has the sign",
    "percent": "10% is 0.1, and also 10 if only one side has the sign",
    "decimal": "a decimal equals a value with infinitely many digits if it is that value, rounded "
               "or cut to the digits shown, at least 9 (or the nearest double); it equals a value "
               "with finitely many digits only exactly",
    "approx": "in 'a \\approx b' a is the answer, b is a remark",
    "name": "'k = 5', 'f(x) = 5', 'm+n = 2+3 = 5' give 5; 4 = 3 gives nothing; different names, x "
            "= 1, y = 2, are one solution, equal to (1,2) in alphabetical order or in the gold's; "
            "a repeated name, x = 1, x = 2, begins another solution, as in 1, 2",
    "argument": "f(x) = x+1 and f(t) = t+1 are the same function",
    "equation": "an equation equals its non-zero multiples, and the expression that it gives for "
                "a name that does not occur in that expression",
    "inequality": "an inequality equals the interval or union of intervals where it holds",
    "function": "functions are equal if they agree where both are real; n is a whole number in "
                "floors, factorials and (-1)^n; where |...| is written, both must be real in the "
                "same places: ln|x| is not ln x",
    "ratio": "a:b is the quotient a/b",
    "time": "8:34 pm is 20:34 and 20:34:00; compared with it, 8:34 may be am or pm",
    "base": "2516_8 equals only 2516_8; base 10 is a plain number",
    "log": "log without a base is the natural logarithm",
    "option": "the option letters A to J match in either case, with or without brackets, a full "
              "stop or the option's text; AC is A, C; DCBA is an order, not ABCD",
    "words": "words match without regard to case, spaces and punctuation",
}
NO_ANSWER = -0.5           # c of a response without a \boxed answer (official code, not the paper)
EXPLORATIONS = ("none", "length", "steps", "judge")  # of R_ex, by `score`


# -- 2. Extraction --------------------------------------------------------------------------------


_BOX_HEAD = re.compile(r"\\[a-z]+\s*([-+]?[\d.,]*\d|\\[A-Za-z]+|[^\s$])?")
_BRACE = re.compile(r"\\.|[{}]", re.S)
_GAP = r"(?:[\s$]|\\q?quad|\\[,;: ])*"
_JOINT = rf"{_GAP}(?:,|&|and|\\text\{{,? *and *\}})(?:{_GAP}(?:and|\\text\{{ *and *\}}))?{_GAP}"
_STATED = re.compile(r"answer\s*(?:is|:|=)+\s*|####\s*|^(?:A|Answer):[ \t]", re.I | re.M)
_SPANS = re.compile(
    r"\$\$?([^$]{1,400})\$|\\\(((?:[^\\]|\\(?![()])){1,400})\\\)"
    r"|\\\[((?:[^\\]|\\(?![\[\]])){1,400})\\\]"
    r"|(\\[dt]?frac\{[^{}]{1,40}\}\{[^{}]{1,40}\})"
    r"|([-+]?(?:\\?\$)?(?:\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+)(?:/\d+)?"
    r"\s*(?:\\?%)?)", re.A)
_NO_CLAIM = re.compile(
    r"\b(?:not|or|and|least|most|than)\s+\Z|\w\(\Z|[\w)]\*+\Z|[@~^#&|?;_{\\%]\Z|[<>!]=?\Z|==\Z"
    r"|__\w+__|/\w*/\Z|\b(?:lambda|import|print|eval|exec|return|globals|echo|yield)\b")
_NO_END = re.compile(
    r"[@#^_~]|[ijnxy]\b|\+\+|--|\s*(?://|/\*|[#&|=!<>]\S|(?:hundred|thousand|million|billion)\b)")
_SPECIAL = re.compile(r"<\|[^<>|]*\|>")          # tokens that a decoder left in the text


def extract_answer(text: str, boxed_only: bool = True, strip_think: bool = False) -> str | None:
    """The content of the last box in `text` that is not empty, or None without one.

    A box that the token limit cut off runs to the end of its line.  With `boxed_only=False`, the
    last 4,000 characters of a text without a box are searched for "answer is ..." or "####", then
    for the last formula or number.  `strip_think` first drops everything up to the last </think>.
    """
    text = text.rpartition("</think>")[2] if strip_think else text
    at = last_box(text)
    if at < 0:
        return None if boxed_only else _stated_answer(text[-4_000:])
    answers = [box(text, at)[0]]
    for _ in range(20):                          # "mark your solution with \boxed" is not an answer
        if answers[0].strip() or (before := last_box(text, 0, at)) < 0:
            break
        answers, at = [box(text, before)[0]], before
    while (before := last_box(text, max(0, at - 1_000), at)) >= 0 and len(answers) < 20:
        content, end = box(text, before)         # \boxed{1} and \boxed{2} is the list 1, 2
        if not end or not re.fullmatch(_JOINT, text[end:at]):
            break
        answers, at = [content, *answers], before
    return ", ".join(dict.fromkeys(map(_undressed, answers))) or None


def _undressed(answer: str) -> str:
    """The answer without what a decoder or markup left in the box: 42<|im_end|>, 42**, ~42~."""
    answer = _SPECIAL.sub("", answer).strip()
    for mark in ("**", "~"):
        if answer.endswith(mark):
            answer = answer.removeprefix(mark).removesuffix(mark)
    return answer.strip()


def last_box(text: str, start: int = 0, end: int | None = None) -> int:
    """The index of the last box command, or -1 without one."""
    return max(text.rfind(command, start, end) for command in ("\\boxed", "\\fbox", "\\framebox"))


def box(text: str, start: int) -> tuple[str, int | None]:
    """(content of the box at `start`, index after it or None if it is cut off).  After \\boxed
    without a brace TeX takes one token; we take the whole number or command."""
    head, depth = _BOX_HEAD.match(text, start), 0
    if head[1] != "{":
        return head[1] or "", head.end()
    for brace in _BRACE.finditer(text, head.end() - 1, head.end() + 4 * MAX_CHARS):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)         # \{ and \} do not count
        if depth == 0:
            return text[head.end():brace.start()], brace.end()
    return text[head.end():].partition("\n")[0].rstrip(" $."), None


def _stated_answer(text: str) -> str | None:
    text, last = re.sub(r"\\\$|</?[a-z]+/?>", "", text), None
    for stated in list(_STATED.finditer(text))[-1:]:
        bold = text[:stated.start()].count("**") % 2
        text = text[stated.end():].strip().replace("**", "", bold)
        rest, span = re.split(r"\n|\.(?:\s|$)|<\|", text, maxsplit=1)[0], _SPANS.match(text)
        if span and "$" in span[0][:1] + span[0][-1:]:
            return span[span.lastindex]
        if letter := re.match(rf"{_LETTER}(?=[,.;:]|\s*$)", rest):
            return letter[0]
        kind, *items = parse(rest, True)
        stated = kind != "list" or all(item[0] not in ("text", "list") for item in items[1:])
        if stated and kind not in ("text", "unreadable"):
            return rest
        if kind == "text" and not re.search(r"\d", text):
            return rest
    for span in _SPANS.finditer(text):
        if re.search(r"\d|[<>=]|\\(?:lt|gt|le|ge|ne|begin)", span[span.lastindex]):
            last = span
    if last is None or _NO_CLAIM.search(text[max(0, last.start() - 80):last.start()]):
        return None                              # "not 3", print(3), lambda: 3, @3
    line = text[text.rfind("\n", 0, last.start()) + 1:].partition("\n")[0]
    star = text[last.start() - 1:last.start()] == "*", text[last.end():last.end() + 1] == "*"
    emphasis = line.count("**") % 2 == 0 if "**" in line else star[0] == star[1]
    if _NO_END.match(text, last.end()) or not emphasis:
        return None                              # 3 // 4, 3++, 3**
    return last[last.lastindex].strip() or None


# -- 3. Comparison: first as text, then by value --------------------------------------------------


_LETTER = r"(?:\([A-J]\)|[A-J](?:\)|(?![a-z])))"
_OPTIONS = re.compile(rf"(?:[Tt]he )?(?:(?i:option|choice|(?:correct )?answer is)\s)?\s*"
                      rf"({_LETTER}(?:(?:[\s,;&]|and)*{_LETTER})*|\(?[a-hj]\)?)[.:]?", re.A)
_OPTION = re.compile(
    r"[\s$]*(?:\\(?:text|math)(?:bf|rm)?\{)?\s*"
    r"(?:\(([A-J])\)|([A-J])(?:[.:)]|\s[-–—](?=\s*\w\w)))"
    r"(?:[}{\s\\~$]|text)*(?!(?:or|and|not)\b)[A-Za-z0-9]", re.A)
_INTEGER = re.compile(r"[-+]?\d{1,99}", re.A)
_COMMA = re.compile(r"[-+]?(?:\d+,(?:\d\d?|\d{4,})|0,\d+)", re.A)


def answers_equal(answer: str, gold: str) -> bool:
    """Whether two answers are mathematically equal, by CONVENTIONS.  It never raises, whatever the
    two strings are."""
    return compare(answer, gold)[0]


def verify(response: str, gold: str, boxed_only: bool = True) -> bool:
    """Whether the answer in a whole response is right.  It never raises."""
    return explain(response, gold, boxed_only)[0]


def explain(response: str, gold: str, boxed_only: bool = True) -> tuple[bool, str | None, str]:
    """(verdict, extracted answer, the rule that decided, in a few words) for a whole response."""
    answer = extract_answer(response, boxed_only)
    if not answer:
        return False, answer, "no boxed answer" if boxed_only else "no answer"
    verdict, rule = compare(answer, gold)
    return verdict, answer, rule


def compare(answer: str, gold: str) -> tuple[bool, str]:
    """(whether two answers are equal, the rule that decided)."""
    answer, gold = answer.strip(), gold.strip()
    if not answer or not gold:
        return False, "empty"
    if max(len(answer), len(gold)) > MAX_CHARS:
        return answer == gold, "too long to read: compared as text"
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
        return int(answer) == int(gold), "equal exactly"     # most answers need no grammar
    one, two = bare(answer), bare(gold)
    if answer == gold:
        return bool(re.search(r"[^\s{}\\]", one)), "same text"
    letters = options(one), options(two)
    if all(letters):
        return letters[0] == letters[1], "option letters"
    for text, other in ((answer, letters[1]), (gold, letters[0])):           # "(C) 12" against C
        option = other and _OPTION.match(text)
        if option:
            return option[option.lastindex] == other, "option letter before its text"
    trees = parse(answer, True), parse(gold, True)
    prose = {"text", "unreadable"} & {tree[0] for tree in trees}
    if prose and words(one) and words(one) == words(two):
        return True, "same words"
    verdict, rule = equal_by_value(answer, gold)
    if not verdict and (GROUPED.search(answer) or GROUPED.search(gold)):
        verdict, rule = equal_by_value(answer, gold, grouped=False)     # 1,000 is two numbers
    if not verdict and _COMMA.fullmatch(one) and trees[1][0] != "list":
        return equal_by_value(one.replace(",", "."), gold)
    if not verdict and _COMMA.fullmatch(two) and two[-2] != "," and trees[0][0] != "list":
        return equal_by_value(answer, two.replace(",", "."))
    return verdict, rule


def options(text: str) -> str:
    """The option letters, in capitals, if the text has nothing else; otherwise ''.  They are sorted
    unless they are written without separators, as in DCBA, where the order counts."""
    found = text[:32].isascii() and _OPTIONS.fullmatch(text)
    if not found:
        return ""
    letters = re.findall("[A-J]", found[1].replace("and", "").upper())
    return "".join(letters if len(letters) == len(found[1]) else sorted(letters))


def words(text: str) -> str:
    """The words of a prose answer in a normal form, or '' if it contains any mathematics."""
    text = re.sub(r"\b(?:[Tt]he|an?) ", "", text)
    prose = re.search("[A-Za-z]{2}", text) and not re.search(r"^-|[^\w\s.,;:'\"!?(){}-]", text)
    return re.sub(r"[-.](?!\d)|[^\w.-]", "", text).casefold() if prose else ""


# -- 4. Eq. 1 -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardParts:
    """Every part of Eq. 1 by name, for logs and the report."""
    total: float         # R
    outcome: float       # c: 1.0 right, 0.0 wrong, NO_ANSWER without a boxed answer
    correct: bool        # whether the verifier accepted
    answer: str | None   # what was extracted
    reason: str          # the rule that decided
    exploration: float   # R_ex before weighting
    alpha: float         # the weight that was used; 1.0 without exploration
    length: int          # reasoning tokens before the last box, without repetition
    steps: int           # reasoning lines before the last box, without repetition
    floored: bool        # whether the length term stopped at its floor


def score(response: str, gold: str, *, exploration: str = "none", alpha: float = 0.8,
          length_scale: float = 1000.0, length_floor: float = 4.0, steps_scale: float = 10.0,
          truncated: bool = False, count_tokens: Callable[[str], int] | None = None,
          effort: float | None = None, verdict: bool | None = None) -> RewardParts:
    """Eq. 1 of the paper for one response: R = alpha * c + (1 - alpha) * R_ex.  `exploration`
    chooses R_ex:
      none    R = c
      length  -min(length_scale / length, length_floor), a price that falls with more reasoning.
              With alpha = 0.8 and floor 4 the term is at worst -0.8: it can cancel a right answer
              and no more.
      steps   min(1, steps / steps_scale)
      judge   `effort`, in [0, 1], as graded before (lib/judge.py)
    `count_tokens` counts the length (default: words and punctuation signs).  Only the text before
    the last box counts, and only once: neither repetition nor padding after the answer is paid for.
    A response cut off by the token limit (`truncated`) is scored by its box only if the box is
    complete.  `verdict` is the result of another verifier; it alone then decides whether c is 1 or
    0, whatever is in a box.  Bad arguments raise ValueError.
    Departures from the official code (github.com/GuanghaoYe/Emergence-of-Thinking): it takes the
    text before the FIRST box, counts characters / 4, and adds the length term unweighted; a
    response that starts with \\boxed divides by zero there and earns 0.0, more than an honest short
    answer.  NO_ANSWER has the value of the official code; the paper has none.
    """
    if exploration not in EXPLORATIONS:
        raise ValueError(f"exploration {exploration!r}: choose one of {', '.join(EXPLORATIONS)}")
    if exploration == "judge" and (effort is None or not 0 <= effort <= 1):
        raise ValueError(f"effort {effort!r} is not in [0, 1]")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha!r} is not in [0, 1]")
    scales = dict(length_scale=length_scale, length_floor=length_floor, steps_scale=steps_scale)
    for name, value in scales.items():
        if not value > 0:  # unlike value <= 0, this refuses NaN
            raise ValueError(f"{name} {value!r} is not above 0")
    correct, answer, reason = explain(response, gold)
    at = last_box(response)
    if truncated and answer is not None and box(response, at)[1] is None:
        correct, answer, reason = False, None, "the token limit cut the box"
    outcome = 1.0 if correct else 0.0 if answer is not None else NO_ANSWER
    if verdict is not None:
        correct = verdict
        outcome = float(verdict)
        reason = "--verifier"
    reasoning = reasoning_of(response)
    length = (count_tokens or words_and_signs)(reasoning)
    steps = len(reasoning.split("\n")) if reasoning else 0
    floored = exploration == "length" and length * length_floor <= length_scale
    if exploration == "none":
        alpha = 1.0
        r_ex = 0.0
    elif exploration == "length":
        r_ex = -length_floor if floored else -length_scale / length
    elif exploration == "steps":
        r_ex = min(1.0, steps / steps_scale)
    else:
        r_ex = effort
    total = alpha * outcome + (1 - alpha) * r_ex
    return RewardParts(total, outcome, correct, answer, reason, r_ex, alpha, length, steps, floored)


def words_and_signs(text: str) -> int:
    """The number of words and punctuation signs in a text."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def reasoning_of(response: str) -> str:
    """The text that exploration is paid for: all before the last box, without repetition."""
    at = last_box(response)
    return without_repetition(response[:at] if at >= 0 else response)


# -- 5. Behaviours and repetition -----------------------------------------------------------------

# The behaviours of the paper's Appendix A, as phrases between word boundaries, in either case. Each
# occurrence counts.
BEHAVIOURS = {
    "backtracking": r"wait|hold on|(?:let me|let's|let us|i'?ll|we) go back|go(?:ing)? back to"
                    r"|back up|back to the (?:start|beginning)|try again|try another|start over"
                    r"|start again|dead end"
                    r"|does(?:n't| not) work|that fails|backtrack(?:ing)?",
    "verification": r"let me check|let's check|let us check|let me verify|let's verify|verify"
                    r"|verif(?:ied|ying|ication)"
                    r"|check(?:ing)?|double[- ]check(?:ing)?|to confirm|let me confirm|sanity check"
                    r"|plug(?:ging)? (?:it |this )?back",
    "alternatives": r"alternatively|another (?:approach|way|method|idea)"
                    r"|(?:a )?different (?:approach|way|method)|other (?:approach|way|method)"
                    r"|on the other hand|what if|instead,? (?:let's|let me|we|i) (?:can|could|try)",
    "self_correction": r"(?:that's|that is|this is|it's|i was) "
                       r"(?:wrong|incorrect|not right|not correct|a mistake)"
                       r"|i made (?:a|an) (?:mistake|error)|my mistake|correction|i miscalculated"
                       r"|i misread|i was mistaken"
                       r"|let me (?:fix|correct)|should (?:actually )?(?:be|have been) instead",
}
_BEHAVIOURS = {name: re.compile(rf"\b(?:{words})\b", re.I) for name, words in BEHAVIOURS.items()}


def behaviours(text: str) -> dict[str, int]:
    """How often each behaviour of BEHAVIOURS occurs in `text`."""
    text = text.replace("\u2019", "'")
    return {name: len(pattern.findall(text)) for name, pattern in _BEHAVIOURS.items()}


def repeated_words(text: str, n: int = 8) -> list[tuple[bool, int, int]]:
    """(is it repeated, start, end) for each word.  A word is repeated if it lies in a line that
    occurred before (the same words, whatever their case, spaces and punctuation) or in a sequence
    of n words that did.  Numbers are words: "Try x = 3" is not "Try x = 4"."""
    words, again, lines, grams, start = [], [], set(), set(), 0
    for line in text.split("\n"):
        found = [(m[0].casefold(), start + m.start(), start + m.end())
                 for m in re.finditer(r"\w+|[-+*/^=<>]", line)]
        key = tuple(word for word, _, _ in found)
        again += [key in lines] * len(key)
        lines.add(key)
        words += found
        start += len(line) + 1
    for i in range(len(words) - n + 1):    # shorter sequences recur in honest mathematics
        gram = tuple(word for word, _, _ in words[i:i + n])
        if gram in grams:
            again[i:i + n] = [True] * n
        grams.add(gram)
    return [(repeat, begin, end) for repeat, (_, begin, end) in zip(again, words)]


def without_repetition(text: str) -> str:
    """`text` without its repeated words, without what lies between two of them, and without lines
    that contain no word."""
    kept, at, before = [], 0, False
    for repeat, begin, end in repeated_words(text):
        if repeat and before:
            kept.append("\n" * text.count("\n", at, begin))
        else:
            kept.append(text[at:begin if repeat else end])
        at, before = end, repeat
    lines = "".join(kept + [text[at:]]).split("\n")
    return "\n".join(line for line in lines if re.search("[A-Za-z0-9]", line))


def repetition(text: str) -> float:
    """The share, 0 to 1, of the words in `text` that repeat an earlier line or 8-word sequence."""
    words = repeated_words(text)
    return sum(repeat for repeat, _, _ in words) / len(words) if words else 0.0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("usage: python rewards.py ANSWER GOLD", file=sys.stderr)
        sys.exit(2)
    equal, rule = compare(*sys.argv[1:])
    print("equal" if equal else "not equal", "by rule:", rule)
    for who, text in zip(("answer", "gold"), sys.argv[1:]):
        print(f"{who:7}", shown(parse(text.strip(), True)))
