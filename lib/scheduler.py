"""Decides which sequence is in which row of the cache, and holds what each has produced. It uses no
tensors."""
import math
import os
from collections import deque

from lib import guards

PREFILL_TOKENS = 4096  # prompt tokens in one forward pass


class Scheduler:
    """The rows of one call of lib.decode.generate.

    A prompt is prefilled without its last token, with which decoding begins. A finished sequence leaves at
    once, and its row goes to the next sample of the same prompt, whose keys are already there, or to the last
    active sequence.

    If the cache runs out of memory, the last sequence is put back. Later it is prefilled again together with
    what it has produced, and continues with the same random numbers.
    """

    def __init__(self, prompts, slots, max_new_tokens, eos, shares_prefix=True):
        self.prompts = prompts
        self.slots = slots
        self.max_new_tokens = max_new_tokens
        self.eos = eos
        self.out = [[] for _ in prompts]
        self.logprobs = [[] for _ in prompts]
        first = {}  # equal prompts share the index of the first of them
        self.prompt_of = [first.setdefault(tuple(p), i) for i, p in enumerate(prompts)]
        # Longest first: neighbours are of similar length. Samples of one prompt stand side by side.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), self.prompt_of[i], i))
        self.waiting = deque(order)
        self.active = []  # active[row] = index of the prompt that sits in this row of the cache
        self.moved = False  # whether rows have changed since the device was last updated
        self.prefills = deque()  # (first row, tokens of each row, positions that these rows already hold)
        self.copies = []  # (row, rows, positions) to copy once the prefills are done
        self.prefix = 0  # the number of first tokens that all prompts share; they are computed once
        if prompts and shares_prefix:
            self.prefix = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
        if self.prefix:
            self.prefills.append((0, [prompts[0][: self.prefix]], 0))
            self.copies.append((0, slice(1, slots), self.prefix))

    def wants_refill(self):
        """Whether to fill free rows now. Several prompts share one prefill, so an eighth of the rows must be
        free."""
        free = self.slots - len(self.active)
        return self.waiting and not self.prefills and (not self.active or free >= max(1, self.slots // 8))

    def length(self, i):
        """The number of tokens of sequence i, prompt and response."""
        return len(self.prompts[i]) + len(self.out[i])

    def refill(self, cache):
        """Put waiting sequences into free rows, as many as the cache has room for, with one more block for
        each row to grow into.

        Sequences to be prefilled come first: those that were put back, and prompts that are in no row yet.
        Then come those that copy the row of their prompt."""
        start = len(self.active)
        room = cache.room() - start
        seated = {self.prompt_of[i] for i in self.active}
        fresh = []
        others = []
        while self.waiting and start + len(fresh) + len(others) < self.slots:
            i = self.waiting[0]
            room -= cache.blocks(self.length(i)) + 1
            if room < 0:
                break
            self.waiting.popleft()
            prompt = self.prompt_of[i]
            (others if prompt in seated and not self.out[i] else fresh).append(i)
            seated.add(prompt)
        fresh.sort(key=self.length, reverse=True)  # only sequences that were put back are out of order
        self.active += fresh
        row_of = {self.prompt_of[i]: row for row, i in enumerate(self.active)}
        targets = {}  # row of a prompt: rows of its other samples
        for i in others:
            targets.setdefault(row_of[self.prompt_of[i]], []).append(len(self.active))
            self.active.append(i)
        for row in range(start, len(self.active)):
            cache.hold(row, self.length(self.active[row]))
        for row, rows in targets.items():
            self.copies.append((row, rows, len(self.prompts[self.active[row]]) - 1))
        self.group(fresh, start)
        self.moved |= len(self.active) > start

    def make_room(self, cache, ahead):
        """Hold memory for `ahead` more tokens of each active sequence. If it does not suffice, the last
        sequences are put back."""
        row = 0
        while row < len(self.active):
            if cache.hold(row, self.length(self.active[row]) + ahead - 1):
                row += 1
            else:
                last = len(self.active) - 1
                self.waiting.appendleft(self.active.pop())
                cache.cut(last, 0)
                self.moved = True

    def group(self, fresh, start):
        """Add prefills of the prompts `fresh`, for the rows from `start` on.

        A group is prefilled at once; its prompts are of similar length, so that little is padding."""
        lengths = [self.length(i) - 1 - self.prefix for i in fresh]
        first = 0
        for j in range(1, len(fresh) + 1):
            full = j == len(fresh) or (j - first + 1) * lengths[first] > PREFILL_TOKENS
            if full or lengths[j] < 0.9 * lengths[first]:
                if lengths[first]:
                    parts = [(self.prompts[i] + self.out[i])[self.prefix : -1] for i in fresh[first:j]]
                    self.prefills.append((start + first, parts, self.prefix))
                first = j

    def ends(self):
        """The number of tokens of each active sequence, prompt and response."""
        return [self.length(i) for i in self.active]

    def ahead(self, look):
        """The number of steps until the host reads the new tokens.

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

    def is_fresh_sample_of(self, follower, i):
        """Whether a waiting sequence has the prompt of sequence i and nothing beyond it."""
        if follower is None or self.out[follower]:
            return False
        return self.prompt_of[follower] == self.prompt_of[i]

    def leave(self, cache):
        """Free the rows of finished sequences; returns how many there were."""
        finished = [row for row, i in enumerate(self.active)
                    if self.out[i][-1] in self.eos or len(self.out[i]) == self.max_new_tokens]
        for row in reversed(finished):
            i = self.active[row]
            follower = self.waiting[0] if self.waiting else None
            if self.is_fresh_sample_of(follower, i):
                self.active[row] = self.waiting.popleft()  # the row holds the prompt's keys already
                cache.cut(row, len(self.prompts[i]))
                continue
            last = self.active.pop()
            if row < len(self.active):
                cache.move(len(self.active), row, self.length(last))
                self.active[row] = last
            else:
                cache.cut(row, 0)
        self.moved |= bool(finished)
        return len(finished)
