"""eaptk beside its peers: the same weights, tokens and loss, a process each, in one run.

    python -m benchmarks.peers [--quick] [--peers …] [--shapes …]

One sample of random tokens, its loss the mean over all next tokens, on random weights that eaptk's side saved. Every
peer has an environment of its own in build/peers/, made from the pinned requirements here and kept between runs. Its
scores, and eaptk's own, are first held against eaptk's in float64, in the form the peer computes; where either are not
the same, nothing is timed. Then it, eaptk in that form and the bare forward and backward pass take turns. A peer that
cannot be installed or fails is reported with its error.

The record, benchmarks/results/peers.json, beside `record.environment`:

    complete        whether the run came to its end
    settings        quick, peers (those asked for), tokens, threads, seconds that the repetitions of one comparison
                    were given, gigabytes
    environments    by name: packages (version by name), install_seconds (0: was there), or error
    shapes          by name: the model's config, layers included
    comparisons     one a shape and peer:
        peer, what, shape, layers, form (granularity, qkv, ablation, gradient_on)
        error       null, or in one line what went wrong; the parts below that came before are there
        check       errors: relative Frobenius distance to float64 of float32 scores, over all edges and over those into
                    each kind of destination; eaptk: the same of eaptk's own; share: of eaptk's edges that the peer
                    has, hence that were compared; limit; passed: both are within it
        seconds     of one sample; each: by contender ("peer", "eaptk", "bare"), in order of rounds; median: of these;
                    ratio: of seconds within rounds; each, their median, and its interval (`benchmarks.timing`)
        memory      tokens: twice the sample's, then the sample's; bytes: by contender, at most resident above the
                    loaded model at each (from VmHWM, of a second run, in processes whose allocator gives back what is
                    freed); "eaptk, least memory" contracts a layer at a time and runs layers again
        largest     by contender, tokens that fit in settings.gigabytes above the loaded model, on the straight line
                    through its two measured peaks, which is too many of all; null where it hardly grew
        accuracy    by "peer" and "eaptk", by dtype: relative distance to float64, or the error that dtype raises; in
                    float32 that of the check, in half precision of `comparison.ACCURACY_TOKENS`
        took        seconds that the comparison took

A figure may be drawn of a comparison whose error is null and whose check passed.
"""
