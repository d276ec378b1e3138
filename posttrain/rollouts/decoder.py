"""A causal language model as a decoder of slots: prompts enter, and each step returns next-token logits of all active answers.

Example:
    Two steps of three answers agree with a plain forward pass:

    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> decoder = decoder_of(model, bf16=False)
    >>> decoder.shared
    True
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from posttrain.data.transfer import together
from posttrain.models.reach import PLAIN_LENGTH, find_reach, probe_ids
from posttrain.rollouts.shared import NAME
from posttrain.rollouts.slots import Pair, Slots
from posttrain.text import reason_of

PREFILL_TOKENS = 2**14
"""Most prompt tokens of one forward pass."""
PROBE_PROMPTS, PROBE_ANSWERS = ((3, 4, 5), (6,)), ((7, 8, 9), (4, 3, 5), (5, 6, 7))
"""Two answers to the first prompt, one to the second."""


class Decoder:
    """Prefill and single decoding steps.

    Args:
        shared: use `shared_attention`; otherwise the model's own attention over padded copies.
    """

    def __init__(self, lm: PreTrainedModel, shared: bool, bf16: bool = False, reach: int | None = None) -> None:
        self.lm, self.shared, self.bf16, self.reach = lm, shared, bf16, reach
        self.head = lm.get_output_embeddings()
        self.takes_positions = "position_ids" in inspect.signature(lm.base_model.forward).parameters
        self.casts: dict[nn.Module, dict[str, Tensor]] = {}
        self._token_bytes = 0

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Set evaluation mode without gradient. With bf16 cast the matrices once: autocast casts frozen ones in every step."""
        training, attention = self.lm.training, self.lm.config._attn_implementation
        self.lm.eval()
        if self.shared:
            self.lm.config._attn_implementation = NAME
        if self.bf16:
            self.casts = {module: _matrices(module) for module in (self.lm.base_model, self.head)}
        try:
            with torch.no_grad(), torch.autocast(self.lm.device.type, torch.bfloat16, enabled=self.bf16):
                yield
        finally:
            self.casts = {}
            self.lm.config._attn_implementation = attention
            self.lm.train(training)

    def slots(self, capacity: int) -> Slots:
        """Return empty slots for answers of at most `capacity` tokens."""
        return Slots(self.lm.config.get_text_config().num_hidden_layers, capacity, self.lm.device, self.shared)

    def token_bytes(self) -> int:
        """Return the bytes of one token's keys and values over all layers, found by computing a prompt of one token."""
        if not self._token_bytes:
            slots = self.slots(1)
            self.enter(slots, [(0,)], [1])
            self._token_bytes = sum(states.nbytes for layer in slots.layers for states in layer.answers)
        return self._token_bytes

    def enter(self, slots: Slots, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> Tensor:
        """Compute each prompt once and give its `counts` answers slots. Return their last hidden states [answers, hidden]."""
        lengths = [len(prompt) for prompt in prompts]
        at_once = max(1, PREFILL_TOKENS // max(lengths))
        computed = [self._prefill(prompts[i : i + at_once]) for i in range(0, len(prompts), at_once)]
        slots.enter(list(zip(*(pairs for _, pairs in computed), strict=True)), lengths, counts)
        hidden = torch.cat([last for last, _ in computed])
        # indices that the host makes: repeating by lengths would make a GPU wait for their sum
        (groups,) = together([torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))], hidden.device)
        return hidden.index_select(0, groups)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Pair]]:
        """Compute prompts. Padding follows every real token, so causal attention never sees it and no mask is needed."""
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        cache: Any = DynamicCache()
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
        ids, rows, last = together([ids, torch.arange(len(prompts)), ends], self.lm.device)
        hidden = self._trunk(input_ids=ids, past_key_values=cache)
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        return hidden[rows, last], pairs

    def step(self, slots: Slots, tokens: Tensor) -> Tensor:
        """Append `tokens` [answers, 1] to the answers; return hidden states [answers, hidden]."""
        slots.prepare()
        inputs: dict[str, Any] = {"input_ids": tokens, "past_key_values": slots.cache}
        if self.takes_positions:
            inputs["position_ids"] = (slots.row_lengths + slots.row_ages)[:, None]
        if self.shared:
            # transformers passes a mask of four dimensions through unchanged
            inputs |= {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device), "slots": slots}
        else:
            inputs["attention_mask"] = slots.mask().long()
        hidden = self._trunk(**inputs)
        slots.grow()
        return hidden[:, -1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [answers, vocabulary]."""
        logits: Tensor = self._call(self.head, hidden)
        return logits

    def _trunk(self, **inputs: Any) -> Tensor:
        hidden: Tensor = self._call(self.lm.base_model, use_cache=True, **inputs).last_hidden_state
        return hidden

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        casts = self.casts.get(module)
        return module(*args, **kwargs) if casts is None else functional_call(module, casts, args, kwargs)

    def agrees(self, length: int) -> bool:
        """Return True if the last steps of rows of `length` tokens give the logits of a plain forward pass."""
        ids = probe_ids(length, self.lm.config.get_text_config().vocab_size)
        prompt = ids[: max(1, length - len(PROBE_ANSWERS[0]) + 1)]
        try:
            self.check((prompt, prompt[: len(prompt) // 2 + 1]))
        except ValueError:
            return False
        return True

    def check(self, of_prompts: Sequence[Sequence[int]] = PROBE_PROMPTS) -> None:
        """Raise ValueError unless two steps of three answers give the logits of a plain forward pass."""
        vocabulary = self.lm.config.get_text_config().vocab_size
        slots, forced = (
            self.slots(len(PROBE_ANSWERS[0])),
            torch.tensor(PROBE_ANSWERS, device=self.lm.device) % vocabulary,
        )
        prompts = [tuple(token % vocabulary for token in prompt) for prompt in of_prompts]
        hidden = [self.enter(slots, prompts, (2, 1))]
        hidden += [self.step(slots, forced[:, i : i + 1]) for i in range(forced.shape[1] - 1)]
        found = torch.stack([self.logits(h) for h in hidden], 1)
        for prompt, answer, logits in zip((prompts[0], *prompts), forced, found, strict=True):
            row = torch.cat([torch.tensor(prompt, device=answer.device), answer[:-1]])[None]
            plain = self.lm(input_ids=row).logits[0, len(prompt) - 1 :]
            tolerance = max(1e-4, 4 * torch.finfo(plain.dtype).eps) * float(plain.abs().max())
            if torch.allclose(logits, plain, atol=tolerance, rtol=0, equal_nan=True):
                continue
            beyond = (logits - plain).abs().amax(-1) - (tolerance + self._rounding(row)[len(prompt) - 1 :])
            if not bool((beyond <= 0).all()):
                worst = float((logits - plain).abs().max())
                raise ValueError(f"logits by slots differ from those of a plain forward pass by {worst:.2g}")

    def _rounding(self, row: Tensor) -> Tensor:
        """Return how much rounding may change each token's logits, [tokens]: ten times the effect of the smallest change of the embeddings.

        Some trained models amplify rounding at single tokens by a factor of thousands, where an attention sink forms.
        """
        embeddings = self.lm.get_input_embeddings()
        plain = self.lm(input_ids=row).logits[0]
        effect = torch.zeros(plain.shape[0], device=plain.device)
        for seed in range(4):
            generator = torch.Generator(plain.device).manual_seed(seed)

            def nudged(module: nn.Module, given: Any, output: Tensor, generator: torch.Generator = generator) -> Tensor:
                signs = torch.randint(0, 2, output.shape, generator=generator, device=output.device) * 2 - 1
                return output * (1 + 8 * torch.finfo(output.dtype).eps * signs)

            handle = embeddings.register_forward_hook(nudged)
            try:
                changed = self.lm(input_ids=row).logits[0]
            finally:
                handle.remove()
            effect = torch.maximum(effect, (changed - plain).abs().amax(-1))
        return 10 * effect


def decoder_of(lm: PreTrainedModel, bf16: bool) -> Decoder | str:
    """Return the fastest decoder that agrees with the model's own forward pass, or the reason why there is none."""
    if getattr(lm, "_is_stateful", False):
        return "it has a recurrent state instead of keys and values"
    reason = ""
    for shared in (True, False):
        if shared and not lm._can_set_attn_implementation():
            continue
        probe = Decoder(lm, shared)
        try:
            with probe.decoding():
                probe.check()
                reach = find_reach(lm.config, probe.agrees)
        except torch.OutOfMemoryError:
            raise
        # an unusual model may raise anything; the reason is reported, and `generate` raises again if it is not about the cache
        except Exception as error:
            reason = reason_of(error)
        else:
            if reach == 0:
                reason = f"its cache gives other logits in a row of {PLAIN_LENGTH} tokens"
                continue
            return Decoder(lm, shared, bf16, reach)
    return reason


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that autocast would cast to bfloat16: float32 parameters of two or more dimensions, except embeddings."""
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    return {
        name: parameter.to(torch.bfloat16)
        for name, parameter in module.named_parameters()
        if parameter.dim() >= 2 and parameter.dtype == torch.float32 and id(parameter) not in embeddings
    }
