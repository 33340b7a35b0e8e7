"""Makes smollm2_chat_template.json: chats rendered with the model's own template."""

import argparse
from pathlib import Path

from gguf import GGUFReader
from transformers.utils.chat_template_utils import render_jinja_template

from common import made_with, sha256, write_json
from smollm2 import field, render
from texts import TEMPLATE_CHATS

args = argparse.ArgumentParser(description=__doc__)
args.add_argument("gguf", help="SmolLM2-135M-Instruct.Q4_1.gguf")
args.add_argument("out", type=Path, help="folder to write to")
args = args.parse_args()

reader = GGUFReader(args.gguf)
template = field(reader, "tokenizer.chat_template")


def by_transformers(messages, prompt):
    rendered, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=prompt
    )
    return rendered[0]


rows = []
for messages in TEMPLATE_CHATS:
    for prompt in (True, False):
        rendered = by_transformers(messages, prompt)
        assert rendered == render(reader, messages, prompt), messages
        rows.append({"messages": messages, "add_generation_prompt": prompt, "rendered": rendered})

head = {
    "made_with": made_with("transformers", "jinja2", "gguf"),
    "model": Path(args.gguf).name,
    "model_sha256": sha256(args.gguf),
    "template": template,
}
write_json(args.out / "smollm2_chat_template.json", head, "cases", rows)
print(len(rows), "cases")
