"""Verifiers: each reads a finished episode and returns a verdict with its evidence.

- ``math``: two-stage answer equivalence (a strict normaliser, then a killable symbolic worker);
- ``code``: hidden cases in a sandbox, values compared outside it, a gated penalty on the size of the patch;
- ``state``: the difference between the environment's final and goal states, with a frame condition;
- ``calls``: recorded tool calls against a list of accepted calls.
"""
