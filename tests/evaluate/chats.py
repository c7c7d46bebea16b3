"""Tokenizers with chat templates: the embedded one, with a few special tokens more."""

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lit_moe.assets import model_folder

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + "
    "m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
# No system's message, no generation prompt, a space before each answer.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('only user and assistant') }}{% elif m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
# An empty thought before the last answer, as Qwen3 writes it.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_TEXT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n--\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
# Two roles, so that a system's words would be a turn of the one that is not asked for by name.
NO_USER = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Human: ' + m['content'] + '\n' }}"
    "{% else %}{{ 'Assistant: ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
NO_ASSISTANT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + m['content'] + '\n' }}{% else %}{{ 'Human: ' + m['content'] + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# The last question, and the answer if there is one, of however many there were.
LAST_TURN = (
    "{% for m in messages if m['role'] == 'user' %}{% if loop.last %}"
    "{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if not add_generation_prompt %}{{ messages[-1]['content'] + '<|im_end|>' }}{% endif %}"
)
LAST_FOUR = CHATML.replace("in messages", "in messages[-4:]")
MARKS = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"]
VOCABULARY = 1024 + len(MARKS)


def chatting(template):
    """The embedded tokenizer with a chat template, without a begin of text."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    tokenizer.add_tokens(MARKS, special_tokens=True)
    tokenizer.bos_token = None
    tokenizer.chat_template = template
    return tokenizer


def beginning(template):
    """One that begins every text that it is given with ``<|begin|>``, as Llama's does."""
    tokenizer = chatting(template)
    tokenizer.bos_token = "<|begin|>"
    start = ("<|begin|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[start]
    )
    assert tokenizer("Der").input_ids[0] == start[1]
    return tokenizer
