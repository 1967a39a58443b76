"""The Hugging Face Trainer: the recipe, its numbers, its evaluation and its checkpoints."""

import copy
import re
from functools import cached_property
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from metakd import BilevelLossBalancer, MetaKDError
from metakd.batch import as_batch
from metakd.terms import CrossEntropy, Tokens

transformers = pytest.importorskip("transformers")

EXAMPLE = "huggingface_trainer.py"


@pytest.fixture
def build(example, tmp_path):
    """A trainer of the example on 4 batches of 8 sentences, whose loader gives them in an order of its own."""
    found = example(EXAMPLE)

    def build(folder="out", **options):
        transformers.set_seed(0)
        (train, _), (meta, _) = found["sentences"](32, diced=0.4), found["sentences"](12)
        config = transformers.BertConfig(
            vocab_size=100, num_labels=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16,
        )  # fmt: skip
        settings = {
            "num_train_epochs": 2, "learning_rate": 5e-3, "per_device_train_batch_size": 8, "save_strategy": "no",
            "use_cpu": True, "disable_tqdm": True, "report_to": "none", "dataloader_pin_memory": False,
        } | options  # fmt: skip
        args = transformers.TrainingArguments(tmp_path / folder, **settings)
        model = transformers.BertForSequenceClassification(config)
        trainer = found["BalancedTrainer"](model, args, train_dataset=train, eval_dataset=meta, meta_dataset=meta)
        transformers.set_seed(1)
        return trainer

    return build


