"""Rewards for `rlsp.py ppo --reward data/hacking.py:NAME`: more words pay, with and without the project's guards.

    unguarded   every word counts: saying a line again pays as well as another idea
    guarded     what stands before the last box counts, each repeated line and 8-word sequence once
"""
import rewards


def unguarded(response, problem):
    return blend(response, problem, response)


def guarded(response, problem):
    return blend(response, problem, rewards.reasoning_of(response))


def blend(response, problem, paid):
    return 0.5 * rewards.verify(response, problem["answer"]) + 0.5 * min(1.0, len(paid.split()) / 300)
