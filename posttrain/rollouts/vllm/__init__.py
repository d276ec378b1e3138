"""Sample with vLLM servers, whose weights are updated with the policy's and verified after every update."""

from posttrain.rollouts.vllm.engine import VllmEngine

__all__ = ["VllmEngine"]
