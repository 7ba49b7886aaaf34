"""eaptk beside the least that its work can take.

    python -m benchmarks.floor [--quick] [--minutes M] [--only WORD …] [--parts PART …]

On a machine with a card everything runs there, mostly in bfloat16 and at full depth; else on the CPU, mostly in float32
and with shallower models. Of each case scores are first held against those of the same weights in float64, and what is
to be timed against the same in other ways (`passes.gate`); nothing is timed where they are not right. On a CPU the
contenders are processes that do one pass each round, all within the same seconds (`benchmarks.turns.in_slices`); on a
card they take turns in one process (`benchmarks.timing`). *Summaries* below are each measurement, in order of rounds,
their median and its interval.

The record, benchmarks/results/floor.json, beside `record.environment`:

    complete    whether the run came to its end
    settings    quick, device (its name), threads, minutes; only, parts: what was asked for
    cases       one a batch and model:
        name, and what `shapes.Case` has
        error               in one line, where the case could not be run; nothing else is there then
        gate                errors, by level: relative distance to float64 scores; alone_errors: of the first sample's
                            row to that of the sample alone, unless that is the batch; limit of both;
                            contraction_errors, contraction_limit: of the contraction alone, same operands; passed. If
                            not, nothing follows
        bare                seconds (summary); bytes: of tensors alive at one time, above the model
        block, head         seconds, ratio to bare in the same round (summaries); target: most that the ratio is to be,
                            null under 256 tokens
            flop_ratio, flop_ratio_full_depth: if all FLOPs took the same time; of the model as measured, as published
            bytes_above_bare
            contraction     seconds (summary); of: "copy" or "product", best: bytes or FLOPs a second of it, share of
                            that (summary): of moving all operands once, or of the FLOPs of real edges and expansion
            profile         where the median is over the target: operators, by seconds spent above the bare pass, and
                            calls
    yardstick   ratio of a bare pass written by hand to the one here (summary), and the case
    storing     bytes; seconds of "store" and "sequential", their ratio (summaries); gate
    sweeping    of `benchmarks.sweep`; gate
    starting    seconds (summary) by what a new process does

A figure may be drawn of what has a gate only where it passed.
"""
