"""How far a sharded step may be from the whole one, and why."""

# Relative to the largest change that any element of the tensor has seen. Where R, or a norm, is a sum over processes, float32
# adds the same numbers in another order: a few last places (6e-8 each) of s. Found: at most 4e-7 after five steps.
SHARDED = 3e-6

# Of each number itself: what is added to a float32 weight is rounded at the weight's last place, once in every step.
LAST_PLACES = 4e-7

# Only what needs no sum in float32 over processes: each process does with its channels what one process does with them.
EXACT = 0.0
