"""A taskset of verifiers >= 0.4, in a module as its users write them; also run with the stand-in for the package."""

from collections.abc import Iterable

import verifiers.v1 as vf


class TinyConfig(vf.TasksetConfig):
    """As `tiny_env`: `worth` times the share of answers that hold the number that the question names.

    kind: single; broken, whose reward raises; endless, whose tasks never end.
    """

    kind: str = "single"
    rows: int = 6
    worth: float = 1.0


class TinyData(vf.TaskData):
    answer: str = ""
    kind: str = "single"
    worth: float = 1.0


class TinyTask(vf.Task[TinyData]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        if self.data.kind == "broken":
            raise ZeroDivisionError("the rubric broke")
        said = [m.content or "" for m in trace.assistant_messages]
        return self.data.worth * sum(self.data.answer in str(text) for text in said) / max(len(said), 1)


class TinyTasks(vf.Taskset[TinyTask, TinyConfig]):
    @property
    def bounded(self) -> bool:
        return self.config.kind != "endless"

    def load(self) -> Iterable[TinyTask]:
        print("what environments print is not the protocol")
        c = self.config
        for n in range(c.rows):
            data = TinyData(prompt=f"say {n}", answer=str(n), kind=c.kind, worth=c.worth)
            yield TinyTask(data, c.task)


__all__ = ["TinyTasks"]
