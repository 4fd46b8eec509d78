"""Write the model folder of the tool example: the demo's tiny Qwen3-MoE with a vocabulary and template for tool calls.

    python -m examples.tools.make_model FOLDER

It writes a config and a tokenizer, no weights. As in the vocabularies of larger models, the fixed parts of a tool call
are tokens of their own; everything else, such as the expression in it, is written character by character.
"""

import sys
from pathlib import Path

from examples.demo.make_model import CONFIG, TOKENIZER, TOKENIZER_CONFIG, VOCABULARY, write_files

PIECES = ("<tool_call>", "</tool_call>", '{"name": "', "calculator", '", "arguments": {"expression": "', '"}}')
TEMPLATE = """\
{%- if tools %}t:{% for tool in tools %}{{ tool.function.name }}{{ '\\n' }}{% endfor %}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}r:{% else %}{{ message.role[0] }}:{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n' }}{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
{{- '\\n</tool_call>' }}
{%- endfor %}{{ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}a:{% endif %}"""
"""`t:` names the tools that are offered, `u:` begins a question, `a:` an answer, and `r:` the result of a tool."""


def write_model(folder: Path) -> None:
    """Write config.json, tokenizer.json and tokenizer_config.json into `folder`."""
    vocabulary = [*VOCABULARY, *'{}"', *PIECES]
    pattern = "|".join([*(piece.replace("{", r"\{").replace("}", r"\}") for piece in PIECES), r"[\s\S]"])
    files = {
        "config": CONFIG | {"vocab_size": len(vocabulary)},
        "tokenizer": TOKENIZER
        | {
            "pre_tokenizer": TOKENIZER["pre_tokenizer"] | {"pattern": {"Regex": pattern}},
            "model": TOKENIZER["model"] | {"vocab": {token: number for number, token in enumerate(vocabulary)}},
        },
        "tokenizer_config": TOKENIZER_CONFIG | {"chat_template": TEMPLATE},
    }
    write_files(folder, files)


if __name__ == "__main__":
    write_model(Path(sys.argv[1]))
