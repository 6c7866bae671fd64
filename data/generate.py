"""Make the tiny experiment's data: problems solved by trying values, demonstrations, arithmetic facts, a tokenizer.

    python data/generate.py                     # rewrites data/tiny, byte for byte the committed files
    python data/generate.py --seed 1 --out other --direct 0.2 --partial 0.2 --search 0.3

Every problem is arithmetic modulo a small prime p, where = means "equal modulo p". The sure way to an answer is to
try values one by one; a guess is right about once in p times. So a direct answer pays a little and search pays more,
which is the setting in which the paper's question (does an exploration reward help?) makes sense.

    linear      Find x with 8x + 6 = 3 mod 11.                   one solution: p is prime and 8 is not 0
    power       Find n with 4 * 6^n = 5 mod 11.                  one n in 0 .. p-2: 6 is a primitive root
    quadratic   Find the smallest x with 2x^2 + 3x = 5 mod 11.   computed as (2x + 3)x, three facts instead of four

Files written to --out:
    facts.jsonl                        runs of arithmetic facts, to pre-train on
    steps.jsonl                        single lines of searches, to practise on next
    sft.jsonl                          demonstrations of four kinds: direct, partial, search, checked
    train, validation, test .jsonl     problems with answers only; no problem is in two files
    model/                             Hugging Face config and tokenizer of a tiny Llama (no weights)
"""

import argparse
import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root, when run as a script
from lib import files  # noqa: E402

MOST = 10**6  # lines of a file: a hundred times what the experiment takes
PRIMES = {1: 5, 2: 7, 3: 11}  # level -> modulus
PRIMITIVE_ROOTS = {5: (2, 3), 7: (3, 5), 11: (2, 6, 7, 8)}  # their powers run through 1 .. p-1
FAMILIES = ("linear", "power", "quadratic")
KINDS = ("direct", "partial", "search", "checked")


@dataclass(frozen=True)
class Problem:
    """Find the unknown: linear ax + b = c, power a * b^n = c, quadratic ax^2 + bx = c, all modulo p."""

    family: str
    level: int
    a: int
    b: int
    c: int

    @property
    def p(self):
        return PRIMES[self.level]

    @property
    def name(self):
        return f"tiny/{self.family}/{self.p}/{self.a}-{self.b}-{self.c}"

    @property
    def variable(self):
        return "n" if self.family == "power" else "x"

    def text(self):
        a, b, c, p = self.a, self.b, self.c, self.p
        if self.family == "linear":
            return f"Find x with {a}x + {b} = {c} mod {p}."
        if self.family == "power":
            return f"Find n with {a} * {b}^n = {c} mod {p}."
        return f"Find the smallest x with {a}x^2 + {b}x = {c} mod {p}."

    def candidates(self):
        """The values to try, in increasing order. A quadratic with c > 0 cannot have x = 0."""
        return range(self.p - 1) if self.family == "power" else range(int(self.family == "quadratic"), self.p)

    def evaluate(self, v):
        """The left side at v: (the value, the facts that lead to it as text). Each fact is one table look-up."""
        a, b, p = self.a, self.b, self.p
        if self.family == "power":
            power = pow(b, v, p)
            value = a * power % p
            return value, f"{b}^{v} = {power}, {a} * {power} = {value}"
        product = a * v % p
        total = (product + b) % p
        steps = f"{a} * {v} = {product}, {product} + {b} = {total}"
        if self.family == "linear":
            return total, steps
        value = total * v % p
        return value, f"{steps}, {total} * {v} = {value}"

    def solutions(self):
        return [v for v in self.candidates() if self.evaluate(v)[0] == self.c]


def all_problems():
    """Every problem with a solution. a = 1 and b = 0 are left out: they need fewer steps than the rest."""
    problems = []
    for level, p in PRIMES.items():
        for family in FAMILIES:
            for a in range(2, p):
                for b in PRIMITIVE_ROOTS[p] if family == "power" else range(1, p):
                    for c in range(int(family != "linear"), p):
                        problem = Problem(family, level, a, b, c)
                        if problem.solutions():
                            problems.append(problem)
    return problems


def take(cells, sizes, count, share):
    """Remove `count` problems from the shuffled cells, in turn from each (family, level), so the draw is balanced.

    A small cell gives at most `share` of its original size; the larger ones then make up the number.
    """
    taken = []
    room = {key: min(int(share * size), len(cells[key])) for key, size in sizes.items()}
    while len(taken) < count:
        open_cells = [key for key in cells if room[key] > 0]
        if not open_cells:
            raise SystemExit(f"generate.py: {count} problems asked for, only {len(taken)} can be spared")
        for key in open_cells[: count - len(taken)]:
            taken.append(cells[key].pop())
            room[key] -= 1
    return taken


