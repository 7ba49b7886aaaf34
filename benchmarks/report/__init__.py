"""Records turned into docs/benchmarks.md with its figures, and the README's figure and table.

    python -m benchmarks.report [--quick]

Reads floor.json, peers.json, micro.json and cost_model.json in benchmarks/results/, and computes nothing but medians
and extremes of what is there. What has no record says by which command it is made; what was not right or could not be
run is shown with its reason, and no figure is drawn of it. With --quick, records of quick runs become
build/bench/benchmarks.md, and the README is left alone.
"""
