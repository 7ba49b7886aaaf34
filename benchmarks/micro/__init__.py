"""Single pieces, by pytest-benchmark.

    python -m benchmarks.micro [--quick]

Each checks what it computed before its time counts for anything: if one is wrong nothing is recorded. The record,
benchmarks/results/micro.json, beside `record.environment`: quick; pieces, by name: what (in a line), seconds (summary
of `benchmarks.timing`, of at most 99 rounds) and rounds.
"""
