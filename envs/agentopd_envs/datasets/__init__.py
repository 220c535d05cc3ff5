"""Public benchmarks as task sources, read from the folder that ``AGENTOPD_DATA`` names.

A benchmark is a fixed set of rows, so every split holds all of them, in an order shuffled by the seed and cut to the
limit; ``Task.split`` says which split was asked for. Do not train on a source and report it as held out: keep a
benchmark for evaluation, or train on one and evaluate on another.
"""
