"""DPO and its family: one loss over pairs with different links, targets and weights.

dpo (2305.18290) · dpo_soft: targets from graded scores (2502.00203) · robust (2403.00409) · ipo (2310.12036) ·
hinge (2305.10425) · simpo (2405.14734) · orpo: imitation of the chosen answer plus the log-odds of the pair (2403.07691)

Example:
    >>> DPO.beta, IPO.link, SIMPO.needs_reference
    (0.1, 'square', False)
"""

from dataclasses import replace

from posttrain.algorithms.specs import Preference

DPO = Preference(name="dpo", paper="2305.18290", beta=0.1)
DPO_SOFT = replace(DPO, name="dpo_soft", paper="2502.00203", score_weighting="soft")
ROBUST = replace(DPO, name="robust", paper="2403.00409", label_smoothing=0.1, robust=True)
IPO = replace(DPO, name="ipo", paper="2310.12036", logit="mean", link="square")
HINGE = replace(DPO, name="hinge", paper="2305.10425", link="hinge")
SIMPO = replace(DPO, name="simpo", paper="2405.14734", beta=2.0, logit="mean", reference=False, target_margin=0.5)
ORPO = Preference(
    name="orpo",
    paper="2403.07691",
    beta=1.0,
    logit="odds",
    reference=False,
    nll_coefficient=1.0,
    pair_coefficient=0.1,
)
