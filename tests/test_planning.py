"""The plan's numbers against sums by hand, against the tensors that autograd saves, and against the steps' own log lines."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig

from pipelines.commands.forecast import rows_by_table, seconds_by_stage, time_line, too_long_warmups
from pipelines.commands.plan import main, page, phases
from pipelines.config.params import Params, load_params, parse_params
from pipelines.config.yaml_files import read_yaml
from pipelines.runtime.journal import Journal
from pipelines.runtime.param_tracking import declared_values
from posttrain.data.batches import collate
from posttrain.data.tokens import Tokens
from posttrain.errors import ConfigError
from posttrain.models.policy import Policy
from posttrain.models.tiny import TinyShape, tiny_config, tiny_model
from posttrain.planning import RUNTIME_BYTES, Memory, Sizes, sampling, server_share, sizes, training
from tests.reliability.workspace import OVERLAY

SIZES = Sizes(parameters=1000, hidden=8, layers=2, query_width=8, key_width=4, intermediate=16, vocabulary=50)


def test_bytes_by_hand() -> None:
    layer = 4 * 16 + 4 * 4 + 4 * 8 + 8 * 8
    assert SIZES.activations_per_token == 4 * (2 * layer + (2 * 8 + 8) + 4 * 8) == 1632
    fused = 4 * 16 + 3 * 4 + 4 * 8 + 5 * 8
    assert SIZES.fused_per_token == 4 * (2 * fused + 5 * 8 + 8) == 1376
    joined = 3 * 16 + 2 * 4 + 2 * 8 + 3 * 8
    assert SIZES.joined_per_token == 4 * (2 * joined + 2 * 16 + 2 * 8)
    assert replace(SIZES, head_norms=True).joined_per_token == SIZES.joined_per_token + 4 * 2 * (8 + 4)
    assert SIZES.cache_per_token == 4 * 2 * 2 * 4
    lean = replace(SIZES, fused=True)
    assert training(lean, 100).activations == 100 * 1376
    assert training(lean, 100, device="cuda").activations == 100 * 1632
    least = replace(lean, joined=True)
    assert training(least, 100).activations == 100 * SIZES.joined_per_token < 100 * 1376
    assert training(least, 100, adapter=30).activations == training(least, 100).activations
    # layers on a base of 4 bits keep their own code
    assert training(least, 100, adapter=30, quantised=40).activations == 100 * 1376
    held = training(SIZES, 100, trained=2, frozen=1)
    assert (held.weights, held.optimiser) == (4 * 1000 * 3, 3 * 4 * 1000 * 2)
    assert (held.activations, held.logits) == (100 * 1632 * 2, 2 * 4 * 100 * 50)
    assert training(SIZES, 100, bf16=True).activations == 75 * 1632
    asked = sampling(SIZES, 10, 2, 30, trained=1)
    assert (asked.weights, asked.optimiser) == (4 * 1000 * 2, 2 * 4 * 1000)
    assert (asked.cache, asked.logits) == (10 * 32 * 64, 10 * 50 * 16)
    assert asked.total == 8000 + 8000 + 20480 + 8000
    # computing longer prompts needs more than logits: embeddings, the layer's input and the sum with attention, the input of the MLP,
    # and three tensors in it, for each token
    asked = sampling(SIZES, 10, 20, 10, trained=1)
    assert (asked.cache, asked.activations, asked.logits) == (10 * 30 * 64, 200 * 4 * (3 * 8 + 8 + 3 * 16), 0)
    narrow = sampling(SIZES, 10, 20, 10, bf16=True)
    assert (narrow.cache, narrow.activations) == (10 * 30 * 32, 200 * (4 * 3 * 8 + 2 * (8 + 3 * 16)))
    # or, if the MLP is narrow, four tensors as wide as queries, keys before and after rotation, and values
    assert sampling(replace(SIZES, intermediate=4), 10, 20, 10).activations == 200 * 4 * (3 * 8 + 8 + 4 * 8 + 3 * 4)
    # a CPU computes at most 2,048 tokens of prompts at once, a GPU 16,384
    assert sampling(SIZES, 500, 100, 1).activations == 20 * 100 * 320
    assert sampling(SIZES, 500, 100, 1, device="cuda").activations == 163 * 100 * 320
    assert sampling(SIZES, 2, 5000, 1).activations == 5000 * 320
    assert sampling(SIZES, 500, 100, 1).cache == 500 * 101 * 64
    # answers that do not fit enter later: then one of the two layers is held twice
    assert sampling(SIZES, 513, 100, 1).cache == 512 * 101 * 64 * 3 // 2
    # five answers share a prompt; at most 512 answers and 131,072 tokens are under way, and 16,777,216 logits
    assert sampling(SIZES, 10, 20, 10, samples=5).cache == (2 * 20 + 10 * 10) * 64
    assert sampling(SIZES, 9999, 20, 10, samples=4).cache == (128 * 20 + 512 * 10) * 64 * 3 // 2
    assert sampling(SIZES, 9999, 1000, 1000).cache == 131_072 * 64 * 3 // 2
    assert sampling(replace(SIZES, vocabulary=151_936), 9999, 20, 10).logits == 16_777_216 * 16


def test_a_gpu_stores_as_many_tokens_as_its_free_memory_holds() -> None:
    def cached(device_bytes: int) -> int:
        return sampling(SIZES, 9999, 1000, 1000, device="cuda", device_bytes=device_bytes).cache

    # and one of two layers twice while later prompts enter
    assert cached(2**30) == 512 * 2000 * 64 * 3 // 2
    # 70 % of 10 MB next to the weights hold 109,375 tokens; three leading bits of that are 6 x 2^14
    assert cached(10**7 + 4000) == 6 * 2**14 * 64 * 3 // 2


def test_a_reward_model_has_no_logits_and_no_head_that_repeats_its_embeddings() -> None:
    tied = replace(SIZES, tied=True)
    # 50 x 8 numbers of an untied head are absent, and the new head has 8
    assert training(SIZES.with_scalar_head(), 100).weights == 4 * (1000 - 400 + 8)
    scores = training(tied.with_scalar_head(), 100)
    assert (scores.weights, scores.logits, scores.temporary) == (4 * 1008, 0, 4 * 400)
    assert scores.activations == training(tied, 100).activations


def test_an_adapter_has_gradients_and_moments_and_its_base_has_none() -> None:
    held = training(SIZES, 100, trained=2, frozen=1, adapter=30)
    assert (held.weights, held.optimiser) == (4 * 1000 * 3 + 4 * 30 * 2, 3 * 4 * 30 * 2)
    assert held.activations == training(SIZES, 100, trained=2, frozen=1).activations
    asked = sampling(SIZES, 10, 20, 10, trained=1, frozen=0, adapter=30)
    assert (asked.weights, asked.optimiser) == (4 * 1030, 2 * 4 * 30)


def test_processes_that_share_rows_divide_activations_and_logits() -> None:
    held = training(SIZES, 100, context=4)
    # a quarter of the tokens, and the gathered last states of all tokens with their gradient
    assert (held.activations, held.logits) == (25 * 1632 + 2 * 4 * 100 * 8, 2 * 4 * 25 * 50)
    assert held.weights == training(SIZES, 100).weights


def test_moments_in_8_bits_have_a_scale_for_each_block_of_256() -> None:
    # gradients of 4 bytes, two moments of 1 + 4/256, and of 4 bytes for 50 x 8 embeddings and as many weights of the head
    held = training(SIZES, 100, trained=2, moment_bits=8)
    moments = 2 * ((1 + 4 / 256) * 200 + 4 * 800)
    assert held.optimiser == math.ceil(2 * (4000 + moments)) == 21613
    assert sampling(SIZES, 10, 20, 10, trained=1, moment_bits=8).optimiser == math.ceil(moments)
    assert training(SIZES, 100, adapter=256, moment_bits=8).optimiser == 256 * 4 + 2 * (256 + 4)
    # on a CPU the step of embeddings or head, 50 x 8 numbers, holds 6 copies of it, and that of other weights 13.25
    assert held.temporary == 6 * 4 * 50 * 8 > training(SIZES, 100, trained=2).temporary
    assert training(replace(SIZES, intermediate=50), 100, moment_bits=8).temporary == 13.25 * 4 * 50 * 8
    assert training(replace(SIZES, tied=True), 100, moment_bits=8).temporary == held.temporary
    assert training(SIZES, 100, moment_bits=8, device="cuda").temporary == training(SIZES, 100, device="cuda").temporary


def test_moments_in_main_memory_take_none_of_a_gpu() -> None:
    assert training(SIZES, 100, trained=2, offloaded=True, device="cuda").optimiser == 4 * 2000
    assert sampling(SIZES, 10, 20, 10, trained=1, offloaded=True, device="cuda").optimiser == 0
    assert training(SIZES, 100, offloaded=True).optimiser == training(SIZES, 100).optimiser


def test_sampling_in_bf16_holds_a_cast_of_the_matrices_and_half_of_the_cache() -> None:
    whole = sampling(SIZES, 10, 2, 30, bf16=True)
    # all but 50 x 8 numbers of embeddings, which are only looked up, unless they are the head's, too
    assert (whole.weights, whole.cache) == (4 * 1000 + 2 * 600, 10 * 32 * 32)
    assert sampling(replace(SIZES, tied=True), 10, 20, 10, bf16=True).weights == 4 * 1000 + 2 * 1000


def test_a_base_in_4_bits_has_a_scale_for_each_block_of_64() -> None:
    # of 1000 parameters 640 are kept in 4 bits: 640 x (1/2 + 4/64) bytes; a frozen copy, such as a reward model, is float32
    held = training(SIZES, 100, trained=2, frozen=1, adapter=30, quantised=640)
    assert held.weights == 4 * (2 * (360 + 30) + 1000) + 2 * 360
    asked = sampling(SIZES, 10, 20, 10, trained=1, frozen=0, adapter=30, quantised=640)
    assert (asked.weights, asked.optimiser) == (4 * 390 + 360, 2 * 4 * 30)


def test_with_lora_the_plan_holds_one_copy_of_the_weights(root: Path) -> None:
    tree = read_yaml(root / "params.yaml")
    tree["align"]["lora"] = {"rank": 4, "alpha": 8}
    tree["project"]["algorithms"] = ["dapo"]
    tree["algorithms"]["dapo"]["rewards"] = {"answer": 1.0}
    apply_training_options = parse_params(tree)
    model = sizes(tiny_config(TinyShape()))
    trained = next(
        p for p in phases(apply_training_options, model) if p.stage == "align@dapo" and p.name == "train"
    ).memory
    # rank (in + out) of q, k, v, o, gate, up, down in two layers of hidden size 128
    adapter = 2 * 4 * ((128 + 128) + (128 + 64) * 2 + (128 + 128) + (128 + 256) * 3)
    assert trained.weights == 4 * (model.parameters + adapter)
    assert trained.optimiser == 3 * 4 * adapter


def test_a_vllm_server_keeps_its_cache_where_it_runs(root: Path) -> None:
    tree = read_yaml(root / "params.yaml")
    tree["algorithms"]["grpo"]["budget"] = {"rollouts": {"engine": "vllm"}}
    params = parse_params(tree)
    planned = {(phase.stage, phase.name): phase.memory for phase in phases(params, SIZES)}
    assert planned["align@grpo", "sample"].cache == planned["align@grpo", "sample"].logits == 0
    assert planned["align@grpo", "sample"].weights == planned["align@gspo", "sample"].weights
    assert planned["align@gspo", "sample"].cache > 0


def test_sampling_ahead_holds_a_model_and_snapshots(root: Path) -> None:
    tree = read_yaml(root / "params.yaml")
    weights = []
    for rollouts in ({}, {"staleness": 2}):
        tree["algorithms"]["grpo"] |= {"budget": {"rollouts": rollouts}, "options": {"anchor": "rollout"}}
        planned = {(phase.stage, phase.name): phase.memory for phase in phases(parse_params(tree), SIZES)}
        weights.append([planned["align@grpo", name].weights for name in ("sample", "train")])
    # a model in the second process and two snapshots, 4 bytes a parameter
    assert [ahead - now for now, ahead in zip(*weights, strict=True)] == [3 * 4 * 1000] * 2


@pytest.mark.parametrize("shape", [TinyShape(), TinyShape(64, 200, 3, 4, 4), TinyShape(96, 64, 1, 2, 1)])
def test_activations_are_what_autograd_saves(shape: TinyShape) -> None:
    lm, _ = tiny_model(shape, 0)
    policy, batch = Policy(lm), collate([Tokens((3 + i, 4, 5, 6), (7,) * 60) for i in range(8)])
    weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape[-1:] != (
            lm.config.vocab_size,
        ):  # logits, which the plan counts apart
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(batch)
    planned = sizes(lm.config)
    assert planned.parameters == sum(p.numel() for p in lm.parameters())
    assert planned.fused
    assert planned.joined
    extra = 4 * 2 * planned.intermediate  # the gradient of a layer
    assert sum(saved.values()) / len(batch.input_ids) == pytest.approx(planned.joined_per_token - extra, rel=0.08)


def test_experts_count_as_many_as_a_token_passes_through() -> None:
    shape = TinyShape(64, 32, 2, 4, 2, experts=8, experts_per_token=2)
    planned = sizes(tiny_config(shape))
    assert planned.intermediate == 2 * 32
    assert planned.parameters == sum(p.numel() for p in tiny_model(shape, 0)[0].parameters())


def tiny(root: Path) -> Params:
    tree = read_yaml(root / "params.yaml")
    _merge(tree, read_yaml(OVERLAY))
    return parse_params(tree)


def _with_warm_up(name: str, steps: int) -> dict[str, Any]:
    tree = read_yaml(Path(__file__).parents[1] / "params.yaml")
    _merge(tree, {"algorithms": {name: {"budget": {"optimizer": {"warmup_steps": steps}}}}})
    return {"algorithms": tree["algorithms"]}


def _merge(tree: Any, over: Any) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def test_steps_and_tokens_are_those_that_the_steps_announce(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = {(phase.stage, phase.name): phase for phase in phases(tiny(root), SIZES)}
    # 64 rows in batches of 16 over 2 epochs; 32 of 40 pairs in batches of 8 over 2 epochs
    assert planned["sft", "train"].steps == 8
    assert planned["sft", "train"].tokens == 64 * 2 * (32 + 64)
    each = tiny(root)
    each = next(iter(phases(each.model_copy(update={"sft": each.sft.model_copy(update={"train_on": "each"})}), SIZES)))
    assert (each.steps, each.tokens) == (8, None)
    assert planned["reward", "train"].steps == planned["align@dpo", "train"].steps == 8
    # 6 steps: of 2 epochs for PPO, of 2 minibatches for this GRPO, of one update for CHORD
    assert [planned[f"align@{name}", "train"].steps for name in ("ppo", "grpo", "chord")] == [12, 12, 6]
    assert planned["align@grpo", "sample"].tokens == 6 * 4 * 4 * 12
    assert planned["align@dapo", "sample"].tokens == 8 * 6 * 4 * 4 * 12
    # policy and critic with their moments; reference and reward model beside them
    assert planned["align@ppo", "train"].memory.weights == 4 * 4 * SIZES.parameters
    assert planned["align@grpo", "train"].memory.weights == 3 * 4 * SIZES.parameters
    assert planned["evaluate", "sample"].tokens == 8 * 3 * 12


def test_rows_are_those_of_local_files_and_not_of_tables_made_from_other_data(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = tiny(root)
    lines = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(50)]
    Path("own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = [{"prompt": f"{i} + 1 = ", "chosen": str(i + 1), "rejected": "0"} for i in range(20)]
    Path("pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pairs))
    data = params.data.model_copy(update={
        "sft": params.data.sft.model_copy(update={"source": "own.jsonl"}),
        "preferences": params.data.preferences.model_copy(update={"source": "pairs.jsonl", "rows": None, "heldout": 0.25}),
    })  # fmt: skip
    own = params.model_copy(update={"data": data})
    # 5 of 20 pairs, each with its own prompt, are held out
    wanted = {"sft": 50, "preferences": 15, "problems": params.data.problems.rows, "evaluation": 8}
    assert rows_by_table(own) == wanted
    # 50 rows in batches of 16 over 2 epochs
    assert next(iter(phases(own, SIZES))).steps == 8
    for folder in ("data/valid", "runs/ingest"):
        Path(folder).mkdir(parents=True)
    for table in wanted:
        pq.write_table(pa.table({"id": list(range(7))}), f"data/valid/{table}.parquet")
    journal = Journal(Path("runs/ingest/journal.jsonl"))
    journal.append({"kind": "params", "values": declared_values(params, ("data",))})
    journal.close()
    assert rows_by_table(params) == dict.fromkeys(wanted, 7)
    assert rows_by_table(own) == wanted


def test_time_is_steps_times_the_seconds_of_the_last_steps_here(root: Path, tmp_path: Path) -> None:
    params = load_params(root / "params.yaml")
    for name, took in (("sft", (2.0, 2.0, 9.0)), ("align-grpo-0", (3.0,)), ("align-grpo-1", (5.0,))):
        folder = tmp_path / ".posttrain" / "runs" / f"{name}-{'a' * 16}"
        folder.mkdir(parents=True)
        records = [{"kind": "start", "time": 0.0}] + [
            {"kind": "timings", "time": 1.0, "step": i, "values": {"seconds/step": seconds}}
            for i, seconds in enumerate(took)
        ]
        (folder / "measurements.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    timed = seconds_by_stage(tmp_path)
    assert timed == {"sft": 2.0, "align@grpo": 4.0}
    # grpo has 40 steps, whatever number of optimiser steps one makes
    said = time_line(params, {"sft": 18, "align@grpo": 160, "align@dpo": 50}, timed)
    assert said == (
        "time: about 3 min of training, as the last steps here took: sft 36 s, align@grpo 3 min. Not timed here yet: align@dpo"
    )
    assert (
        time_line(params, {"sft": 18}, {}) == "time: not known before a first run on this machine has timed its steps"
    )


def test_a_warm_up_that_is_longer_than_its_run_is_found_before_the_run(root: Path) -> None:
    params = load_params(root / "params.yaml")
    assert too_long_warmups(params, {"sft": 20, "align@dpo": 50, "align@grpo": 1, "reward": None}) == []
    assert too_long_warmups(params, {"sft": 19, "align@dpo": 4}) == [
        "sft would stop: sft.optimizer.warmup_steps = 20 is longer than its 19 optimiser steps; set it to 1, a tenth of them, or"
        " train for longer.",
        "align@dpo would stop: align.preference.optimizer.warmup_steps = 5 is longer than its 4 optimiser steps; set it to 0, a tenth"
        " of them, or train for longer.",
    ]
    own = parse_params({**read_yaml(root / "params.yaml"), **_with_warm_up("grpo", 9)})
    assert too_long_warmups(own, {"align@grpo": 8})[0].startswith(
        "align@grpo would stop: algorithms.grpo.budget.optimizer.warmup_steps = 9 is"
    )


def test_what_will_not_fit_is_named_with_what_to_change(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = load_params(root / "params.yaml")
    planned = list(phases(params, SIZES))
    assert "does not fit" not in page(params, SIZES, planned, 1 << 40)
    said = page(params, SIZES, planned, 1 << 20)
    assert "sft (train) does not fit: " in said
    assert (
        "most of it for activations; lower compute.micro_batch_tokens, or set compute.gradient_checkpointing." in said
    )
    assert main(["--params", str(root / "params.yaml"), "--memory", "1000"]) == 0
    assert "361,984 parameters (tiny); 1 seed per algorithm; a device has 1000.0 GiB" in capsys.readouterr().out
    assert main(["--params", str(root / "params.yaml"), "--memory", "0.1"]) == 1
    assert main(["--params", str(root / "missing.yaml")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_server_next_to_a_trainer_gets_the_rest_or_is_refused() -> None:
    # 1 - 5 % - (10 + 30) / 80
    assert server_share(80 * 2**30, Memory(weights=10 * 2**30, optimiser=30 * 2**30)) == 0.45
    with pytest.raises(ConfigError, match=r"training needs 70.0 of the device's 80.0 GiB"):
        server_share(80 * 2**30, Memory(weights=70 * 2**30))


def test_processes_that_share_weights_hold_their_part_and_what_they_gather(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(SIZES, outside=400)
    one, four = (training(model, 10, frozen=1, processes=n) for n in (1, 4))
    # two models of 4000 bytes over four processes; gathered: 400 weights outside the layers, and two layers of 300
    assert (one.weights, four.weights) == (8000, 2000 + 4 * (400 + 600))
    assert (one.optimiser, four.optimiser) == (12000, 3000)
    assert one.activations == four.activations
    # layers are gathered in bfloat16, two bytes a weight
    assert training(model, 10, bf16=True, processes=4).weights == 1000 + 4 * 400 + 2 * 600
    assert sampling(model, 8, 3, 2, processes=4).cache * 4 == sampling(model, 8, 3, 2).cache
    assert sizes(tiny_config(TinyShape())).outside == 2 * 259 * 128
    params = load_params(root / "params.yaml")
    monkeypatch.setenv("POSTTRAIN_ACCELERATE", str(root / "infra/accelerate/ddp_cpu.yaml"))
    whole = next(phases(params, model)).memory.optimiser
    monkeypatch.setenv("POSTTRAIN_ACCELERATE", str(root / "infra/accelerate/fsdp2_cpu.yaml"))
    assert (whole, next(phases(params, model)).memory.optimiser) == (12000, 6000)


def test_gradients_of_embedding_and_head_wait_to_be_added() -> None:
    matrix = 4 * 50 * 8
    tied = replace(SIZES, tied=True)
    assert training(SIZES, 100).temporary == matrix
    assert training(tied, 100).temporary == 2 * matrix
    # on a GPU the second one takes the place of activations, but for a layer's
    assert training(tied, 100, device="cuda").temporary == matrix
    assert training(tied, 1, device="cuda").temporary == 2 * matrix + 1632 // 2 - 1632 - 2 * 4 * 50
    assert training(tied, 100, adapter=30).temporary == 0


@pytest.mark.parametrize(
    ("layers", "tokens", "peaks"), [(30, 1024, [3513]), (4, 512, [1073, 1042])], ids=["135M", "4 layers"]
)
def test_a_process_with_a_large_vocabulary_needs_the_planned_memory(layers: int, tokens: int, peaks: list[int]) -> None:
    """Measured: second update of two micro-batches, SmolLM2-135M's shape, one thread, torch 2.13 on Linux; the last one in huge pages.

    Those of 4 layers are from before layers were one function, which takes 30 MiB less.
    """
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "tie_word_embeddings": True}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
    planned = training(sizes(LlamaConfig(**shape, **heads)), tokens)
    libraries = 420
    for peak in peaks:
        assert (planned.total + RUNTIME_BYTES) / 2**20 == pytest.approx(libraries + peak, rel=0.1)
        # without the two it was planned before
        assert (planned.total - planned.temporary) / 2**20 < 0.86 * (libraries + peak)
