"""Preference losses: the papers' formulas, whatever is shared and however a step is cut; the pair never parted."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from decoders import VOCABULARY, example, gradients, make_decoder, worst_error
from tunesmith.data import batches
from tunesmith.data.batches import Layout, StepPlan, make_step
from tunesmith.models.lora import add_new_adapter, wrap
from tunesmith.recipe import Adapter, Train
from tunesmith.train.annotate import load_columns, reference, save_columns, with_columns
from tunesmith.train.bodies import make_body
from tunesmith.train.gradient import accumulate
from tunesmith.train.loop import Hooks, train
from tunesmith.train.losses import REFERENCE, dpo, kto, orpo
from tunesmith.tree.body import prepare

LAYOUTS = [
    Layout(10_000, together=2),
    Layout(120, together=2),
    Layout(60, together=2),
    Layout(10_000, lanes=2, together=2),
    Layout(10_000, share=False, together=2),
]


def make_pairs(n=6, prompt=70, seed=0):
    """Chosen, rejected, chosen, ...: prompts that begin alike, two pairs with the very same prompt."""
    random = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(3, VOCABULARY, (length,), generator=random).tolist()

    shared, rows = ids(prompt), []
    for i in range(n):
        asked = rows[0].input_ids[: prompt + 2].tolist() if i == 1 else [*shared, *ids(2 + i % 3)]
        asked = asked[: prompt + 2] if i < 2 else asked
        for side in ("chosen", "rejected"):
            answer = ids(int(torch.randint(1, 7, (), generator=random)))
            rows.append(example([*asked, *answer, 2], len(answer) + 1, f"{i} {side}"))
    return rows


def make_triples(n=6):
    """Chosen, rejected, and the prompt with the next pair's chosen answer."""
    rows, triples = make_pairs(n), []
    for i in range(0, 2 * n, 2):
        other = rows[(i + 2) % (2 * n)]
        asked, said = (int((each.weights > 0).argmax()) for each in (rows[i], other))
        ids = [*rows[i].input_ids[:asked].tolist(), *other.input_ids[said:].tolist()]
        triples += [*rows[i : i + 2], example(ids, len(ids) - asked, f"{i} stranger")]
    return triples


def make_run(name="llama", dtype=torch.float64, dropout=0.0):
    model = make_decoder(name, dtype)
    lora = wrap(model)
    add_new_adapter(lora, "a", Adapter(rank=3, dropout=dropout), seed=0)
    for _, parameter in lora.parameters("a"):
        parameter.data = parameter.data.to(dtype)
    lora.use("a")
    prepare(model)
    return lora, make_body(model, lora, "a"), dict(lora.parameters("a"))


def disturb(parameters):
    torch.manual_seed(3)
    for parameter in parameters.values():
        parameter.data += torch.randn_like(parameter) * 0.1


