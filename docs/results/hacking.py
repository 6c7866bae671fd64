"""Rewards for `rlsp.py ppo --reward docs/results/hacking.py:NAME`: nothing but words pays, with and without the project's guards.

    unguarded   every word counts: saying a line again pays as well as another idea
    guarded     what stands before the last box counts, each repeated line and 8-word sequence once
"""
import rewards


def unguarded(response, problem):
    return min(1.0, len(response.split()) / 300)


def guarded(response, problem):
    return min(1.0, len(rewards.reasoning_of(response).split()) / 300)
