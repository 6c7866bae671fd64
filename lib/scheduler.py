"""Which sequence sits in which row of the cache, and what each has produced so far; no tensors."""
import math
import os
from collections import deque

from lib import guards

PREFILL_TOKENS = 4096  # prompt tokens in one forward pass


class Scheduler:
    """The rows of one call of lib.decode.generate.

    A prompt is prefilled without its last token, which is the first one that decoding takes. A finished
    sequence leaves at once: its row goes to the next sample of its own prompt, whose keys are there, or to
    the last active sequence.
    """

    def __init__(self, prompts, slots, max_new_tokens, eos):
        self.prompts = prompts
        self.slots = slots
        self.max_new_tokens = max_new_tokens
        self.eos = eos
        self.out = [[] for _ in prompts]
        self.logprobs = [[] for _ in prompts]
        first = {}  # equal prompts have the number of the first of them
        self.prompt_of = [first.setdefault(tuple(p), i) for i, p in enumerate(prompts)]
        # Longest first: neighbours are of similar length. Samples of one prompt stand side by side.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), self.prompt_of[i], i))
        self.waiting = deque(order)
        self.active = []  # active[row] = index of the prompt that sits in this row of the cache
        self.moved = False  # whether rows have changed hands since the device was told
        self.prefills = deque()  # (first row, tokens of each row, positions that these rows hold before)
        self.copies = []  # (row, rows, positions) to copy once the prefills are done
        self.prefix = 0  # how many tokens all prompts begin with alike: they are computed once
        if prompts:
            self.prefix = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
        if self.prefix:
            self.prefills.append((0, [prompts[0][: self.prefix]], 0))
            self.copies.append((0, slice(1, slots), self.prefix))

    def wants_refill(self):
        """Whether to fill free rows now. Several prompts share one prefill, so an eighth of the rows must be
        free."""
        free = self.slots - len(self.active)
        return self.waiting and not self.prefills and (not self.active or free >= max(1, self.slots // 8))

    def refill(self):
        """Put waiting sequences into free rows.

        First come those whose prompt is in no row yet, to be prefilled, then those that copy the row of their
        prompt."""
        start = len(self.active)
        row_of = {self.prompt_of[i]: row for row, i in enumerate(self.active)}
        new = [self.waiting.popleft() for _ in range(min(self.slots - start, len(self.waiting)))]
        fresh = []
        for i in new:
            if self.prompt_of[i] not in row_of:
                row_of[self.prompt_of[i]] = start + len(fresh)
                fresh.append(i)
        self.active.extend(fresh)
        targets = {}  # row of a prompt: rows of its other samples
        for i in new:
            if i not in fresh:
                targets.setdefault(row_of[self.prompt_of[i]], []).append(len(self.active))
                self.active.append(i)
        for row, rows in targets.items():
            self.copies.append((row, rows, len(self.prompts[self.active[row]]) - 1))
        self.group(fresh, start)
        self.moved = True

    def group(self, fresh, start):
        """Add prefills of the prompts `fresh`, for the rows from `start` on.

        A group is prefilled at once; its prompts are of similar length, so that little is padding."""
        lengths = [len(self.prompts[i]) - 1 - self.prefix for i in fresh]
        first = 0
        for j in range(1, len(fresh) + 1):
            full = j == len(fresh) or (j - first + 1) * lengths[first] > PREFILL_TOKENS
            if full or lengths[j] < 0.9 * lengths[first]:
                if lengths[first]:
                    parts = [self.prompts[i][self.prefix : -1] for i in fresh[first:j]]
                    self.prefills.append((start + first, parts, self.prefix))
                first = j

    def ends(self):
        """The number of tokens of each active sequence, prompt and response."""
        return [len(self.prompts[i]) + len(self.out[i]) for i in self.active]

    def ahead(self, look):
        """How many steps to take until the host looks again.

        They are at most `look`, and none follows a sequence's last token."""
        return min(look, min(self.max_new_tokens - len(self.out[i]) for i in self.active))

    def state(self):
        """(last token, its position, tokens produced, index) of each active sequence."""
        return [((self.out[i] or self.prompts[i])[-1], end - 1, len(self.out[i]), i)
                for i, end in zip(self.active, self.ends())]

    def take(self, results):
        """Append the tokens and log-probs of some steps; a finished sequence drops those after its EOS."""
        for tokens, logprobs in results:
            for i, token, logprob in zip(self.active, tokens, logprobs):
                if not (self.out[i] and self.out[i][-1] in self.eos):
                    if not math.isfinite(logprob):
                        place = f"token {len(self.out[i]) + 1} of response {i + 1}"
                        text = f"the log-probability of {place} is {logprob}"
                        raise guards.TrainingError(text, everywhere=False)
                    self.out[i].append(int(token))
                    self.logprobs[i].append(logprob)

    def leave(self, cache):
        """Free the rows of finished sequences; returns how many there were."""
        finished = [row for row, i in enumerate(self.active)
                    if self.out[i][-1] in self.eos or len(self.out[i]) == self.max_new_tokens]
        for row in reversed(finished):
            i = self.active[row]
            if self.waiting and self.prompt_of[self.waiting[0]] == self.prompt_of[i]:
                self.active[row] = self.waiting.popleft()  # the row holds the prompt's keys already
                continue
            last = self.active.pop()
            if row < len(self.active):
                length = len(self.prompts[last]) + len(self.out[last])
                cache.copy(len(self.active), slice(row, row + 1), length)
                self.active[row] = last
        self.moved |= bool(finished)
        return len(finished)
