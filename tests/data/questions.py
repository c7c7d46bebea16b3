"""Small sets of questions, and looks at the rows that a data module makes of them."""

from types import SimpleNamespace

from lit_moe.data import TaskDataModule
from lit_moe.evaluate import PromptTemplate, TaskItem

PLAIN = PromptTemplate()


def item(question, *answers, choices=()):
    return TaskItem({"question": question}, answers or ("yes",), choices, f"<{question}>")


def numbered(numbers, prefix="What is"):
    return [{"question": f"{prefix} {n}?", "answer": f"number {n}"} for n in numbers]


def data_of(train, **options):
    defaults = {"tokenizer": "embedded", "batch_size": 2, "evaluated_shots": [0]}
    return TaskDataModule(train_files=[train], **{**defaults, **options})


def on_rank(data, rank, world_size):
    """Let a data module believe that it serves one of several processes."""
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, accumulate_grad_batches=1, lightning_module=None
    )
    return data


def spelt(data, batch):
    """The text of each row, without padding."""
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [data.tokenizer.decode(ids[mask.bool()]) for ids, mask in rows]


def rows_of(data, split):
    blocks = data.blocks(split)
    return [blocks[index] for index in range(len(blocks))]