@pytest.fixture
def language_model(example, tmp_path):
    """Batches of 8 texts, some of them padded, for a causal language model, with LoRA's adapters or without."""
    text = Tokens(CrossEntropy(), shift=True)

    class BalancedTrainer(example(EXAMPLE)["BalancedTrainer"]):
        @cached_property
        def balancer(self):
            options = {"optimizer": self.optimizer, "meta_loss": text, "features": lambda losses, *_: losses}
            return BilevelLossBalancer(self.model_wrapped, {"text": text}, **options)

    def build(folder, adapters, **options):
        transformers.set_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes))
        if adapters:
            import peft

            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
        words = torch.randint(20, (44, 6))
        padded = torch.where(torch.arange(6) < torch.randint(3, 7, (44, 1)), words, -100)
        texts = [{"input_ids": w, "labels": y} for w, y in zip(words, padded, strict=True)]
        args = transformers.TrainingArguments(
            tmp_path / folder, num_train_epochs=2, learning_rate=5e-3, per_device_train_batch_size=8, use_cpu=True,
            disable_tqdm=True, report_to="none", dataloader_pin_memory=False, save_strategy="steps", save_steps=3,
            **options,
        )  # fmt: skip
        trainer = BalancedTrainer(model, args, train_dataset=texts[:32], meta_dataset=texts[32:])
        transformers.set_seed(1)
        return trainer

    return build


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def plain_loop(trainer, accumulate=1):
    """What the trainer does, written out; gives student and balancer."""
    student, steps = trainer.model.train(), 2 * 4 // accumulate
    optimizer = torch.optim.AdamW(trainer.create_optimizer().param_groups, lr=5e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    loader, balancer = trainer.get_train_dataloader(), None
    for epoch in range(2):
        loader.set_epoch(epoch)
        for i, batch in enumerate(loader):
            if balancer is None:  # as late as in the recipe: the weight model starts from the random state of now
                balancer = BilevelLossBalancer(student, {"label": CrossEntropy()}, optimizer=optimizer)
            (balancer(batch, trainer.meta_batch) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return student, balancer


@pytest.mark.slow
def test_the_example_says_what_it_learned_and_resumes(run_example):
    whole = run_example(EXAMPLE).splitlines()
    right, wrong = map(float, re.match(r"weight of a label: ([\d.]+) .* ([\d.]+) where wrong", whole[-2]).groups())
    assert right > wrong + 0.3
    assert float(re.match(r"test accuracy: ([\d.]+)%", whole[-1]).group(1)) > 90
    losses = [float(x) for x in re.findall(r"'loss': '?([\d.]+)", "\n".join(whole))]
    assert len(losses) == 8 and losses[-1] < 0.5 * losses[0]
    assert run_example(EXAMPLE, "--resume", "runs/trainer/checkpoint-120").splitlines()[-2:] == whole[-2:]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_numbers_are_those_of_a_plain_loop(build, accumulate):
    trainer = build(gradient_accumulation_steps=accumulate)
    before = trainer.model.classifier.weight.clone()
    trainer.train()
    student, balancer = plain_loop(build(), accumulate)
    assert same(trainer.model, student) and same(trainer.balancer.weighting, balancer.weighting)
    assert not torch.equal(before, student.classifier.weight)
    assert trainer.balancer.state_dict()["calls"] == 8


def test_a_run_resumed_within_an_epoch_has_the_same_bits(build, tmp_path):
    whole = build("whole", save_strategy="steps", save_steps=3)
    whole.train()
    assert torch.load(tmp_path / "whole/checkpoint-3/balancer.pt", weights_only=True)["calls"] == 3
    resumed = build("again")
    torch.randn(5)
    resumed.train(resume_from_checkpoint=tmp_path / "whole/checkpoint-3")
    assert resumed.balancer.state_dict()["calls"] == 8
    assert same(resumed.model, whole.model) and same(resumed.balancer.weighting, whole.balancer.weighting)


# peft asks transformers by a name of before.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "LoRA"])
def test_a_causal_language_model_resumes_to_the_same_bits(language_model, tmp_path, adapters):
    if adapters and not find_spec("peft"):
        pytest.skip("peft is not installed")
    whole = language_model("whole", adapters)
    before = copy.deepcopy(whole.model.state_dict())
    whole.train()
    resumed = language_model("again", adapters)
    resumed.train(resume_from_checkpoint=tmp_path / "whole/checkpoint-3")
    assert same(resumed.model, whole.model) and same(resumed.balancer.weighting, whole.balancer.weighting)
    assert whole.balancer.state_dict()["calls"] == resumed.balancer.state_dict()["calls"] == 8
    moved = {name for name, value in whole.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, p in whole.model.named_parameters() if p.requires_grad}
    assert adapters == any("lora_" in name for name in moved) and bool(whole.balancer.report.influence.any())


def test_evaluation_takes_no_hypergradient_and_changes_nothing(build):
    trainer = build(eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 4
    assert trainer.balancer.state_dict()["calls"] == 8
    report, weighting, model = trainer.balancer.report, *map(copy.deepcopy, (trainer.balancer.weighting, trainer.model))
    found = trainer.predict(trainer.eval_dataset)
    assert trainer.balancer.report is report and trainer.balancer.state_dict()["calls"] == 8
    assert same(trainer.balancer.weighting, weighting) and same(trainer.model, model)
    loss = nn.functional.cross_entropy(torch.tensor(found.predictions), trainer.meta_batch["labels"])
    assert found.metrics["test_loss"] == pytest.approx(float(loss), rel=1e-5)  # unweighted


def test_meta_samples_without_labels_are_refused(build):
    trainer = build()
    del trainer.meta_batch["labels"]
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(MetaKDError, match=r"the targets are missing: batch\.targets is None"):
        trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))


def test_a_checkpoint_of_another_balancer_is_refused(build, tmp_path):
    first = build("first", save_strategy="steps", save_steps=3)
    first.train()
    saved = torch.load(tmp_path / "first/checkpoint-3/balancer.pt", weights_only=True)
    torch.save({**saved, "terms": ["other"]}, tmp_path / "first/checkpoint-3/balancer.pt")
    with pytest.raises(MetaKDError, match=r"saved with the terms \['other'\] and has \['label'\] here"):
        build("second").train(resume_from_checkpoint=tmp_path / "first/checkpoint-3")


def test_a_collators_batch_encoding_is_a_batch():
    found = as_batch(transformers.BatchEncoding({"input_ids": torch.ones(2, 5), "labels": torch.tensor([0, 1])}))
    assert list(found.inputs) == ["input_ids"] and found.targets.tolist() == [0, 1]
