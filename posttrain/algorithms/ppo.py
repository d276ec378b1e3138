"""PPO with a critic (arXiv 1707.06347, for language models 2203.02155).

Per-token KL to the reference is part of the reward, advantages come from GAE and are whitened, and the value loss is clipped.

Example:
    >>> PPO.has_critic, PPO.lam, PPO.epochs
    (True, 0.95, 4)
"""

from posttrain.algorithms.specs import OnPolicy

PPO = OnPolicy(
    name="ppo",
    paper="1707.06347",
    advantage="gae",
    aggregate="token_mean",
    kl="reward",
    kl_estimator="k1",
    kl_coefficient=0.05,
    missing_eos_penalty=1.0,
    gamma=1.0,
    lam=0.95,
    whiten=True,
    epochs=4,
    minibatches=1,
)
