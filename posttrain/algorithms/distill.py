"""On-policy distillation (arXiv 2306.13649, 2306.08543): the reverse KL to a teacher on the student's own answers.

The advantage of a token is log p(teacher) - log p(student), so its expected gradient is that of -KL(student || teacher) at the prefix that
the student wrote. It needs a teacher with the same vocabulary, and no reward.

Example:
    >>> DISTILL.advantage, DISTILL.needs_teacher, DISTILL.kl
    ('teacher', True, 'none')
"""

from dataclasses import replace

from posttrain.algorithms.grpo import GRPO

DISTILL = replace(
    GRPO,
    name="distill",
    paper="2306.13649",
    advantage="teacher",
    aggregate="token_mean",
    kl="none",
    kl_coefficient=0.0,
)
