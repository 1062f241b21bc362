"""Cohere's and LiteLLM's own clients read /rerank. Skipped where they are not installed; they may lie in an environment
of their own: PYTHONPATH=clients/lib/python3.11/site-packages python -m pytest tests/test_clients.py"""
import os

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"        # or its import asks the internet for prices
cohere, litellm = pytest.importorskip("cohere"), pytest.importorskip("litellm")

from test_serve import gateway

DOCUMENTS = ["is 1", "is 3", "is 2", "is 0"]


@pytest.mark.parametrize("client", ["Client", "ClientV2"])
def test_cohere(client):
    """The best first; a wrong key and a request that is refused are its own exceptions, with our sentence."""
    with gateway(key="secret") as url:
        ask = lambda key, **more: getattr(cohere, client)(key, base_url=url).rerank(
            **{"model": "rm-r1", "query": "q", "documents": DOCUMENTS, "top_n": 3} | more)
        found = ask("secret")
        assert [r.index for r in found.results] == [1, 2, 0] and found.meta.api_version.version == "2"
        assert 1 > found.results[0].relevance_score > found.results[2].relevance_score > 0
        with pytest.raises(cohere.UnauthorizedError, match="missing or wrong"):
            ask("wrong")
        with pytest.raises(cohere.BadRequestError, match="documents"):
            ask("secret", documents=[])
        with pytest.raises(cohere.core.ApiError, match="33 responses: 32 of one prompt"):
            ask("secret", documents=["is 1"] * 33)


@pytest.mark.parametrize("provider, path", [
    ("hosted_vllm", ""), ("hosted_vllm", "/v1"), ("cohere", ""), ("jina_ai", ""), ("litellm_proxy", "")])
def test_litellm(provider, path):
    with gateway(key="secret") as url:
        ask = lambda key: litellm.rerank(f"{provider}/rm-r1", "q", DOCUMENTS, top_n=2, api_base=url + path, api_key=key)
        assert [r["index"] for r in ask("secret").results] == [1, 2]
        with pytest.raises(litellm.AuthenticationError, match="missing or wrong"):
            ask("wrong")
