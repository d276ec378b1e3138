"""KTO (arXiv 2402.01306): learn from single answers with thumbs up or down, by the value that prospect theory gives them.

An answer's log-ratio to the reference is compared with a common point of reference, the KL of the batch. The loss saturates on both
sides, so outliers and wrong labels pull little.

Example:
    >>> KTO.beta, KTO.desirable_weight, KTO.needs_reference
    (0.1, 1.0, True)
"""

from posttrain.algorithms.specs import Unpaired

KTO = Unpaired(name="kto", paper="2402.01306")
