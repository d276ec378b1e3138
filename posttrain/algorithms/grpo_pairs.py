"""GRPO over logged preferences, without reward model or sampling. A pair (or ranked list) is a group, and `old` is the reference.

With scores A = s - mean(s), without scores A = +1/2 and -1/2. Scores whose mean |A| is above
1/2, such as grades from 1 to 10, are divided by one number so that it is 1/2. The clip
on the negative side prevents divergence on off-policy text.

Example:
    >>> GRPO_PAIRS.ratio, GRPO_PAIRS.clip_low
    ('sequence', 0.2)
"""

from posttrain.algorithms.specs import LoggedGroups

GRPO_PAIRS = LoggedGroups(name="grpo_pairs", paper="2402.03300")
