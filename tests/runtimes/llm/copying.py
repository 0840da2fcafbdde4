"""Engines without a network whose answers copy from the text before, as those do for which drafts are made."""

from tests.runtimes.llm.test_scheduler import CountingEngine

PERIOD = 7


def copied(tokens):
    """Return the token that comes next: in most places the one a period before."""
    surprise = hash(tuple(tokens)) % 300
    return tokens[-PERIOD] if len(tokens) >= PERIOD and surprise % 8 else surprise


def alone(prompt, most):
    """Return the answer of a request that has an engine to itself, and no drafts."""
    tokens = list(prompt)
    for _ in range(most):
        tokens.append(copied(tokens))
    return tokens[len(prompt) :]


class CopyingEngine(CountingEngine):
    next_token = staticmethod(copied)


class ForgetfulEngine(CopyingEngine):
    """Keeps fewer tokens than asked for, as an engine does whose cache stores full blocks in another format."""

    def truncate(self, sequence, length):
        return super().truncate(sequence, length - length % 48 if length % 3 else length)


class KeepingEngine(CopyingEngine):
    """Is broken: takes no token back, and says that it has."""

    def truncate(self, sequence, length):
        return length
