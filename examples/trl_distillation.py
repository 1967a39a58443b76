"""Distil a causal language model with TRL and LoRA, token by token; the balancer weighs text against teacher.

    pip install trl peft
    python examples/trl_distillation.py

The sentences follow a rule of grammar: each word is the sum of the two words before it. In half of the training
sentences every other word was thrown dice for; a teacher has read clean ones. The student was pretrained on another
grammar, the difference of two words, and learns this one by its adapters. Nothing is downloaded.
"""

import argparse
import math
import tempfile
from functools import cached_property

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from metakd import BilevelLossBalancer
from metakd.terms import CrossEntropy, SoftTarget, Tokens

WORDS, LENGTH = 11, 12
TEXT = Tokens(CrossEntropy(), shift=True)  # mean cross-entropy of a sentence's tokens; padding does not count
TEACHER = Tokens(SoftTarget(temperature=2.0), shift=True)  # mean divergence from the teacher, token by token


class BalancedSFTTrainer(SFTTrainer):
    """An SFTTrainer whose training loss is the balancer's; with a teacher it distils."""

    def __init__(self, *args, meta_dataset, teacher=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # so that the Trainer divides the loss where it accumulates gradients
        self.meta_batch = self._prepare_inputs(self.data_collator(list(meta_dataset)))
        self.teacher = None if teacher is None else teacher.to(self.args.device)

    @cached_property
    def balancer(self):  # first asked for when the Trainer has its optimizer
        terms = {"text": TEXT} if self.teacher is None else {"text": TEXT, "teacher": TEACHER}
        return BilevelLossBalancer(
            self.model_wrapped,
            terms,
            optimizer=self.optimizer,
            teacher=self.teacher,
            features=lambda losses, outputs, batch: losses,  # the default ones are for one label a sample
            meta_loss=TEXT,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self.balancer(dict(inputs), self.meta_batch)


def sentences(number, diced=0.0, sign=1):
    """Sentences of the grammar, of differences for sign -1; in a share of them every other word is thrown dice for."""
    words = torch.randint(WORDS, (number, LENGTH))
    for t in range(2, LENGTH):
        words[:, t] = (words[:, t - 2] + sign * words[:, t - 1]) % WORDS
    wrong = torch.rand(number) < diced
    dice = torch.randint(WORDS, words.shape)
    dice[:, ::2] = words[:, ::2]
    return Dataset.from_dict({"input_ids": torch.where(wrong[:, None], dice, words).tolist()}), wrong


def tokenizer():
    """Words are numbers; TRL asks for a tokenizer although the data is tokenized already."""
    vocabulary = {str(word): word for word in range(WORDS)} | {"<pad>": WORDS, "<eos>": WORDS + 1}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def model_of(width):
    """A small causal transformer, built from a config."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS + 2, pad_token_id=WORDS, **sizes))


def settings(output, epochs, **more):
    """TRL's settings for a CPU, without checkpoints and loggers."""
    return SFTConfig(
        output, num_train_epochs=epochs, learning_rate=1e-2, per_device_train_batch_size=32, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, bf16=False, logging_steps=20,
        eos_token="<eos>", **more,
    )  # fmt: skip


def read(output, text, width, epochs):
    """A model that has read a text, by TRL alone."""
    trainer = SFTTrainer(model_of(width), settings(output, epochs), train_dataset=text, processing_class=tokenizer())
    trainer.train()
    return trainer.model


def distil(output, student, teacher, epochs=4, number=640):
    """Distil into adapters of the student; returns the trainer."""
    (data, _), (meta, _), (test, _) = sentences(number, diced=0.5), sentences(64), sentences(256)
    trainer = BalancedSFTTrainer(
        student, settings(output, epochs), train_dataset=data, eval_dataset=test, meta_dataset=meta,
        teacher=teacher, processing_class=tokenizer(), peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    return trainer


def main():
    """Train a teacher on clean text, distil, and print what was learned."""
    parser = argparse.ArgumentParser(description="Distil a causal language model with TRL, LoRA and learned weights.")
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        teacher, student = (read(folder, sentences(640, sign=sign)[0], 48, 20) for sign in (1, -1))
        trainer = distil(folder, student, teacher, args.epochs)
    weights = trainer.balancer.report.weights.mean(0).tolist()
    print("mean weights:", {name: round(w, 3) for name, w in zip(trainer.balancer.terms, weights, strict=True)})
    print(f"test loss: {trainer.evaluate()['eval_loss']:.3f} nats a word; {math.log(WORDS):.3f} by guessing")


if __name__ == "__main__":
    main()
