"""LiteLLM against a running server: python frameworks_litellm.py BASE_URL"""

import os
import sys

# Prices and model names are in the package; nothing is to be fetched.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

litellm.suppress_debug_info = True

CHAT = "openai/smollm2-135m-instruct"
EMBED = "openai/all-minilm-l6-v2"
MESSAGES = [{"role": "user", "content": "Name three colours."}]


def main(base_url: str) -> None:
    to = {"api_base": base_url, "api_key": "none", "num_retries": 0}
    request = {"model": CHAT, "messages": MESSAGES, "max_tokens": 24, "temperature": 0, **to}
    whole = litellm.completion(**request)
    text = whole.choices[0].message.content
    assert "Red" in text, text
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = litellm.completion(**request, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    several = litellm.completion(**request | {"temperature": 1}, n=2, seed=4, frequency_penalty=0.5)
    assert [choice.index for choice in several.choices] == [0, 1]

    vectors = litellm.embedding(model=EMBED, input=["a small lamp", "a wall bracket"], **to)
    assert [len(item["embedding"]) for item in vectors.data] == [384, 384]
    try:
        litellm.completion(**request | {"n": 300})
    except litellm.BadRequestError as error:
        assert "limits.max_choices" in str(error), error
    else:
        raise AssertionError("300 choices were accepted")
    print("all is well")


if __name__ == "__main__":
    main(sys.argv[1])