def try_value(problem, v):
    """One line of a search, as (the value that is tried, the outcome)."""
    value, steps = problem.evaluate(v)
    verdict = f"Yes, {problem.variable} = {v}." if value == problem.c else "No. Wait."
    return f"Try {problem.variable} = {v}: ", f"{steps}, {value} = {problem.c}? {verdict}\n"


def demonstrate(problem, kind, rng):
    """One demonstration. The answer is always right; demonstrations differ in how much of the way they show.

    direct: only the answer. partial: a few random values, then the answer without a reason.
    search: values in increasing order until one fits. checked: the same, and the answer is verified.
    A fifth of the searches start with a random try and then change to going in order ("Alternatively").
    """
    answer = problem.solutions()[0]
    end = f"The answer is \\boxed{{{answer}}}."

    def attempt(v):
        return "".join(try_value(problem, v))

    if kind == "direct":
        return end
    wrong = [v for v in problem.candidates() if v not in problem.solutions()]
    if kind == "partial":
        tries = rng.sample(wrong, min(len(wrong), rng.randint(1, 3)))
        return "".join(map(attempt, tries)) + "Enough. " + end
    text = ""
    if rng.random() < 0.2:
        text = attempt(rng.choice(wrong)) + "Alternatively, go in order.\n"
    text += "".join(attempt(v) for v in problem.candidates() if v <= answer)
    if kind == "checked":
        text += f"Check: {try_value(problem, answer)[1]}"
    return text + end


