"""Conversations to the letter, where answers end, and what a taught model writes in them."""

import pytest
import torch
from tokenizers.normalizers import Prepend
from torch.nn.functional import cross_entropy

from lit_moe.data.task_rows import task_rows
from lit_moe.errors import LitMoEError
from lit_moe.evaluate import (
    GenerationOptions,
    Prompting,
    PromptTemplate,
    TaskItem,
    chat_format,
    evaluate_multiple_choice,
    evaluate_task,
    generate_answers,
)
from lit_moe.evaluate.encoding import answer_ids, begun_prompt_ids, prompt_ids
from lit_moe.evaluate.multiple_choice import Question, _choice_nll
from lit_moe.evaluate.task_quality import checked_prompts
from lit_moe.testing import tiny_moe
from tests.evaluate.chats import (
    CHATML,
    LAST_FOUR,
    LAST_TURN,
    LLAMA,
    MISTRAL,
    NO_ASSISTANT,
    NO_USER,
    PLAIN_TEXT,
    THINKING,
    VOCABULARY,
    beginning,
    chatting,
)

WORDING = PromptTemplate("Capital of {question}?", " {answer}.", instruction="One word.\n\n")
SHOT = TaskItem({"question": "Peru"}, ("Lima",))
FRANCE = TaskItem({"question": "France"}, ("Paris",), ("Paris", "Rome"))


def prompting_of(tokenizer, num_shots=1):
    return Prompting(WORDING, [SHOT], num_shots, chat=chat_format(tokenizer))


