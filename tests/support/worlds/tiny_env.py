"""An environment of verifiers, in a module as its users write them; also run with the stand-in for the package."""

from typing import Any

import verifiers as vf
from datasets import Dataset


def load_environment(kind: str = "single", rows: int = 6, worth: float = 1.0) -> Any:
    """`worth` times the share of its answers that hold the number which the question names; `kind`:

    single, tool: one answer, and one behind a function; twice: a second question; mixed: rows of which every third
    raises; nan: no score; broken, group: reward functions that raise, and that want several rollouts.
    """
    print("what environments print is not the protocol")
    data = Dataset.from_list([{"question": f"say {n}", "answer": str(n)} for n in range(rows)])
    if kind == "nan":
        worth = float("nan")

    def right(completion: Any, answer: str, **_: Any) -> float:
        said = [str(message["content"]) for message in completion if message["role"] == "assistant"]
        return worth * sum(answer in text for text in said) / max(len(said), 1)

    def add(a: int, b: int) -> int:
        """The sum of two numbers.

        Args:
            a: one
            b: the other
        """
        return a + b

    class Twice(vf.MultiTurnEnv):
        async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
            if kind == "mixed" and int(state["answer"]) % 3 == 2:
                raise RuntimeError("the world broke")
            return [{"role": "user", "content": f"once more: {state['answer']}"}]

    def broken(completion: Any, **_: Any) -> float:
        raise ZeroDivisionError("the rubric broke")

    def group(completions: Any, **_: Any) -> list[float]:
        return [0.0 for _ in completions]

    rubric = vf.Rubric(funcs=[{"broken": broken, "group": group}.get(kind, right)])
    if kind in ("single", "nan", "broken", "group"):
        return vf.SingleTurnEnv(dataset=data, rubric=rubric)
    if kind == "tool":
        return vf.ToolEnv(dataset=data, rubric=rubric, tools=[add], max_turns=5)
    return Twice(dataset=data, eval_dataset=data.select(range(2)), rubric=rubric, max_turns=2)
