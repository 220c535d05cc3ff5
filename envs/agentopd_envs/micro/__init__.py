"""Three endless, tiny worlds: sums to work out, one-line programs to fix, a stock table to keep right.

Small enough for a model of a million parameters to learn on a CPU in minutes, and judged by the same verifiers and the
same sandbox as real tasks. Each module offers ``tasks(split, limit, seed)`` and ``wrong_turns(task)``.
"""
