"""GRPO over logged preferences: no reward model, no sampling. A pair (or ranked list) is a group, `old` stays the reference.

With scores A = s - mean(s), without A = +1/2 and -1/2. The clip on the negative side keeps it from diverging on off-policy text.
"""

from posttrain.algorithms.specs import LoggedGroups

GRPO_PAIRS = LoggedGroups(name="grpo_pairs", paper="2402.03300")
