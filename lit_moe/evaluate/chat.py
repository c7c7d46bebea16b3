"""Prompts in the chat format of a tokenizer: turns of a conversation instead of running text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lit_moe.errors import LitMoEError

Message = dict[str, str]

_SYSTEM = "Reply with one number."
_QUESTION, _WORDS = "How many are they?", "Forty-two"
_EXAMPLES = 16


@dataclass(frozen=True)
class ChatFormat:
    """How the chat template of a tokenizer words a conversation and the answer to it.

    Made by :func:`chat_format`, which finds all but the first by asking the template.

    Attributes:
        tokenizer: renders the conversation with its template.
        takes_system: whether instructions are a message of their own; if not, they open the
            first message of the user.
        shows_examples: whether the turns before the last question are shown.
        opening: what the template writes between its generation prompt and an answer, for instance
            an empty thought; part of every prompt, so that the model answers at once.
        lead: spaces between the prompt and the words of an answer.
        ending: what ends an answer: the end-of-turn token and what the template has before it; what
            follows it is the template's, not the model's.
        end_id: the end-of-turn token; None where a turn ends with plain text or with nothing.
    """

    tokenizer: PreTrainedTokenizerBase
    takes_system: bool
    shows_examples: bool
    opening: str
    lead: str
    ending: str
    end_id: int | None

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer, beside the end-of-turn token."""
        return (self.ending,) if self.ending and self.end_id is None else ()

    def prompt(self, instruction: str, examples: Sequence[tuple[str, str]], question: str) -> str:
        """Return a conversation up to where the answer begins, special tokens spelt out.

        Args:
            instruction: for the system's message; none if it is blank.
            examples: pairs of what the user asked and what was answered.
            question: what the user asks at last.

        Raises:
            LitMoEError: if the template refuses the conversation, or does not show the examples.
        """
        if examples and not self.shows_examples:
            raise LitMoEError(
                f"{len(examples)} examples before the question were asked for, but the chat "
                f"template of {self.tokenizer.name_or_path!r} leaves earlier turns out; use 0 "
                "examples, chat: false, or a template that shows the whole conversation"
            )
        messages = _messages([*(text for pair in examples for text in pair), question])
        instruction = instruction.strip()
        if instruction and self.takes_system:
            messages = [{"role": "system", "content": instruction}, *messages]
        elif instruction:
            messages[0]["content"] = f"{instruction}\n\n{messages[0]['content']}"
        return _rendered(self.tokenizer, messages, asks=True) + self.opening


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Return the chat format of a tokenizer.

    Raises:
        LitMoEError: if the tokenizer has no chat template, or one whose answered conversations do
            not begin with what is asked, so that answers could be neither learnt nor compared.
    """
    if tokenizer.chat_template is None:
        raise LitMoEError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use chat: false, "
            "or name a tokenizer that has one"
        )
    after_one = _continuation(tokenizer, _messages([_QUESTION]))
    after_two = _continuation(tokenizer, _messages([_QUESTION, _WORDS, _QUESTION]))
    if after_one != after_two:
        raise LitMoEError(
            f"the chat template of {tokenizer.name_or_path!r} writes an answer as "
            f"{''.join(after_one)!r} and after an example as {''.join(after_two)!r}; use chat: "
            "false, or a template that writes both alike"
        )
    head, tail = after_one[0], after_one[2]
    opening = head.rstrip(" ")
    ending, end_id = _ending(tokenizer, tail)
    return ChatFormat(
        tokenizer,
        _takes_system(tokenizer, after_one),
        _shows_examples(tokenizer),
        opening,
        head[len(opening) :],
        ending,
        end_id,
    )


def _messages(texts: Sequence[str]) -> list[Message]:
    """Return texts as messages of user and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, asks: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=asks
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise LitMoEError(
            f"the chat template of {tokenizer.name_or_path!r} refuses a conversation of "
            f"{', '.join(message['role'] for message in messages)} ({error}); use chat: false, or "
            "another template"
        ) from error
    return str(text)


def _continuation(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[str, str, str]:
    """Return what the template writes before an answer, the answer, and what it writes after it.

    Raises:
        LitMoEError: if the answered conversation does not begin with the prompt, or the words of
            the answer are not in it.
    """
    prompt = _rendered(tokenizer, messages, asks=True)
    answer = {"role": "assistant", "content": _WORDS}
    whole = _rendered(tokenizer, [*messages, answer], asks=False)
    if not whole.startswith(prompt) or _WORDS not in whole[len(prompt) :]:
        raise LitMoEError(
            f"the chat template of {tokenizer.name_or_path!r} asks with {prompt[-60:]!r}, but "
            f"writes the answered conversation as {whole[-60:]!r}, which does not go on from "
            "there; use chat: false, or a template whose prompts are the beginning of what it "
            "writes with the answer"
        )
    return whole[len(prompt) :].partition(_WORDS)


def _takes_system(tokenizer: PreTrainedTokenizerBase, after: tuple[str, str, str]) -> bool:
    """Whether a system's message is shown as what it is, and answers go on as without it.

    Templates that know two roles word it as a turn of the user or of the assistant.
    """
    messages = [{"role": "system", "content": _SYSTEM}, *_messages([_QUESTION])]
    try:
        shown = _rendered(tokenizer, messages, asks=True)
        if _SYSTEM not in shown or _continuation(tokenizer, messages) != after:
            return False
    except LitMoEError:
        return False
    return all(_begun_by(tokenizer, role) != shown for role in ("user", "assistant"))


def _begun_by(tokenizer: PreTrainedTokenizerBase, role: str) -> str | None:
    """Return the conversation with the system's words in the mouth of another; None if refused."""
    messages = [{"role": role, "content": _SYSTEM}, *_messages([_QUESTION])]
    try:
        return _rendered(tokenizer, messages, asks=True)
    except LitMoEError:
        return None


def _shows_examples(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a long conversation is taken, and shows every turn."""
    texts = [f"Text {n} of many." for n in range(2 * _EXAMPLES + 1)]
    try:
        shown = _rendered(tokenizer, _messages(texts), asks=True)
    except LitMoEError:
        return False
    return all(text in shown for text in texts)


def _ending(tokenizer: PreTrainedTokenizerBase, tail: str) -> tuple[str, int | None]:
    """Return what ends a turn, up to and with its special token, and that token.

    Where the template writes nothing, or spaces, the end of text is taken.
    """
    added = tokenizer.added_tokens_decoder.items()
    specials = {token.content: number for number, token in added if token.special}
    specials |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    found = [(tail.find(token), -len(token), token) for token in specials if token in tail]
    if found:
        at, _, token = min(found)
        return tail[: at + len(token)], specials[token]
    if tail.strip(" ") or tokenizer.eos_token is None:
        return tail.strip(" "), None
    return str(tokenizer.eos_token), tokenizer.eos_token_id
