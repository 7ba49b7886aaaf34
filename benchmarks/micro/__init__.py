"""Single pieces, by pytest-benchmark.

    python -m benchmarks.micro [--quick]

What a piece returns is checked after it was timed, as far as no other benchmark does: if one is wrong nothing is
recorded. The record, benchmarks/results/micro.json, beside `record.environment`: quick; threads; pieces, by name: what
(in a line), seconds (summary of `benchmarks.timing`, of at most 99 rounds) and rounds.
"""