def test_chatml_to_the_letter():
    prompting = prompting_of(chatting(CHATML))
    assert prompting.prompt(FRANCE) == (
        "<|im_start|>system\nOne word.<|im_end|>\n"
        "<|im_start|>user\nCapital of Peru?<|im_end|>\n"
        "<|im_start|>assistant\nLima.<|im_end|>\n"
        "<|im_start|>user\nCapital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompting.answer("Paris") == "Paris."
    assert prompting.chat.ending == "<|im_end|>"
    assert prompting.chat.end_id == prompting.chat.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_llama_to_the_letter():
    prompting = prompting_of(beginning(LLAMA))
    assert prompting.prompt(FRANCE) == (
        "<|begin|><|head|>system<|/head|>\n\nOne word.<|eot|>"
        "<|head|>user<|/head|>\n\nCapital of Peru?<|eot|>"
        "<|head|>assistant<|/head|>\n\nLima.<|eot|>"
        "<|head|>user<|/head|>\n\nCapital of France?<|eot|>"
        "<|head|>assistant<|/head|>\n\n"
    )
    assert (prompting.answer("Paris"), prompting.chat.ending) == ("Paris.", "<|eot|>")


def test_instructions_open_the_first_message_where_a_system_is_refused():
    prompting = prompting_of(beginning(MISTRAL))
    assert prompting.prompt(FRANCE) == (
        "<|begin|>[INST] One word.\n\nCapital of Peru? [/INST] Lima.<|endoftext|>"
        "[INST] Capital of France? [/INST]"
    )
    assert (prompting.answer("Paris"), prompting.chat.ending) == (" Paris.", "<|endoftext|>")


@pytest.mark.parametrize(
    "silent",
    [
        CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
        # Shows it while it asks, and no more once there is an answer.
        "{% if messages[0].role == 'system' and messages[-1].role == 'user' %}"
        "{{ messages[0].content }}{% endif %}"
        + CHATML.replace(
            "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
        ),
    ],
)
def test_instructions_that_a_template_drops_are_not_lost(silent):
    prompt = prompting_of(chatting(silent), num_shots=0).prompt(FRANCE)
    assert prompt == (
        "<|im_start|>user\nOne word.\n\nCapital of France?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", [NO_USER, NO_ASSISTANT])
def test_instructions_are_no_turn_of_user_or_assistant(template):
    prompt = prompting_of(chatting(template)).prompt(FRANCE)
    assert prompt == (
        "Human: One word.\n\nCapital of Peru?\nAssistant: Lima.\n"
        "Human: Capital of France?\nAssistant:"
    )


def test_a_system_without_a_mark_of_its_own_stays_one():
    bare = NO_USER.replace("{% else %}", "{% elif m.role == 'system' %}{{ m.content }} {% else %}")
    prompt = prompting_of(chatting(bare), num_shots=0).prompt(FRANCE)
    assert prompt == "One word. Human: Capital of France?\nAssistant:"


@pytest.mark.parametrize("template", [LAST_TURN, LAST_FOUR])
def test_examples_that_a_template_leaves_out_are_refused(template):
    tokenizer = chatting(template)
    message = (
        r"^1 examples before the question were asked for, but .* leaves earlier turns out; use"
    )
    with pytest.raises(LitMoEError, match=message):
        prompting_of(tokenizer).prompt(FRANCE)
    assert "One word.\n\nCapital" in prompting_of(chatting(LAST_TURN), 0).prompt(FRANCE)


def test_a_template_that_takes_no_long_conversation_still_asks_without_examples():
    short = "{% if messages | length > 4 %}{{ raise_exception('too long') }}{% endif %}" + CHATML
    with pytest.raises(LitMoEError, match="1 examples before the question were asked for"):
        prompting_of(chatting(short)).prompt(FRANCE)
    assert "Capital of France?" in prompting_of(chatting(short), 0).prompt(FRANCE)


def test_without_an_instruction_there_is_no_system():
    prompting = Prompting(PromptTemplate("{question}"), chat=chat_format(chatting(CHATML)))
    assert prompting.prompt(FRANCE) == (
        "<|im_start|>user\nFrance<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_empty_thought_is_part_of_the_prompt():
    prompting = prompting_of(chatting(THINKING), num_shots=0)
    assert prompting.prompt(FRANCE).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert (prompting.answer("Paris"), prompting.chat.ending) == ("Paris.", "<|im_end|>")


def test_a_turn_that_ends_with_plain_text_ends_answers_there():
    tokenizer = chatting(PLAIN_TEXT)
    chat = chat_format(tokenizer)
    assert (chat.lead, chat.ending, chat.end_id, chat.stop) == (" ", "\n--\n", None, ("\n--\n",))
    free = generate_answers(
        tiny_moe("mixtral", vocab_size=VOCABULARY), tokenizer, ["Der"], GenerationOptions(8, ())
    )[0]
    tokenizer.chat_template = PLAIN_TEXT.replace("\n--\n", free[2:4])
    cut = generate_answers(
        tiny_moe("mixtral", vocab_size=VOCABULARY),
        tokenizer,
        ["Der"],
        GenerationOptions(8, ()),
        chat=chat_format(tokenizer),
    )[0]
    assert cut == free[: free.find(free[2:4])]


def test_a_template_that_ends_turns_with_nothing_gets_the_end_of_text():
    bare = chatting(MISTRAL.replace(" + eos_token", ""))
    bare.bos_token = "<|begin|>"
    chat = chat_format(bare)
    assert (chat.ending, chat.end_id) == ("<|endoftext|>", bare.eos_token_id)
    bare.eos_token = None
    assert chat_format(bare).ending == ""
    rows = task_rows(
        [FRANCE], bare, [Prompting(WORDING, chat=chat_format(bare))], sequence_length=99, ending="|"
    )
    assert bare.decode(rows[0]["labels"][rows[0]["labels"] >= 0]) == " Paris.|"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; use chat: false"),
        (
            "{% if add_generation_prompt %}ask{% else %}told{{ messages[-1].content }}{% endif %}",
            r"asks with 'ask', but writes the answered conversation as 'toldForty-two', which does",
        ),
        (CHATML.replace("m['content']", "m['content'] | upper"), "does not go on from there"),
        (CHATML.replace("\n' }}{% endfor", "' + loop.index | string }}{% endfor"), "after an exam"),
        ("{{ raise_exception('no talk') }}", r"refuses a conversation of user \(no talk\)"),
        ("{{ messages[0].nothing.more }}", "refuses a conversation of user"),
        ("{{ 1 + messages[0].content }}", "refuses a conversation of user"),
        ({"tools": CHATML}, "multiple chat templates with no default"),
    ],
)
def test_templates_that_answers_cannot_be_taken_from_are_refused(template, message):
    with pytest.raises(LitMoEError, match=message):
        chat_format(chatting(template))


def test_the_default_of_several_templates_is_taken():
    chat = chat_format(chatting({"tools": MISTRAL, "default": CHATML}))
    assert chat.ending == "<|im_end|>"


@pytest.mark.parametrize("template", [LLAMA, MISTRAL])
def test_a_conversation_begins_once(template):
    tokenizer = beginning(template)
    prompting = prompting_of(tokenizer)
    texts = [prompting.prompt(FRANCE)]
    for encode in (prompt_ids, begun_prompt_ids):
        (row,) = encode(tokenizer, texts, prompting.chat)
        assert row.count(tokenizer.bos_token_id) == 1
        assert row[0] == tokenizer.bos_token_id
    (plain,) = begun_prompt_ids(tokenizer, ["France"])
    assert plain == prompt_ids(tokenizer, ["France"])[0]


@pytest.mark.parametrize("marks_begins", [False, True])
def test_answers_have_the_tokens_of_the_whole_conversation(marks_begins):
    tokenizer = beginning(MISTRAL)
    if marks_begins:  # as tokenizers do that begin every text with a space
        tokenizer.backend_tokenizer.normalizer = Prepend("~")
        assert tokenizer.decode(tokenizer(" Paris", add_special_tokens=False).input_ids)[0] == "~"
    prompting = prompting_of(tokenizer, 0)
    prompt, answer = prompting.prompt(FRANCE), prompting.answer("Paris")
    (ids,) = answer_ids(tokenizer, [prompt], [answer], prompting.chat)
    (start,) = prompt_ids(tokenizer, [prompt], prompting.chat)
    rendered = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "One word.\n\nCapital of France?"},
            {"role": "assistant", "content": "Paris."},
        ]
    )["input_ids"]
    assert start + ids == rendered


