"""How a question is put to a model: the templates of arXiv 2509.21044, a chat template, or one's own.

    plain            the question as it is
    chat             the tokenizer's own chat template, the question as the user's turn
    deepseek-math    DeepSeek-Math; the paper used it for DeepSeek-R1-Distill-Qwen and AceReason as well
    mistral          Mistral SFT and Math-Shepherd
    qwen25-math      Qwen2.5-Math and what was trained from it

Anything that contains ``{question}`` is a template of one's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eaptk.errors import EaptkError

_QUESTION = "{question}"
_STEPS = r"Please reason step by step, and put your final answer within \boxed{}."


@dataclass(frozen=True)
class Template:
    """Args:
    text: with ``{question}`` where the question goes.
    stop: tokens that end an answer besides those of the model's own generation config.
    """

    text: str
    stop: tuple[str, ...] = ()


#: Texts and end tokens as the code of the paper has them.
TEMPLATES = {
    "plain": Template(_QUESTION),
    "deepseek-math": Template(f"User: {_QUESTION}\n{_STEPS}\n\nAssistant:"),
    "mistral": Template(f"[INST] {_QUESTION}[/INST]"),
    "qwen25-math": Template(
        f"<|im_start|>system\n{_STEPS}<|im_end|>\n<|im_start|>user\n{_QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        ("<|im_end|>", "<|endoftext|>"),
    ),
}
CHAT = "chat"


def find_template(prompt: str) -> Template | None:
    """The template of a name, or of a text with ``{question}`` in it; None for ``chat``.

    Raises:
        EaptkError: it is neither.
    """
    if prompt == CHAT:
        return None
    if prompt in TEMPLATES:
        return TEMPLATES[prompt]
    if _QUESTION in prompt:
        return Template(prompt)
    names = [*TEMPLATES, CHAT]
    close = difflib.get_close_matches(prompt, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
    raise EaptkError(f"prompt {prompt!r} is no template: {hint} (a text of your own needs {_QUESTION} in it)")


def prompt_tokens(prompt: str, questions: Sequence[str], tokenizer: Any) -> list[tuple[int, ...]]:
    """Tokens of every question's prompt, with the special tokens that the tokenizer adds by default.

    Raises:
        EaptkError: no such template, or ``chat`` with a tokenizer that has no chat template.
    """
    template = find_template(prompt)
    if template is not None:
        # Not str.format: templates and questions are full of braces.
        texts = [template.text.replace(_QUESTION, question) for question in questions]
        return [tuple(tokenizer(text)["input_ids"]) for text in texts]
    if not getattr(tokenizer, "chat_template", None):
        raise EaptkError("prompt 'chat' needs a tokenizer with a chat template; name a template instead")
    try:
        return [
            tuple(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=False,
                )
            )
            for question in questions
        ]
    except Exception as error:  # whatever the template's own code raises
        raise EaptkError(f"the tokenizer's chat template fails: {' '.join(str(error).split())}") from error


def stop_tokens(stop: Sequence[str], tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer.

    Raises:
        EaptkError: one is no single token of this tokenizer.
    """
    found = []
    for text in stop:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise EaptkError(f"{text!r} is no single token of the tokenizer, so it cannot end an answer")
        found.append(int(ids[0]))
    return found
