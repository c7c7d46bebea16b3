"""Questions with a few predicted places, and a 12-layer model that has learnt to answer them.

A question is a row of tokens, some of them of one topic; its answer is the two tokens that name the
topic, and an end. It is made up, so that the model can be trained in two minutes; what is pruned
from it then costs right answers, as in real models, which random weights would not show.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from lit_moe.search import SplitData

LAYERS, EXPERTS, HIDDEN, VOCABULARY = 12, 8, 128, 1024
TOPICS, WORDS, OF_TOPIC = 12, 64, 0.5
SHORTEST, LONGEST = 14, 24
STEPS, PER_STEP = 140, 64
_IGNORED = -100
_FIRST_WORD = 3 + 2 * TOPICS


def trained_model() -> MixtralForCausalLM:
    """Return the model; the same on one machine."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
    )
    model = MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for step in range(STEPS):
        model(**_stacked(questions(PER_STEP, seed=1000 + step))).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.config.output_router_logits = False
    return model.eval()


def questions(num: int, *, seed: int) -> SplitData:
    """Return so many questions; other ones for another seed."""
    words = torch.randint(
        _FIRST_WORD, VOCABULARY, (TOPICS, WORDS), generator=torch.Generator().manual_seed(0)
    )
    draw = torch.Generator().manual_seed(seed)
    return SplitData([_question(words, draw) for _ in range(num)])


def _question(words: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    length = int(torch.randint(SHORTEST, LONGEST + 1, (1,), generator=draw))
    topic = int(torch.randint(TOPICS, (1,), generator=draw))
    told = words[topic][torch.randint(WORDS, (length,), generator=draw)]
    other = torch.randint(_FIRST_WORD, VOCABULARY, (length,), generator=draw)
    prompt = torch.where(torch.rand(length, generator=draw) < OF_TOPIC, told, other)
    answer = torch.tensor([3 + 2 * topic, 4 + 2 * topic, 0])
    padding = torch.zeros(LONGEST - length, dtype=torch.long)
    ids = torch.cat([prompt, answer, padding])
    labels = torch.full_like(ids, _IGNORED)
    labels[length : length + 3] = answer
    mask = torch.ones_like(ids)
    mask[length + 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _stacked(data: SplitData) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in data.rows]) for name in data.rows[0]}