def test_an_answer_that_would_grow_together_with_its_prompt_is_tokenized_apart():
    tokenizer = chatting(MISTRAL)
    tokenizer.bos_token = "<|begin|>"
    together, start, answer = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in ("ou<|endoftext|>", "o", "u<|endoftext|>")
    )
    assert together != start + answer
    assert answer_ids(tokenizer, ["o"], ["u"], chat_format(tokenizer)) == [answer]


def test_choices_are_as_likely_as_the_whole_turn():
    tokenizer = beginning(LLAMA)
    prompting = prompting_of(tokenizer, 0)
    model = tiny_moe("mixtral", vocab_size=VOCABULARY).eval()
    prompt = prompting.prompt(FRANCE)
    question = Question(prompt, tuple(map(prompting.answer, FRANCE.choices)), 0)
    found = _choice_nll(model, tokenizer, question, prompting.chat)
    for nats, choice in zip(found, FRANCE.choices, strict=True):
        turn = tokenizer(f"{choice}.<|eot|>", add_special_tokens=False).input_ids
        whole = tokenizer(prompt, add_special_tokens=False).input_ids + turn
        logits = model(torch.tensor([whole])).logits[0, -len(turn) - 1 : -1]
        expected = cross_entropy(logits, torch.tensor(turn), reduction="sum")
        torch.testing.assert_close(nats, expected, rtol=1e-4, atol=1e-4)
    right = evaluate_multiple_choice(model, tokenizer, [question], chat=prompting.chat)
    assert right.accuracy == float((found / torch.tensor([6, 5])).argmin() == 0)


CAPITALS = {"France": "Paris", "Peru": "Lima", "Norway": "Oslo", "Japan": "Tokyo"}


@pytest.fixture(scope="module", params=[CHATML, THINKING], ids=["chatml", "thinking"])
def taught(request):
    """A tiny model that learnt to answer four questions in a chat."""
    tokenizer = chatting(request.param)
    items = [
        TaskItem({"question": country}, (city,), tuple(CAPITALS.values()))
        for country, city in CAPITALS.items()
    ]
    prompting = prompting_of(tokenizer, 0)
    rows = task_rows(items, tokenizer, [prompting], sequence_length=128, ending="\n")
    batch = torch.utils.data.default_collate([rows[i] for i in range(len(rows))])
    torch.manual_seed(0)
    model = tiny_moe("mixtral", vocab_size=VOCABULARY)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer, items, prompting


def test_a_taught_model_answers_in_a_chat_and_not_in_running_text(taught):
    model, tokenizer, items, prompting = taught
    options = GenerationOptions(max_new_tokens=12, stop=())
    found = evaluate_task(model, tokenizer, items, prompting=prompting, generation=options)
    assert (found.exact_match, found.f1, found.choice_accuracy) == (1.0, 1.0, 1.0)
    plain = evaluate_task(model, tokenizer, items, prompting=Prompting(WORDING), generation=options)
    assert plain.exact_match < 1.0


def test_what_a_taught_model_writes_ends_with_its_turn(taught):
    model, tokenizer, items, prompting = taught
    chat, prompts = prompting.chat, [prompting.prompt(item) for item in items]
    options = GenerationOptions(max_new_tokens=12, stop=())
    steps = []
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    written = generate_answers(model, tokenizer, prompts, options, chat=chat)
    hook.remove()
    assert written == [f"{city}." for city in CAPITALS.values()]
    longest = max(len(ids) for ids in answer_ids(tokenizer, prompts, written, chat))
    assert len(steps) == longest, "no token is written behind the end of the turn"


@pytest.mark.parametrize("end", ["list", "number"])
def test_the_generation_config_may_name_ends_of_its_own(taught, end):
    model, tokenizer, items, prompting = taught
    point = tokenizer(".", add_special_tokens=False).input_ids[-1]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [0, point] if end == "list" else point
    prompts = [prompting.prompt(item) for item in items]
    written = generate_answers(
        model, tokenizer, prompts, GenerationOptions(12, ()), chat=prompting.chat
    )
    model.generation_config.eos_token_id = before
    assert written == list(CAPITALS.values())


def test_conversations_longer_than_the_context_are_told_as_ever():
    tokenizer = chatting(CHATML)
    model = tiny_moe("mixtral", vocab_size=VOCABULARY)
    long = TaskItem({"question": "word " * model.config.max_position_embeddings}, ("no",))
    with pytest.raises(LitMoEError, match=r"longest prompt has \d+ tokens.*use fewer examples"):
        checked_prompts(
            model,
            tokenizer,
            [long],
            prompting=prompting_of(tokenizer, 0),
            generation=GenerationOptions(),
        )
