"""Faults, hostile input, long audio and vanishing clients against real servers: `script/soak`, `script/soak --ci`.

Every scenario is a coroutine `(size, rng, tally) -> line`: it drives servers of its own, counts into the tally, puts
there what must not have happened, and returns the line to print.
"""
