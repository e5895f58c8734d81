"""Exit codes of every command."""

HOLDS = 0
FINDING = 1
INCONCLUSIVE = 2
NOTHING_DONE = 3
BAD_ARGUMENTS = 4
