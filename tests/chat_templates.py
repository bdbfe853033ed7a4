"""Chat templates in the manner of the families that are served, written for the tests.

Most families differ in a few strings; `turns` makes a template of those. The others are written out.
"""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """A chat template with the special tokens that it writes, and the one that ends an answer."""

    template: str
    special: tuple[str, ...]
    end: str


def turns(
    system: str, user: str, answer: str, prompt: str, special: str, *, bos: str = "", trim: bool = False
) -> Family:
    """A template of strings around contents; `{}` is the content, `prompt` asks for an answer; special tokens by blanks.

    The first special token ends an answer.
    """

    def piece(pattern: str) -> str:
        before, _, after = pattern.partition("{}")
        content = "m.content | trim" if trim else "m.content"
        return "{{ " + repr(before) + " ~ (" + content + ") ~ " + repr(after) + " }}"

    template = (
        ("{{ " + repr(bos) + " }}" if bos else "")
        + "{% for m in messages %}{% if m.role == 'system' %}" + piece(system)
        + "{% elif m.role == 'user' %}" + piece(user)
        + "{% else %}" + piece(answer) + "{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}{{ " + repr(prompt) + " }}{% endif %}"
    )  # fmt: skip
    tokens = tuple(special.split())
    return Family(template, tokens, tokens[0])


def alike(
    pattern: str, prompt: str, special: str, *, bos: str = "", trim: bool = False, assistant: str = "assistant"
) -> Family:
    """`turns` that differ in the role's name (`ROLE`) alone."""
    system, user, answer = (pattern.replace("ROLE", role) for role in ("system", "user", assistant))
    return turns(system, user, answer, prompt, special, bos=bos, trim=trim)


CHATML = ("<|im_start|>ROLE\n{}<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|> <|im_start|>")

