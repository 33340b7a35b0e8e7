"""The OpenAI Python SDK, unchanged, against a running server: python openai_sdk.py BASE_URL"""

import sys

import openai

CHAT = "smollm2-135m-instruct"
EMBED = "all-minilm-l6-v2"
MESSAGES = [{"role": "user", "content": "Name three colours."}]


def main(base_url: str) -> None:
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)

    whole = client.chat.completions.create(
        model=CHAT, messages=MESSAGES, max_tokens=24, temperature=0
    )
    text = whole.choices[0].message.content
    assert "Red" in text, text
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole._request_id

    pieces, usage, finish = [], None, None
    stream = client.chat.completions.create(
        model=CHAT,
        messages=MESSAGES,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
    assert "".join(pieces) == text
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert finish == whole.choices[0].finish_reason

    completion = client.completions.create(
        model=CHAT, prompt="One, two, three,", max_tokens=5, temperature=0
    )
    assert completion.choices[0].text.startswith(" four"), completion.choices[0].text

    details(client)

    # The SDK asks for base64 unless told otherwise.
    packed = client.embeddings.create(model=EMBED, input=["a small lamp", "a wall bracket"])
    plain = client.embeddings.create(model=EMBED, input="a small lamp", encoding_format="float")
    assert len(packed.data) == 2 and len(packed.data[0].embedding) == 384
    pairs = zip(packed.data[0].embedding, plain.data[0].embedding)
    assert all(abs(a - b) < 1e-7 for a, b in pairs)

    names = {model.id for model in client.models.list()}
    assert {CHAT, EMBED} <= names, names
    assert client.models.retrieve(CHAT).id == CHAT

    expect(openai.NotFoundError, "model_not_found", client, model="nobody")
    expect(openai.BadRequestError, "context_length_exceeded", client, max_tokens=100_000)
    expect(openai.BadRequestError, "invalid_request", client, n=300)
    expect(openai.BadRequestError, "invalid_request", client, logit_bias={"10000000": 1})
    expect(openai.BadRequestError, "invalid_request", client, top_logprobs=2)
    expect(openai.BadRequestError, "unsupported", client, extra_body={"best_of": 2})
    print("all is well")


def details(client) -> None:
    """Choices, log-probabilities, bias and penalties."""
    request = {"model": CHAT, "messages": MESSAGES, "max_tokens": 8, "seed": 3, "n": 3}
    whole = client.chat.completions.create(**request, logprobs=True, top_logprobs=2)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts, (streamed, texts)
    assert len(set(texts)) > 1, texts
    for choice in whole.choices:
        content = choice.logprobs.content
        shown = b"".join(bytes(token.bytes or []) for token in content)
        assert shown.decode() == choice.message.content
        assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in content)
    alone = client.chat.completions.create(**request | {"n": 1})
    assert alone.choices[0].message.content == texts[0]

    prompt = {"model": CHAT, "prompt": "One, two, three,", "max_tokens": 5, "temperature": 0}
    scored = client.completions.create(**prompt, logprobs=2)
    logprobs = scored.choices[0].logprobs
    assert "".join(logprobs.tokens) == scored.choices[0].text
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs)
    # Token 19556 is "Hello".
    biased = client.completions.create(**prompt, logit_bias={"19556": 100})
    assert biased.choices[0].text == "Hello" * 5, biased.choices[0].text
    penalised = client.completions.create(
        **prompt | {"max_tokens": 16}, frequency_penalty=2, presence_penalty=1, echo=True
    )
    text = penalised.choices[0].text
    assert text.startswith("One, two, three, four"), text
    assert text.count(",") < 8, text


def expect(kind, code, client, **fields) -> None:
    request = {"model": CHAT, "messages": MESSAGES, "max_tokens": 4} | fields
    try:
        client.chat.completions.create(**request)
    except kind as error:
        assert error.code == code, (error.code, code)
        assert error.request_id and error.message
    else:
        raise AssertionError(f"{fields} was accepted")


if __name__ == "__main__":
    main(sys.argv[1])
