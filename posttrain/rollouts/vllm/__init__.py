"""Sampling by vLLM servers, whose weights follow the policy's and are proven to after every update."""

from posttrain.rollouts.vllm.engine import VllmEngine

__all__ = ["VllmEngine"]
