from typing import Any


class OpenAIChatCompletionsClient:
    def __init__(self, client: Any) -> None:
        self.client = client
