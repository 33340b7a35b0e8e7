"""Clients of encoders, unchanged, against a running server: python encoders.py HOST:PORT

The server has all-minilm-l6-v2, a cross-encoder 'cross' and a classifier 'mood'.
"""

import sys

import cohere
import numpy
import tritonclient.http as triton
from huggingface_hub import InferenceClient
from tritonclient.utils import InferenceServerException

EMBED = "all-minilm-l6-v2"
DOCUMENTS = ["the sea is dark", "a wall bracket for candles", "a small lamp"]


def main(address: str) -> None:
    base = f"http://{address}"
    hugging_face(base)
    rerank(base)
    kserve(address)
    print("all is well")


def hugging_face(base: str) -> None:
    client = InferenceClient(token="none")
    texts = ["a cat sits on the mat", "a kitten rests on the rug", "stock prices fell sharply"]
    vectors = client.feature_extraction(texts, model=f"{base}/embed", truncate=True)
    assert vectors.shape == (3, 384) and vectors.dtype == numpy.float32, vectors.shape
    assert numpy.allclose(numpy.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    # What means the same is close, and nothing else is.
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]
    raw = client.feature_extraction(texts[0], model=f"{base}/embed", normalize=False)
    assert not numpy.isclose(numpy.linalg.norm(raw), 1, atol=0.05)
    assert numpy.allclose(raw[0] / numpy.linalg.norm(raw), vectors[0], atol=1e-5)
    # A model's own address does what the model is for.
    own = client.feature_extraction(texts[0], model=f"{base}/models/{EMBED}")
    assert numpy.array_equal(own[0], vectors[0])

    close = client.sentence_similarity(
        texts[0], other_sentences=texts[1:], model=f"{base}/similarity"
    )
    assert abs(close[0] - vectors[0] @ vectors[1]) < 1e-5 and len(close) == 2, close

    mood = client.text_classification("a small lamp", model=f"{base}/models/mood/predict")
    assert mood.label in {"calm", "glad", "sad"} and 0.33 < mood.score <= 1, mood


def rerank(base: str) -> None:
    for client, version in [
        (cohere.ClientV2(api_key="none", base_url=base), "2"),
        (cohere.Client(api_key="none", base_url=base), "1"),
    ]:
        ranking = client.rerank(
            model="cross", query="what is a sconce?", documents=DOCUMENTS, top_n=2
        )
        scores = [result.relevance_score for result in ranking.results]
        assert len(scores) == 2 and scores == sorted(scores, reverse=True), scores
        assert all(0 <= score <= 1 for score in scores), scores
        assert {result.index for result in ranking.results} <= {0, 1, 2}
        assert ranking.meta.api_version.version == version and ranking.id
        try:
            client.rerank(model="nobody", query="q", documents=DOCUMENTS)
        except cohere.errors.NotFoundError as error:
            assert "nobody" in error.body["message"], error.body
        else:
            raise AssertionError("an unknown model ranked")


def kserve(address: str) -> None:
    client = triton.InferenceServerClient(url=address)
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready(EMBED) and client.is_model_ready(EMBED, "1")
    assert client.get_server_metadata()["name"] == "sconce"
    assert client.get_model_metadata(EMBED)["outputs"][0]["shape"] == [-1, 384]

    texts = numpy.array(["a small lamp", "zwölf Kerzen"], dtype=object)
    vectors = []
    for binary in [True, False]:
        data = triton.InferInput("text", [2], "BYTES")
        data.set_data_from_numpy(texts, binary_data=binary)
        answer = client.infer(EMBED, [data], request_id="seven")
        assert answer.get_response()["id"] == "seven"
        vectors.append(answer.as_numpy("embedding"))
    assert vectors[0].shape == (2, 384) and vectors[0].dtype == numpy.float32
    assert numpy.array_equal(*vectors)

    query = triton.InferInput("query", [1], "BYTES")
    query.set_data_from_numpy(numpy.array(["what is a sconce?"], dtype=object))
    data = triton.InferInput("text", [3], "BYTES")
    data.set_data_from_numpy(numpy.array(DOCUMENTS, dtype=object))
    wanted = [triton.InferRequestedOutput("scores")]
    scores = client.infer("cross", [query, data], outputs=wanted).as_numpy("scores")
    assert scores.shape == (3, 1), scores

    try:
        client.infer("smollm2", [data])
    except InferenceServerException as error:
        assert "smollm2" in error.message(), error
    else:
        raise AssertionError("an unknown model answered")


if __name__ == "__main__":
    main(sys.argv[1])
