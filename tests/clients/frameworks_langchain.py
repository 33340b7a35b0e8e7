"""LangChain's OpenAI classes against a running server: python frameworks_langchain.py BASE_URL"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

# LiteLLM's package carries the file that tiktoken would fetch.
litellm = Path(find_spec("litellm").origin).parent
os.environ["TIKTOKEN_CACHE_DIR"] = str(litellm / "litellm_core_utils" / "tokenizers")

import openai
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

CHAT = "smollm2-135m-instruct"
EMBED = "all-minilm-l6-v2"


def main(base_url: str) -> None:
    to = {"base_url": base_url, "api_key": "none", "max_retries": 0}
    chat = ChatOpenAI(model=CHAT, temperature=0, max_tokens=24, **to)
    whole = chat.invoke("Name three colours.")
    assert "Red" in whole.content, whole.content
    assert whole.usage_metadata["total_tokens"] > whole.usage_metadata["output_tokens"] > 0
    streamed = "".join(chunk.content for chunk in chat.stream("Name three colours."))
    assert streamed == whole.content, (streamed, whole.content)
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke("Name three colours.")
    assert len(scored.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2

    texts = ["Tokenisers disagree about bioluminescent jellyfish.", "a wall bracket"]
    # By default it sends ids of its own tokenizer, which mean something else here.
    try:
        OpenAIEmbeddings(model=EMBED, **to).embed_documents(texts)
    except openai.BadRequestError as error:
        assert "check_embedding_ctx_length=False" in error.message, error.message
        assert error.param == "input", error.param
    else:
        raise AssertionError("ids of another tokenizer were accepted")
    embeddings = OpenAIEmbeddings(model=EMBED, check_embedding_ctx_length=False, **to)
    documents = embeddings.embed_documents(texts)
    assert [len(vector) for vector in documents] == [384, 384]
    again = embeddings.embed_query(texts[1])
    assert all(abs(a - b) < 1e-6 for a, b in zip(again, documents[1]))
    print("all is well")


if __name__ == "__main__":
    main(sys.argv[1])
