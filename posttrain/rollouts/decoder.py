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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from posttrain.data.transfer import together
from posttrain.models.reach import PLAIN_LENGTH, SMALL_WINDOW, find_reach, probe_ids, shrunk
from posttrain.models.refusals import ends
from posttrain.models.shards import InFloat32, gathers_bf16, in_step, is_sharded, is_tensor_parallel
from posttrain.rollouts.budget import prefill_tokens
from posttrain.rollouts.kept import KeptStates, closed_up, side_by_side
from posttrain.rollouts.plain_step import PlainStep, plain_step
from posttrain.rollouts.shared import NAME
from posttrain.rollouts.slots import Pair, PromptLayer, Slots, StateKind
from posttrain.rollouts.steps import RECORDERS, StepRunner
from posttrain.text import reason_of

PROBE_PROMPTS, PROBE_ANSWERS = ((3, 4, 5), (6,)), ((7, 8, 9), (4, 3, 5), (5, 6, 7))
"""Two answers to the first prompt, one to the second."""


class Decoder:
    """Prefill and single decoding steps.

    Args:
        shared: use `shared_attention`; otherwise the model's own attention over padded copies.
        plain: layers of the plain family, which compute a step in place of the model's own.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        shared: bool,
        bf16: bool = False,
        reach: int | None = None,
        windowed: bool = False,
        plain: PlainStep | None = None,
    ) -> None:
        self.lm, self.shared, self.bf16, self.reach, self.plain = lm, shared, bf16, reach, plain
        self.windowed = windowed
        """True if a layer has asked for a window."""
        self.head = lm.get_output_embeddings()
        self.takes_positions = "position_ids" in inspect.signature(lm.base_model.forward).parameters
        self.casts: dict[nn.Module, dict[str, Tensor]] = {}
        self.prefilled_tokens = 0
        """Tokens of prompts that have been computed."""
        self.kinds: list[StateKind | None] = []
        """Of every layer's keys and values, once a prompt has been computed."""
        self._token_bytes = 0
        self._continues: bool | None = None
        self._before_pass: Callable[[], None] = _nothing
        recordable = shared and self.takes_positions and not (is_sharded(lm) or is_tensor_parallel(lm))
        self.runner = StepRunner(RECORDERS.get(lm.device.type) if recordable else None)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Compute as many passes inside the block as every other process, if each pass gathers split weights."""
        idle = torch.zeros(1, 1, dtype=torch.long, device=self.lm.device)
        with in_step(self.lm, lambda: self._call(self.lm.base_model, input_ids=idle, use_cache=False)) as before_pass:
            self._before_pass = before_pass
            try:
                yield
            finally:
                self._before_pass = _nothing

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Set evaluation mode without gradient. With bf16 cast the matrices once: autocast casts frozen ones in every step."""
        training, attention = self.lm.training, self.lm.config._attn_implementation
        self.lm.eval()
        if self.shared:
            self.lm.config._attn_implementation = NAME
        if self.bf16 and not is_sharded(self.lm):
            # pyrefly: ignore[bad-argument-type, bad-assignment]
            self.casts = {module: _matrices(module) for module in (self.lm.base_model, self.head)}
        if self.plain is not None and not (self.plain.is_current() and not (self.bf16 and self.plain.has_adapters())):
            self.plain = None
        # autocast's cache would keep each gathered layer
        cache = not is_sharded(self.lm)
        try:
            with torch.no_grad(), torch.autocast(self.lm.device.type, torch.bfloat16, self.bf16, cache):
                yield
        finally:
            self.casts = {}
            self.lm.config._attn_implementation = attention
            self.lm.train(training)

    def slots(self, capacity: int) -> Slots:
        """Return empty slots for answers of at most `capacity` tokens."""
        layers, fixed = self.lm.config.get_text_config().num_hidden_layers, self.runner.record is not None
        return Slots(layers, capacity, self.lm.device, self.shared, fixed, self.kinds)

    def token_bytes(self) -> int:
        """Return the bytes of one token's keys and values over all layers, found by computing a prompt of one token."""
        if not self._token_bytes:
            slots = self.slots(1)
            self.enter(slots, [(0,)], [1])
            self._token_bytes = sum(states.nbytes for layer in slots.layers for states in layer.answers)
        return self._token_bytes

    def enter(
        self, slots: Slots, prompts: Sequence[tuple[int, ...]], counts: Sequence[int], kept: KeptStates | None = None
    ) -> Tensor:
        """Compute each prompt once and give its `counts` answers slots. Return their last hidden states [answers, hidden].

        Args:
            kept: states of the beginnings of some prompts, which are not computed again.
        """
        lengths, hidden = [len(prompt) for prompt in prompts], list[Tensor]()
        at_once = max(1, prefill_tokens(self.lm.device.type) // max(lengths))
        start = 0
        with slots.entering(lengths, counts):
            for continued, same in groupby(prompts, lambda prompt: kept is not None and kept.holds(prompt)):
                run = list(same)
                for part in (run[i : i + at_once] for i in range(0, len(run), at_once)):
                    known = [kept.take(prompt) for prompt in part] if kept is not None and continued else None
                    layers = [PromptLayer(layer, start) for layer in slots.layers]
                    hidden.append(self._prefill(part, layers) if known is None else self._continue(part, known, layers))
                    start += len(part)
        self.kinds = [layer.kind for layer in slots.layers]
        # indices that the host makes: repeating by lengths would make a GPU wait for their sum
        groups = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        last = torch.cat(hidden)
        (groups,) = together([groups], last.device)
        return last.index_select(0, groups)

    def _prefill(self, prompts: Sequence[Sequence[int]], layers: list[PromptLayer]) -> Tensor:
        """Compute prompts. Padding follows every real token, so causal attention never sees it and no mask is needed."""
        ids, ends = _padded(prompts)
        self.prefilled_tokens += sum(map(len, prompts))
        ids, rows, last = together([ids, torch.arange(len(prompts)), ends], self.lm.device)
        return self._trunk(input_ids=ids, past_key_values=Cache(layers=list(layers)))[rows, last]

    def _continue(
        self, prompts: Sequence[Sequence[int]], kept: Sequence[Pair], layers: Sequence[PromptLayer]
    ) -> Tensor:
        """Compute prompts from the end of their kept states, which are padded on the right; a mask hides that padding."""
        lengths = [keys.shape[2] for keys, _ in kept]
        new = [prompt[length:] for prompt, length in zip(prompts, lengths, strict=True)]
        ids, ends = _padded(new)
        self.prefilled_tokens += sum(map(len, new))
        longest, width = max(lengths), ids.shape[1]
        mask = torch.cat([torch.arange(longest) < torch.tensor(lengths)[:, None], torch.ones_like(ids).bool()], 1)
        given = [ids, torch.arange(len(prompts)), ends, torch.tensor(lengths), mask.long()]
        ids, rows, last, known, mask = together(given, self.lm.device)
        cache: Any = DynamicCache()
        for layer, (keys, values) in enumerate(side_by_side(kept)):
            cache.update(keys, values, layer)
        positions = known[:, None] + torch.arange(width, device=known.device)
        hidden = self._trunk(input_ids=ids, past_key_values=cache, position_ids=positions, attention_mask=mask)
        for computed, layer in zip(cache.layers, layers, strict=True):
            layer.update(*closed_up((computed.keys, computed.values), known, longest, width))
        return hidden[rows, last]

    def continues(self) -> bool:
        """Return True if prompts that continue kept states of different lengths give the logits of a plain forward pass."""
        if self._continues is None:
            probe = Decoder(self.lm, self.shared, plain=self.plain)
            try:
                with probe.decoding(), InFloat32() if gathers_bf16(self.lm) else nullcontext():
                    probe.check_continued()
                # in a window the padding between old and new columns would count
                self._continues = self.reach is None and not self.windowed
            # as for packed batches: a model of an unusual kind refuses, and its prompts are then computed whole
            except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
                if ends(error):
                    raise
                self._continues = False
        return self._continues

    def check_continued(self) -> None:
        """Raise ValueError unless the model gives the logits of a plain forward pass; raise TypeError if it takes no positions."""
        if not self.takes_positions:
            raise TypeError("it takes no positions")
        vocabulary = self.lm.config.get_text_config().vocab_size
        of_prompts = [tuple(i % vocabulary for i in (3, 4, 5, 6, 7, 8)), tuple(i % vocabulary for i in (9, 7, 2, 1))]
        kept, slots = KeptStates(2**10), self.slots(1)
        self.enter(slots, [prompt[:n] for prompt, n in zip(of_prompts, (5, 2), strict=True)], (1, 1))
        for row, (prompt, known) in enumerate(zip(of_prompts, (5, 2), strict=True)):
            kept.add_answer(slots, row, prompt[:known])
        kept.expect((prompt, known + 1) for prompt, known in zip(of_prompts, (5, 2), strict=True))
        found = self.slots(1)
        hidden = [self.enter(found, of_prompts, (1, 1), kept)]
        forced = torch.tensor([[6], [8]], device=self.lm.device) % vocabulary
        hidden.append(self.step(found, forced))
        for row, prompt in enumerate(of_prompts):
            ids = torch.tensor([[*prompt, int(forced[row])]], device=self.lm.device)
            self._compare(torch.stack([self.logits(h[row]) for h in hidden]), ids, len(prompt) - 1)

    def step(self, slots: Slots, tokens: Tensor) -> Tensor:
        """Append `tokens` [answers, 1] to the answers; return hidden states [answers, hidden]. The host counts them by itself."""
        slots.prepare()
        if self.plain is not None:
            positions = (slots.row_lengths + slots.row_ages)[:, None]
            hidden = self.plain(tokens, positions, slots, self.casts.get(self.lm.base_model, {}))
        else:
            hidden = self._own_step(slots, tokens)
        self.windowed |= bool(slots.windows)
        slots.grow()
        return hidden

    def _own_step(self, slots: Slots, tokens: Tensor) -> Tensor:
        """Return the hidden states by the model's own layers."""
        inputs: dict[str, Any] = {"input_ids": tokens, "past_key_values": slots.cache}
        if self.takes_positions:
            inputs["position_ids"] = (slots.row_lengths + slots.row_ages)[:, None]
        if self.shared:
            # transformers passes a mask of four dimensions through unchanged
            inputs |= {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device), "slots": slots}
        else:
            inputs["attention_mask"] = slots.mask().long()
        return self._trunk(**inputs)[:, -1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [answers, vocabulary]."""
        # pyrefly: ignore[bad-argument-type]
        logits: Tensor = self._call(self.head, hidden)
        return logits

    def _trunk(self, **inputs: Any) -> Tensor:
        self._before_pass()
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

    def agrees_in(self, window: int) -> bool:
        """Return True if rows longer than `window` agree, by a trial with a short one in its place that changes the model's logits."""
        ids = torch.tensor([probe_ids(4 * SMALL_WINDOW, self.lm.config.get_text_config().vocab_size)])
        ids = ids.to(self.lm.device)
        usual = self.lm(input_ids=ids).logits
        with shrunk(self.lm, window, SMALL_WINDOW):
            changed = not torch.allclose(self.lm(input_ids=ids).logits, usual, atol=1e-3 * float(usual.abs().max()))
            return changed and self.agrees(4 * SMALL_WINDOW)

    def check(self, of_prompts: Sequence[Sequence[int]] = PROBE_PROMPTS) -> None:
        """Raise ValueError unless two steps of three answers give the logits of a plain forward pass."""
        vocabulary = self.lm.config.get_text_config().vocab_size
        slots, forced = (
            self.slots(len(PROBE_ANSWERS[0])),
            torch.tensor(PROBE_ANSWERS, device=self.lm.device) % vocabulary,
        )
        prompts = [tuple(token % vocabulary for token in prompt) for prompt in of_prompts]
        hidden = [self.enter(slots, prompts, (2, 1))]
        for i in range(forced.shape[1] - 1):
            hidden.append(self.step(slots, forced[:, i : i + 1]))
            slots.count_token()
        found = torch.stack([self.logits(h) for h in hidden], 1)
        for prompt, answer, logits in zip((prompts[0], *prompts), forced, found, strict=True):
            row = torch.cat([torch.tensor(prompt, device=answer.device), answer[:-1]])[None]
            self._compare(logits, row, len(prompt) - 1)

    def _compare(self, logits: Tensor, row: Tensor, start: int) -> None:
        """Raise ValueError if `logits` are not those of a plain pass over `row` from index `start` on, but for rounding."""
        plain = self.lm(input_ids=row).logits[0, start:]
        tolerance = max(1e-4, 4 * torch.finfo(plain.dtype).eps) * float(plain.abs().max())
        if torch.allclose(logits, plain, atol=tolerance, rtol=0, equal_nan=True):
            return
        beyond = (logits - plain).abs().amax(-1) - (tolerance + self._rounding(row)[start:])
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
    plain = plain_step(lm)
    ways = [(True, plain)] if plain is not None else []
    for shared, own in (*ways, (True, None), (False, None)):
        if shared and not lm._can_set_attn_implementation():
            continue
        probe = Decoder(lm, shared, plain=own)
        try:
            with probe.decoding(), InFloat32() if gathers_bf16(lm) else nullcontext():
                probe.check()
                reach = find_reach(lm.config, probe.agrees, probe.agrees_in)
        # an unusual model may raise anything; the reason is reported, and `generate` raises again if it is not about the cache
        except Exception as error:
            if ends(error):
                raise
            reason = reason_of(error)
        else:
            if reach == 0:
                reason = f"its cache gives other logits in a row of {PLAIN_LENGTH} tokens"
                continue
            found = Decoder(lm, shared, bf16 or gathers_bf16(lm), reach, probe.windowed, own)
            found.kinds = probe.kinds
            return found
    return reason


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ids [rows, longest] with zeros on the right, and the index of each row's last id."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, own in zip(ids, rows, strict=True):
        row[: len(own)] = torch.tensor(own)
    return ids, torch.tensor([len(own) - 1 for own in rows])


def _nothing() -> None:
    """Do nothing before a pass: no other process waits for it."""


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that autocast would cast to bfloat16: float32 parameters of two or more dimensions, except embeddings."""
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    return {
        name: parameter.to(torch.bfloat16)
        for name, parameter in module.named_parameters()
        if parameter.dim() >= 2 and parameter.dtype == torch.float32 and id(parameter) not in embeddings
    }