def facts_of(p):
    """Every product, sum, power and comparison that a demonstration modulo p can use, as (question, result)."""
    facts = [(f"{u} * {v} = ", f"{u * v % p}") for u in range(p) for v in range(p)]
    facts += [(f"{u} + {v} = ", f"{(u + v) % p}") for u in range(p) for v in range(p)]
    facts += [(f"{g}^{n} = ", f"{pow(g, n, p)}") for g in PRIMITIVE_ROOTS[p] for n in range(p - 1)]
    facts += [(f"{u} = {v}? ", "No") for u in range(p) for v in range(p) if u != v]
    facts += [(f"{u} = {u}? ", "Yes") for u in range(p)] * (p // 2)  # rarer in a search, but here half as often as No
    return facts


def fact_lines(count, rng):
    """`count` runs of 20 to 30 facts. Each modulus gets lines in proportion to the number of its facts.

    A solution is a list of [text, trained] pieces. Results are trained; random operands are not, since nothing can
    predict them. With a loss also on the operands, a model of this size did not get beyond chance in the same time.
    """
    tables = {level: facts_of(p) for level, p in PRIMES.items()}
    total = sum(map(len, tables.values()))
    lines = []
    for level, facts in tables.items():
        deck = []  # used up before it is shuffled again, so that every fact comes up equally often
        for _ in range(round(count * len(facts) / total)):
            pieces = []
            for _ in range(rng.randint(20, 30)):
                if not deck:
                    deck = rng.sample(facts, len(facts))
                question, result = deck.pop()
                pieces += [[", " + question if pieces else question, False], [result, True]]
            lines.append({"problem": f"Facts mod {PRIMES[level]}.", "solution": pieces + [[".", False]],
                          "subject": "facts", "level": level})
    rng.shuffle(lines)
    return lines


def step_lines(problems, count, rng):
    """`count` runs of five tries of random values, the right one every third time; only a try's outcome is trained.

    They practise one line of a search, including correct copying and comparing, without a hint which value to try.
    """
    lines = []
    for i in range(count):
        problem = problems[i % len(problems)]
        pieces = []
        for _ in range(5):
            v = rng.choice(problem.solutions() if rng.random() < 1 / 3 else list(problem.candidates()))
            tried, outcome = try_value(problem, v)
            pieces += [[tried, False], [outcome, True]]
        lines.append({"problem": problem.text(), "solution": pieces + [["Enough.", False]],
                      "subject": "steps", "level": problem.level})
    return lines


def row(problem):
    return {"problem": problem.text(), "answer": str(problem.solutions()[0]), "subject": problem.family,
            "level": problem.level, "unique_id": problem.name}


def demonstrations(problems, count, shares, rng):
    """`count` demonstrations, the same number for each family; a family with few problems shows some twice."""
    rows = []
    for i, family in enumerate(FAMILIES):
        own = [q for q in problems if q.family == family]
        n = count // len(FAMILIES) + (i < count % len(FAMILIES))
        # Exact shares instead of a draw per line, so that the mixture is the same for every family and seed.
        bounds = [round(n * sum(shares[: k + 1])) for k in range(len(KINDS))]
        kinds = [next(kind for kind, bound in zip(KINDS, bounds) if j < bound) for j in range(n)]
        rng.shuffle(kinds)
        for j, kind in enumerate(kinds):
            problem = own[j % len(own)]
            rows.append({**row(problem), "solution": demonstrate(problem, kind, rng), "demonstration": kind})
    rng.shuffle(rows)
    return rows


BEGIN, END, START_HEADER, END_HEADER, TURN_END = SPECIALS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

# Words keep the space that follows, so a number is the same token wherever it stands: 3 and not " 3".
# "x = " and "Wait.\n" are one piece each because they come in every line. What no branch matches is still kept:
# every byte has a token of its own, so any text survives a round trip.
PIECES = r"[xn] = |[A-Za-z]+(?: |\.\n)?|\\boxed\{|[0-9]+|\.?\n+|[^A-Za-z0-9\n\\]+"


def make_tokenizer(texts, vocab_size):
    """Byte-level BPE over PIECES, with Llama 3's special tokens after the ordinary ones, as Llama 3 has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIALS), min_frequency=2, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def write_model(folder, tokenizer, args):
    """The Hugging Face folder of a tiny Llama: everything except the weights."""
    os.makedirs(folder, exist_ok=True)
    bos, end, turn_end = (tokenizer.token_to_id(t) for t in (BEGIN, END, TURN_END))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": args.hidden, "intermediate_size": 3 * args.hidden, "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads,
        "head_dim": args.hidden // args.heads, "max_position_embeddings": 1024, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": True, "initializer_range": 0.02, "bos_token_id": bos,
        "eos_token_id": [end, turn_end], "torch_dtype": "float32"}
    write_json(f"{folder}/config.json", config)
    write_json(f"{folder}/generation_config.json", {"bos_token_id": bos, "eos_token_id": [end, turn_end]})
    write_json(f"{folder}/tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": TURN_END,
        "pad_token": END, "model_max_length": 1024, "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE})
    files.write_text(Path(folder) / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")


def write_json(path, value):
    files.write_text(Path(path), json.dumps(value, indent=2) + "\n")


def write_jsonl(path, rows):
    files.write_text(Path(path), "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def leave(status, message):
    print(f"generate.py: {files.visible(message, 1000)}", file=sys.stderr)
    sys.exit(status)


def check_out(out):
    """End with status 2 if `out` is not a folder, or has files of these names that this program did not write."""
    if os.path.lexists(out) and not os.path.isdir(out):
        leave(2, f"--out {out}: expected a folder, or a new name")
    facts = Path(out) / "facts.jsonl"
    ours = facts.is_file() and facts.open("rb").read(23) == b'{"problem": "Facts mod '
    for name in ("facts.jsonl", "steps.jsonl", "sft.jsonl", "train.jsonl", "validation.jsonl", "test.jsonl", "model"):
        if not ours and os.path.lexists(Path(out) / name):
            leave(2, f"--out {out}: has a {name} that is not of this program; nothing was replaced, give another one")


def solution_text(row):
    solution = row["solution"]
    return solution if isinstance(solution, str) else "".join(text for text, _ in solution)


def print_table(tables, tokenizer):
    """Print one line per file, then one line per kind of demonstration."""

    def lengths(rows):
        n = [len(tokenizer.encode(solution_text(r)).ids) for r in rows if "solution" in r]
        return f"{sum(n) / len(n):11.1f} {max(n):10d}" if n else f"{'-':>11} {'-':>10}"

    print(f"{'file':<18} {'lines':>6}  {'families':<38} {'levels 1/2/3':<16} {'mean tokens':>11} {'max tokens':>10}")
    for name, rows in tables.items():
        families = ", ".join(f"{f} {n}" for f in FAMILIES + ("facts", "steps") if (n := sum(r["subject"] == f for r in rows)))
        levels = "/".join(str(sum(r["level"] == level for r in rows)) for level in PRIMES)
        print(f"{name:<18} {len(rows):6d}  {families:<38} {levels:<16} {lengths(rows)}")
    for kind in KINDS:
        rows = [r for r in tables["sft.jsonl"] if r["demonstration"] == kind]
        print(f"{'  ' + kind:<18} {len(rows):6d}  {'':<38} {'':<16} {lengths(rows)}")


def parse_args(argv=None):
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--out", default=os.path.join(here, "tiny"), help="folder to write; files of an earlier call are replaced")
    add("--seed", type=int, default=0, help="random seed; the same flags give the same bytes")
    add("--facts", type=int, default=600, help="number of lines of facts")
    add("--steps", type=int, default=1500, help="number of lines of single tries")
    add("--sft", type=int, default=3000, help="demonstrations")
    add("--train", type=int, default=650, help="number of problems for RL")
    add("--validation", type=int, default=150, help="number of problems for choosing settings")
    add("--test", type=int, default=240, help="number of held-out problems, for final results only")
    add("--direct", type=float, default=0.55, help="share of demonstrations with only the answer")
    add("--partial", type=float, default=0.25, help="share with a few tries and then the answer")
    add("--search", type=float, default=0.12, help="share with the full search; the rest also check the answer")
    add("--vocab", type=int, default=512, help="largest vocabulary, special tokens included")
    add("--hidden", type=int, default=128, help="width of the model")
    add("--layers", type=int, default=2, help="number of layers")
    add("--heads", type=int, default=4, help="number of query heads")
    add("--kv-heads", type=int, default=2, help="number of key/value heads")
    args = parser.parse_args(argv)
    shares = (args.direct, args.partial, args.search)
    if not (min(shares) >= 0 and sum(shares) <= 1 + 1e-9):  # in this form for nan, too
        parser.error("--direct, --partial and --search must be >= 0 and add up to at most 1")
    counts = (args.facts, args.steps, args.sft, args.train, args.validation, args.test)
    if min(counts) < 1 or max(counts) > MOST:
        parser.error(f"--facts, --steps, --sft, --train, --validation and --test must be at least 1 and at most {MOST}")
    if args.vocab > 2**16:
        parser.error(f"--vocab must be at most {2**16}: the texts have fewer words")
    if args.vocab < 256 + len(SPECIALS):
        parser.error(f"--vocab must be at least {256 + len(SPECIALS)}: every byte and every special token")
    if min(args.hidden, args.layers, args.heads, args.kv_heads) < 1:
        parser.error("--hidden, --layers, --heads and --kv-heads must be at least 1")
    if args.hidden % (2 * args.heads) or args.heads % args.kv_heads:
        parser.error("--hidden must be a multiple of 2 * --heads, and --heads of --kv-heads")
    return args


def main(argv=None):
    args = parse_args(argv)
    check_out(args.out)
    rng = random.Random(args.seed)
    cells = {}
    for problem in all_problems():
        cells.setdefault((problem.family, problem.level), []).append(problem)
    for problems in cells.values():
        rng.shuffle(problems)
    sizes = {key: len(problems) for key, problems in cells.items()}
    test = take(cells, sizes, args.test, 0.15)
    validation = take(cells, sizes, args.validation, 0.10)
    train = take(cells, sizes, args.train, 0.30)
    rest = [problem for problems in cells.values() for problem in problems]
    for problems in (test, validation, train, rest):
        rng.shuffle(problems)
    shares = (args.direct, args.partial, args.search, 1 - args.direct - args.partial - args.search)
    tables = {
        "facts.jsonl": fact_lines(args.facts, rng),
        "steps.jsonl": step_lines(rest, args.steps, rng),
        "sft.jsonl": demonstrations(rest, args.sft, shares, rng),
        "train.jsonl": [row(problem) for problem in train],
        "validation.jsonl": [row(problem) for problem in validation],
        "test.jsonl": [row(problem) for problem in test],
    }
    every = [r for rows in tables.values() for r in rows]
    texts = [r["problem"] for r in every] + [solution_text(r) for r in every if "solution" in r]
    tokenizer = make_tokenizer(texts + ["user", "assistant", "Problem: ", "\n\n"] * 100, args.vocab)
    try:
        os.makedirs(args.out, exist_ok=True)
        for name, rows in tables.items():
            write_jsonl(os.path.join(args.out, name), rows)
        write_model(os.path.join(args.out, "model"), tokenizer, args)
    except OSError as error:
        leave(1, error)
    print_table(tables, tokenizer)


if __name__ == "__main__":
    sys.exit(main())