def logprobs_one_by_one(model, rows):
    """[rows] sums over the answers, and [rows] means, by ordinary mathematics."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    sums = []
    for row in rows:
        ids = torch.as_tensor(row.input_ids, dtype=torch.long)
        logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        picked = logprobs.gather(1, ids[1:, None])[:, 0]
        sums.append((picked * torch.as_tensor(row.weights[1:])).sum())
    model.set_attn_implementation(before)
    lengths = torch.tensor([float(row.weights.sum()) for row in rows])
    return torch.stack(sums), torch.stack(sums) / lengths


def dpo_by_the_paper(policy, reference, beta):
    """Rafailov et al. 2023, arXiv:2305.18290, equation 7."""
    c, r = policy[0::2] - reference[0::2], policy[1::2] - reference[1::2]
    return -logsigmoid(beta * c - beta * r).mean()


def orpo_by_the_paper(means, beta):
    """Hong et al. 2024, arXiv:2403.07691: L_SFT + lambda L_OR, equations 4 to 7, word for word."""
    p = means.exp()
    odds = p / (1 - p)
    ratio = torch.log(odds[0::2] / odds[1::2])
    return (-means[0::2] - beta * logsigmoid(ratio)).mean()


def kto_by_the_paper(policy, reference, beta):
    """Ethayarajh et al. 2024, arXiv:2402.01306, equations 7 and 8, with z0 shared by the step and held constant."""
    c, r, moved = ((policy - reference)[i::3] for i in range(3))
    z0 = moved.mean().clamp(min=0).detach()
    values = torch.cat((torch.sigmoid(beta * (c - z0)), torch.sigmoid(beta * (z0 - r))))
    return (1 - values).mean()


@pytest.fixture(autouse=True)
def small_lanes(monkeypatch):
    monkeypatch.setattr(batches, "LANE_TOKENS", 8)
    monkeypatch.setattr(batches, "LANE_SLACK", 2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # fused, and through the model's own modules
@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_loss_and_gradient_are_the_papers_however_a_step_is_cut(name, kind):
    lora, body, parameters = make_run(name)
    rows, beta = make_pairs(), 0.3
    with torch.no_grad():
        before, _ = logprobs_one_by_one(lora.model, rows)
    rows = with_columns(rows, reference(body, rows, LAYOUTS[1], lambda done, total: None))
    assert [float(row.columns[REFERENCE]) for row in rows] == pytest.approx(before.tolist(), rel=1e-6)
    disturb(parameters)
    sums, means = logprobs_one_by_one(lora.model, rows)
    expected = dpo_by_the_paper(sums, before, beta) if kind == "dpo" else orpo_by_the_paper(means, beta)
    expected.backward()
    wanted, loss = gradients(parameters), dpo(beta) if kind == "dpo" else orpo(beta)
    margins = sums[0::2] - before[0::2] > sums[1::2] - before[1::2] if kind == "dpo" else means[0::2] > means[1::2]
    for layout in LAYOUTS:
        step = make_step(0, 1.0, rows, layout)
        total, metrics = accumulate(body, step, loss)
        assert total / step.weight == pytest.approx(expected.item(), rel=1e-5)
        assert worst_error(wanted, gradients(parameters)) < 1e-5
        assert metrics["reward_accuracy"] == int(margins.sum())
        assert 0 <= metrics["token_accuracy"] <= step.weight


@pytest.mark.parametrize("better", [1, -1])  # the model moved towards the strangers, and away from them: z0 is then 0
def test_kto_is_the_papers_however_a_step_is_cut(better):
    lora, body, parameters = make_run()
    rows, layouts = make_triples(), [dataclasses.replace(layout, together=3) for layout in LAYOUTS]
    disturb(parameters)
    with torch.no_grad():
        sums, _ = logprobs_one_by_one(lora.model, rows)
    before = sums - torch.tensor([0.5, -0.3, 0.4 * better] * 6)
    rows = with_columns(rows, {REFERENCE: before.numpy()})
    sums, _ = logprobs_one_by_one(lora.model, rows)
    expected = kto_by_the_paper(sums, before, 0.3)
    expected.backward()
    wanted = gradients(parameters)
    for layout in layouts:
        step = make_step(0, 1.0, rows, layout)
        total, metrics = accumulate(body, step, kto(0.3))
        assert step.weight == 6
        assert total / step.weight == pytest.approx(expected.item(), rel=1e-5)
        assert worst_error(wanted, gradients(parameters)) < 1e-5
        assert metrics["reward_margin"] == pytest.approx(6 * 0.3 * 0.8, rel=1e-5)


@given(st.integers(0, 1000), st.integers(2, 9), st.integers(0, 90), st.integers(4, 300), st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_the_two_answers_of_a_pair_are_never_parted(seed, n, prompt, budget, lanes):
    rows = make_pairs(n, prompt, seed)
    for share in (True, False):
        step = make_step(0, 1.0, rows, Layout(budget, share=share, lanes=lanes, together=2))
        placed = [i for group in step.groups for chosen in group.examples for i in chosen]
        assert sorted(placed) == list(range(2 * n))
        for group in step.groups:
            for chosen in group.examples:
                assert all(b == a + 1 and a % 2 == 0 for a, b in zip(chosen[0::2], chosen[1::2], strict=True))


def test_the_shared_prompt_of_a_pair_is_computed_once():
    rows = make_pairs(4)
    step = make_step(0, 1.0, rows, Layout(10_000, together=2))
    assert step.computed_tokens < 70 + sum(len(row.input_ids) - 70 for row in rows)


def test_a_step_counts_pairs():
    steps = StepPlan(make_pairs(5), 2, 3, 0, True, Layout(1000, together=2))
    assert steps.used().tolist() == list(range(10))
    assert len(dataclasses.replace(steps, steps=1).used()) == 4
    assert [(len(step.example_ids), len(step.examples), step.weight) for step in steps] == [
        (2, 4, 2.0),
        (2, 4, 2.0),
        (1, 2, 1.0),
    ]
    assert steps[2].epoch == 1.0


def test_training_prefers_the_chosen_answers_and_says_so():
    _, body, parameters = make_run(dtype=torch.float32)
    rows = make_pairs()
    rows = with_columns(rows, reference(body, rows, LAYOUTS[0], lambda done, total: None))
    seen, evals = [], []
    train(
        body,
        parameters,
        StepPlan(rows, 3, 12, 0, True, LAYOUTS[1]),
        dpo(0.5),
        Train(),
        lr=1e-2,
        held_out=make_step(0, 0.0, rows[:4], LAYOUTS[0]),
        hooks=Hooks(on_step=seen.append, on_eval=evals.append),
    )
    assert seen[0].loss == pytest.approx(math.log(2), abs=1e-3)  # the model is its own reference
    assert seen[0].examples == 3
    assert seen[-1].loss < 0.4
    assert seen[-1].measures["reward_margin"] > 0.5
    assert evals[-1].measures["reward_accuracy"] == 1.0


def test_the_reference_is_computed_without_dropout():
    lora, body, parameters = make_run("gpt2", dropout=0.5)
    disturb(parameters)
    lora.model.train()
    found = [reference(body, make_pairs(2), LAYOUTS[-1], lambda done, total: None)[REFERENCE] for _ in range(2)]
    assert (found[0] == found[1]).all()
    assert lora.model.training


def test_columns_are_read_back_and_those_of_other_rows_are_not(tmp_path):
    path = tmp_path / "columns.safetensors"
    assert load_columns(path, 4) is None
    _, body, _ = make_run()
    columns = reference(body, make_pairs(2), LAYOUTS[0], lambda done, total: None)
    save_columns(path, columns)
    again = load_columns(path, 4)
    assert again is not None
    assert again[REFERENCE].tobytes() == columns[REFERENCE].tobytes()
    assert load_columns(path, 6) is None
    path.write_bytes(path.read_bytes()[:-3])
    assert load_columns(path, 4) is None


@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_the_losses_are_trls(kind, tmp_path):
    """The very trainers of TRL on the very batch, where TRL is installed."""
    pytest.importorskip("trl")
    lora, body, parameters = make_run(dtype=torch.float32)
    rows = make_pairs()
    rows = with_columns(rows, reference(body, rows, LAYOUTS[0], lambda done, total: None))
    disturb(parameters)
    step = make_step(0, 1.0, rows, LAYOUTS[1])
    with torch.no_grad():
        total, _ = accumulate(body, step, dpo(0.3) if kind == "dpo" else orpo(0.3), backward=False)
        _, means = logprobs_one_by_one(lora.model, rows)
    theirs = trl_dpo(lora.model, rows, tmp_path) if kind == "dpo" else trl_orpo(means)
    assert total / step.weight == pytest.approx(theirs, abs=1e-5)


def test_kto_is_trls(tmp_path):
    pytest.importorskip("trl")
    lora, body, parameters = make_run(dtype=torch.float32)
    rows, layout = make_triples(), dataclasses.replace(LAYOUTS[1], together=3)
    rows = with_columns(rows, reference(body, rows, layout, lambda done, total: None))
    disturb(parameters)
    step = make_step(0, 1.0, rows, layout)
    with torch.no_grad():
        total, _ = accumulate(body, step, kto(0.3), backward=False)
    assert total / step.weight == pytest.approx(trl_kto(lora.model, rows, tmp_path), abs=1e-5)


def trl_inputs(rows, prefix=""):
    width = max(len(row.input_ids) for row in rows)

    def padded(values):
        return torch.stack([torch.nn.functional.pad(torch.as_tensor(v), (0, width - len(v))).long() for v in values])

    return {
        f"{prefix}input_ids": padded([row.input_ids for row in rows]),
        f"{prefix}attention_mask": padded([[1] * len(row.input_ids) for row in rows]),
        f"{prefix}completion_mask": padded([(row.weights > 0).astype("int64") for row in rows]),
    }


def trl_kto(model, rows, folder):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    from tiny_llama import tokenizer

    model.set_attn_implementation("eager")
    words = tokenizer()
    words.pad_token = words.eos_token
    config = KTOConfig(
        str(folder), use_cpu=True, beta=0.3, report_to=[], precompute_ref_log_probs=True, bf16=False,
        gradient_checkpointing=False, per_device_train_batch_size=2,
    )  # fmt: skip
    two = Dataset.from_list([{"prompt": "!", "completion": c, "label": c == "#"} for c in ("#", "$")])
    trainer = KTOTrainer(model, None, config, train_dataset=two, processing_class=words)
    sides, strangers = [row for i in range(2) for row in rows[i::3]], rows[2::3]
    inputs = {
        **trl_inputs(sides),
        **trl_inputs(strangers, "KL_"),
        "label": torch.tensor([True] * len(strangers) + [False] * len(strangers)),
        "ref_logps": torch.tensor([float(row.columns[REFERENCE]) for row in sides]),
        "ref_KL_logps": torch.tensor([float(row.columns[REFERENCE]) for row in strangers]),
    }
    with torch.no_grad():
        return float(trainer._compute_loss(trainer.model, inputs, False))


def trl_dpo(model, rows, folder):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from tiny_llama import tokenizer

    model.set_attn_implementation("eager")
    words = tokenizer()
    words.pad_token = words.eos_token
    config = DPOConfig(
        str(folder), use_cpu=True, beta=0.3, report_to=[], precompute_ref_log_probs=True, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    one = Dataset.from_list([{"prompt": "!", "chosen": "#", "rejected": "$"}])
    trainer = DPOTrainer(model, None, config, train_dataset=one, processing_class=words)
    sides = [*rows[0::2], *rows[1::2]]
    refs = torch.tensor([float(row.columns[REFERENCE]) for row in sides])
    inputs = {
        **trl_inputs(sides),
        "ref_chosen_logps": refs[: len(rows) // 2],
        "ref_rejected_logps": refs[len(rows) // 2 :],
    }
    with torch.no_grad():
        return float(trainer._compute_loss(trainer.model, inputs, False))


def trl_orpo(means):
    """Its odds-ratio term on the answers' mean log-probabilities, and the paper's first term."""
    from types import SimpleNamespace

    from trl.experimental.orpo import ORPOTrainer

    it = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    weighted, *_ = ORPOTrainer.odds_ratio_loss(it, means[0::2], means[1::2])
    return float((-means[0::2] - weighted).mean())
