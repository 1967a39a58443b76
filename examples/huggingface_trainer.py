"""The Hugging Face Trainer on a text classifier, with the balancer in `compute_loss`: it finds the wrong labels.

    python examples/huggingface_trainer.py
    python examples/huggingface_trainer.py --resume runs/trainer/checkpoint-80

Four training labels of ten were thrown dice for, those of a small meta set are right. Nothing is downloaded.
"""

import argparse
from functools import cached_property
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from metakd import BilevelLossBalancer
from metakd.terms import CrossEntropy


class BalancedTrainer(Trainer):
    """A Trainer whose training loss is the balancer's; its evaluation is what it was."""

    def __init__(self, *args, meta_dataset, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # so that the Trainer divides the loss where it accumulates gradients
        self.meta_batch = self._prepare_inputs(self.data_collator(meta_dataset))

    @cached_property
    def balancer(self):  # first asked for when the Trainer has its optimizer
        return BilevelLossBalancer(self.model_wrapped, {"label": CrossEntropy()}, optimizer=self.optimizer)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self.balancer(inputs, self.meta_batch)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self.balancer.state_dict(), Path(output_dir) / "balancer.pt")

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.balancer.load_state_dict(torch.load(Path(checkpoint) / "balancer.pt", weights_only=True))


def sentences(number, diced=0.0):
    """Sentences of twelve words, three of which tell the class; some labels diced for. Also which labels are wrong."""
    classes, words = torch.randint(4, (number,)), torch.randint(20, 100, (number, 12))
    words[:, :3] = 5 * classes[:, None] + torch.randint(5, (number, 3))
    labels = torch.where(torch.rand(number) < diced, torch.randint(4, (number,)), classes)
    return [{"input_ids": w, "labels": y} for w, y in zip(words, labels, strict=True)], labels != classes


def train(epochs, output, resume=None):
    """Train for some epochs, or from a checkpoint on; returns the trainer and prints what was learned."""
    set_seed(0)
    (data, wrong), (meta, _), (test, _) = sentences(640, diced=0.4), sentences(64), sentences(400)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=4, **sizes))
    args = TrainingArguments(
        output, num_train_epochs=epochs, learning_rate=5e-3, per_device_train_batch_size=32, save_strategy="epoch",
        logging_steps=20, disable_tqdm=True, report_to="none", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = BalancedTrainer(model, args, train_dataset=data, meta_dataset=meta)
    trainer.train(resume_from_checkpoint=resume)

    weights = trainer.balancer.weights(trainer._prepare_inputs(trainer.data_collator(data)))
    print(f"weight of a label: {weights[~wrong].mean():.2f} where it is right, {weights[wrong].mean():.2f} where wrong")
    found = trainer.predict(test)
    print(f"test accuracy: {(found.predictions.argmax(1) == found.label_ids).mean():.1%}")
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learn, in the Hugging Face Trainer, which labels to trust.")
    parser.add_argument("--resume", type=Path, help="a checkpoint under runs/trainer")
    train(8, Path("runs/trainer"), parser.parse_args().resume)
