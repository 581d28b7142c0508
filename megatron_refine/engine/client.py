"""HTTP calls to one SGLang server (0.5.23). Every call has a deadline; every failure is a ServerError.

Both sides speak JSON, and weights travel as bytes of tensors in a broadcast: no answer is ever unpickled.
"""

from typing import Any

import httpx

from megatron_refine.engine.errors import ServerError

HEALTH_TIMEOUT = 5.0  # seconds
IN_WORDS = ("/flush_cache", "/freeze_gc")  # they answer with a sentence


class Client:
    """Thread-safe."""

    def __init__(self, url: str, timeout: float, api_key: str = ""):
        """timeout: seconds of a call that names none of its own."""
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        # no proxies from the environment: servers are on this machine or in this cluster
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=timeout, limits=limits, trust_env=False, follow_redirects=False
        )

    def post(self, path: str, timeout: float | None = None, **body: Any) -> Any:
        """The JSON of the answer. Raises ServerError unless the server answers in time that it succeeded."""
        return self._call("POST", path, timeout, json=body)

    def get(self, path: str, timeout: float | None = None) -> Any:
        """The JSON of the answer. Raises ServerError unless the server answers in time that it succeeded."""
        return self._call("GET", path, timeout)

    def knows(self, path: str) -> bool:
        """Whether the server has this endpoint: one that it has refuses the method OPTIONS, and names others."""
        try:
            return self._http.request("OPTIONS", path, timeout=HEALTH_TIMEOUT).status_code != 404
        except httpx.HTTPError as error:
            raise ServerError(f"{self.url}{path}: {_cause(error)}") from None

    def healthy(self) -> bool:
        """Whether the server generates: its /health tries. Not while it is paused."""
        return self._ok("/health")

    def answers(self) -> bool:
        """Whether all its processes are there, paused or not: /server_info asks its scheduler."""
        return self._ok("/server_info")

    def _ok(self, path: str) -> bool:
        try:
            return self._http.get(path, timeout=HEALTH_TIMEOUT).status_code == 200
        except httpx.HTTPError:
            return False

    def generate(self, timeout: float | None = None, **body: Any) -> list[dict[str, Any]]:
        """One answer for each prompt of `input_ids` [[int]]."""
        answers = self.post("/generate", timeout, **body)
        if not isinstance(answers, list) or len(answers) != len(body["input_ids"]):
            got = f"{len(answers)} answers" if isinstance(answers, list) else type(answers).__name__
            raise ServerError(f"{self.url}/generate: got {got} for {len(body['input_ids'])} prompts")
        return answers

    def close(self) -> None:
        self._http.close()

    def _call(self, method: str, path: str, timeout: float | None, **arguments: Any) -> Any:
        deadline = httpx.USE_CLIENT_DEFAULT if timeout is None else timeout
        try:
            response = self._http.request(method, path, timeout=deadline, **arguments)
            kind = response.headers.get("content-type", "")
            answer = response.json() if "json" in kind else response.text
        except (httpx.HTTPError, ValueError, RecursionError) as error:
            raise ServerError(f"{self.url}{path}: {_cause(error)}") from None
        if response.status_code != 200:
            raise ServerError(f"{self.url}{path}: {response.status_code}: {_message(answer)}")
        if "json" not in kind and path not in IN_WORDS:
            raise ServerError(f"{self.url}{path}: answered with {kind or 'no content type'}, not with JSON")
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerError(f"{self.url}{path}: {_message(answer)}")
        return answer


def _cause(error: Exception) -> str:
    return "no answer in time" if isinstance(error, httpx.TimeoutException) else str(error) or type(error).__name__


def _message(answer: Any) -> str:
    """What a refusing server says, in one line."""
    if isinstance(answer, dict):
        error = answer.get("error", answer)
        answer = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(answer).split())[:300]