# earlier answers lose what comes up to </think>
_NO_THOUGHT = "(m.content.split('</think>')[-1].lstrip('\\n') if not loop.last else m.content)"
QWEN3 = Family(
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ (" + _NO_THOUGHT + " if m.role == 'assistant' "
    "else m.content) ~ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ("<|im_end|>", "<|im_start|>"),
    "<|im_end|>",
)
DEEPSEEK_R1 = Family(
    "{{ '<|bos|>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' ~ m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<|Assistant|>' ~ m.content.split('</think>')[-1] ~ '<|eos|>' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}",
    ("<|eos|>", "<|bos|>", "<|User|>", "<|Assistant|>"),
    "<|eos|>",
)
SYSTEM_IN_LAST_TURN = Family(  # Mistral v0.3 and later
    "{{ '<s>' }}{% set said = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | join %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' ~ (said ~ '\\n\\n' if loop.last and said else '') ~ m.content ~ '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' ~ m.content ~ '</s>' }}{% endif %}{% endfor %}",
    ("</s>", "<s>", "[INST]", "[/INST]"),
    "</s>",
)
HARMONY = Family(
    "{% for m in messages %}{{ '<|start|>' ~ m.role ~ ('<|channel|>final' if m.role == 'assistant' else '') ~ '<|message|>' "
    "~ m.content ~ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    ("<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
    "<|return|>",
)
SYSTEM_IN_FIRST_TURN = Family(  # Gemma
    "{{ '<bos>' }}{% set ns = namespace(said='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.said = m.content ~ '\\n\\n' %}"
    "{% else %}{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else 'user') ~ '\\n' ~ ns.said ~ (m.content | trim) ~ '<end_of_turn>\\n' }}"
    "{% set ns.said = '' %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ("<end_of_turn>", "<bos>", "<start_of_turn>"),
    "<end_of_turn>",
)
LLAMA2 = turns("<<SYS>>\n{}\n<</SYS>>\n\n", "<s>[INST] {} [/INST]", " {} </s>", "", "</s> <s>", trim=True)
_HEADED = "<|start_header_id|>ROLE<|end_header_id|>\n\n{}<|eot_id|>"
_MARKED = "<|ROLE|>\n{}<|end|>\n"

FAMILIES: dict[str, Family] = {
    "llama2": LLAMA2,
    "llama3": alike(
        _HEADED,
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|> <|start_header_id|> <|end_header_id|> <|begin_of_text|>",
        bos="<|begin_of_text|>",
        trim=True,
    ),
    "llama4": alike(
        "<|header_start|>ROLE<|header_end|>\n\n{}<|eot|>",
        "<|header_start|>assistant<|header_end|>\n\n",
        "<|eot|> <|header_start|> <|header_end|>",
    ),
    "chatml": alike(*CHATML),
    "qwen2": alike(*CHATML, trim=True),
    "qwen3": QWEN3,
    "mistral_v1": turns("{}\n\n", "[INST] {} [/INST]", "{}</s>", "", "</s> <s>", bos="<s>"),
    "mistral_v3": SYSTEM_IN_LAST_TURN,
    "mistral_tekken": turns(
        "[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]", "[INST]{}[/INST]", "{}</s>", "", "</s> <s> [INST] [/INST]", bos="<s>"
    ),
    "gemma": SYSTEM_IN_FIRST_TURN,
    "phi3": alike(_MARKED, "<|assistant|>\n", "<|end|> <|system|> <|user|> <|assistant|>"),
    "phi4": alike("<|im_start|>ROLE<|im_sep|>{}<|im_end|>", "<|im_start|>assistant<|im_sep|>", "<|im_end|> <|im_start|> <|im_sep|>"),
    "gpt_oss": HARMONY,
    "deepseek_v2": turns("{}\n\n", "User: {}\n\n", "Assistant: {}<|eos|>", "Assistant:", "<|eos|> <|bos|>", bos="<|bos|>"),
    "deepseek_v3": turns("{}", "<|User|>{}", "<|Assistant|>{}<|eos|>", "<|Assistant|>", "<|eos|> <|User|> <|Assistant|>"),
    "deepseek_r1": DEEPSEEK_R1,
    "command_r": turns(
        "<|START|><|SYSTEM|>{}<|END|>", "<|START|><|USER|>{}<|END|>", "<|START|><|CHATBOT|>{}<|END|>", "<|START|><|CHATBOT|>",
        "<|END|> <|START|> <|SYSTEM|> <|USER|> <|CHATBOT|>", trim=True,
    ),
    "granite": alike(
        "<|start_of_role|>ROLE<|end_of_role|>{}<|end_of_text|>\n", "<|start_of_role|>assistant<|end_of_role|>",
        "<|end_of_text|> <|start_of_role|> <|end_of_role|>",
    ),
    "olmo": turns("<|system|>\n{}\n", "<|user|>\n{}\n", "<|assistant|>\n{}<|endoftext|>\n", "<|assistant|>\n", "<|endoftext|>"),
    "smollm": alike(*CHATML),
    "zephyr": alike("<|ROLE|>\n{}</s>\n", "<|assistant|>\n", "</s>"),
    "vicuna": turns("{} ", "USER: {} ", "ASSISTANT: {}</s>", "ASSISTANT:", "</s>"),
    "alpaca": turns("{}\n\n", "### Instruction:\n{}\n\n", "### Response:\n{}\n\n", "### Response:\n", "</s>"),
    "falcon": turns("System: {}\n", "User: {}\n", "Falcon: {}\n", "Falcon:", "<|endoftext|>"),
    "falcon3": turns("<|system|>\n{}\n", "<|user|>\n{}\n", "<|assistant|>\n{}<|endoftext|>\n", "<|assistant|>\n", "<|endoftext|>"),
    "yi": alike(*CHATML),
    "internlm": alike(*CHATML, bos="<s>"),
    "glm4": turns("<|system|>\n{}", "<|user|>\n{}", "<|assistant|>\n{}", "<|assistant|>\n", "<|endoftext|> <|system|> <|user|> <|assistant|>"),
    "baichuan": turns("{}", "<reserved_106>{}", "<reserved_107>{}", "<reserved_107>", "</s> <reserved_106> <reserved_107>"),
    "starchat": alike("<|ROLE|>\n{}<|end|>\n", "<|assistant|>\n", "<|end|> <|system|> <|user|> <|assistant|>"),
    "solar": turns("### System:\n{}\n\n", "### User:\n{}\n\n", "### Assistant:\n{}</s>\n\n", "### Assistant:\n", "</s>"),
    "jamba": turns("<|bom|><|system|> {}<|eom|>", "<|bom|><|user|> {}<|eom|>", "<|bom|><|assistant|> {}<|eom|>", "<|bom|><|assistant|>", "<|eom|> <|bom|>"),
    "nemotron": turns("<extra_0>System\n{}\n", "<extra_1>User\n{}\n", "<extra_1>Assistant\n{}\n", "<extra_1>Assistant\n", "</s> <extra_0> <extra_1>", trim=True),
    "exaone": turns("[|system|]{}[|endofturn|]\n", "[|user|]{}\n", "[|assistant|]{}[|endofturn|]\n", "[|assistant|]", "[|endofturn|] [|user|] [|assistant|]"),
    "minicpm": turns("{}", "<user>{}", "<AI>{}", "<AI>", "</s>", trim=True),
    "hunyuan": turns("{}<|extra_4|>", "{}<|extra_0|>", "{}<|eos|>", "", "<|eos|> <|extra_0|> <|extra_4|>"),
    "kimi": alike("<|im_ROLE|>ROLE<|im_middle|>{}<|im_end|>", "<|im_assistant|>assistant<|im_middle|>", "<|im_end|> <|im_system|> <|im_user|> <|im_assistant|> <|im_middle|>"),
    "ernie": turns("{}\n", "User: {}\n", "Assistant: {}<|end_of_sentence|>", "Assistant: ", "<|end_of_sentence|>"),
    "seed_oss": alike("<seed:bos>ROLE\n{}<seed:eos>", "<seed:bos>assistant\n", "<seed:eos> <seed:bos>"),
    "apertus": alike("<|ROLE_start|>{}<|ROLE_end|>", "<|assistant_start|>", "<|assistant_end|> <|assistant_start|> <|user_start|> <|user_end|>"),
    "dots": alike("<|ROLE|>{}<|endofROLE|>", "<|assistant|>", "<|endofassistant|> <|assistant|> <|user|>"),
    "shouting": turns("{}\n", "Q: {}\n", "A: {}\n", "A:", "</s>")._replace(
        template="{% for m in messages %}{{ m.role ~ ': ' ~ (m.content | upper) ~ '\n' }}{% endfor %}{{ 'assistant:' }}"
    ),
}  # fmt: skip
