"""A causal language model of Hugging Face under `fully_shard`, with LoRA where peft is there, and a teacher."""

import warnings

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from metakd import BilevelLossBalancer, weighting
from metakd.longtail._torchvision import import_torchvision
from metakd.terms import CrossEntropy, SoftTarget, Tokens
from tests.distributed.pair import SIZE
from tests.distributed.sharded import wholes
from tests.distributed.test_joined_batch import joined_rows, same

pytest.importorskip("transformers")

TEXT, TEACHER = Tokens(CrossEntropy(), shift=True), Tokens(SoftTarget(2.0), shift=True)


def model(seed):
    import_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=23, **sizes, use_cache=False)).double()


def with_lora(student):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    with warnings.catch_warnings():  # peft reads names that transformers deprecates
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return get_peft_model(student, config).double()


def tokens(step, rank, kind=0):
    """Sequences with padding; both ranks' parts where rank is None."""
    found = torch.randint(23, (SIZE * 4, 7), generator=torch.Generator().manual_seed(2 * step + kind))
    labels = found.clone()
    labels[1::2, 5:] = -100
    part = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    return {"input_ids": found[part], "attention_mask": torch.ones_like(found)[part], "labels": labels[part]}


def trained(rank, lora):
    student, teacher = model(0), model(1)
    if lora:
        student = with_lora(student)
    if rank is not None:
        mesh = init_device_mesh("cpu", (SIZE,))
        for layer in [m for m in student.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    balancer = BilevelLossBalancer(
        student,
        {"text": TEXT, "teacher": TEACHER},
        optimizer=optimizer,
        teacher=teacher,
        features=lambda losses, outputs, batch: losses,
        weighting=weighting.TermScalars(2, init=0.5).double(),
        meta_loss=TEXT,
        inner="mirror",
    )
    reports = []
    for step in range(3):
        loss = balancer(tokens(step, rank), tokens(step, rank, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reports.append(balancer.report)
    return {
        "student": wholes(p for p in student.parameters() if p.requires_grad),
        "weights": [p.detach() for p in balancer.weighting.parameters()],
        "rows": [(report.losses, report.weights, report.influence) for report in reports],
    }


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_a_sharded_language_model_is_one_process_on_the_joined_batch(pair, lora):
    if lora:
        pytest.importorskip("peft")
    ranks, wanted = pair(trained, lora), trained(None, lora)
    for found in ranks:
        same(found["student"], wanted["student"])
        same(found["weights"], wanted["weights"])
    same(joined_rows(ranks), wanted["rows"])
