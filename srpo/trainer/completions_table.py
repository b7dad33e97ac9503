"""The completions table, written so that nothing in it and nothing around it can end a run.

TRL writes the same table (parquet, W&B or trackio, the console) inside `log`, after the step has been paid for, and
raises at the first value that a file format has no type for. Here every column is tried; one that cannot be written is
written as text, and the values are counted (`records/as_text`). A writer that fails says so once and is counted
(`records/failed`).
"""

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from transformers.utils import is_rich_available, logging
from trl.trainer import grpo_trainer
from trl.trainer.utils import print_prompt_completions_sample

from srpo.columns import TABLE_COLUMNS, as_list, check_extra, checked_metric, repaired_value, too_deep, well_formed
from srpo.types import FEEDBACK, Columns

logger = logging.get_logger(__name__)


class CompletionsMixin:
    """Writes what TRL's `log` would, for `srpo.trainer.trainer.SRPOTrainer`."""

    accelerator: Any
    args: Any
    log_completions: bool
    log_multimodal: bool
    log_unique_prompts: bool
    num_completions_to_print: int | None
    reward_func_names: list[str]
    state: Any
    _columns: Columns
    _logs: Any
    _pending_extra_logs: Any
    _rows_here: int
    """Completions of this rank in the batch that is being rewarded."""
    _failed_records: int = 0
    _said_records: frozenset[str] = frozenset()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        ours = self.log_completions
        table: dict[str, list[Any]] = {}
        if ours and self.accelerator.is_main_process:
            table, texts = writable_table(self._table())
            if texts:
                logs["records/as_text"] = float(sum(texts.values()))
                self._say(f"columns {', '.join(texts)} hold values that no table can, which are written as text")
            if self._failed_records:
                logs["records/failed"] = float(self._failed_records)
        self.log_completions = False  # TRL's own part of this
        try:
            super().log(logs, start_time)  # type: ignore[misc]
        finally:
            self.log_completions = ours
        if table:
            self._write(table)

    def _log_completion_extra(self, column: str, values: Any) -> None:
        """A column that a reward function logs: checked and repaired where it comes in."""
        column = well_formed(column) if isinstance(column, str) else column
        values = as_list(values)
        taken = {*self.reward_func_names, *TABLE_COLUMNS, *self._columns, *self._pending_extra_logs} - {FEEDBACK}
        check_extra(column, len(values), self._rows_here, taken)
        super()._log_completion_extra(column, [repaired_value(value)[0] for value in values])  # type: ignore[misc]

    def _log_metric(self, name: str, value: float) -> None:
        super()._log_metric(name, checked_metric("log_metric", name, value))  # type: ignore[misc]

    def _table(self) -> dict[str, list[Any]]:
        logs, strip = self._logs, grpo_trainer.strip_images_from_messages
        rows = len(logs["prompt"])
        table = {
            "step": [self.state.global_step] * rows,
            "prompt": [strip(messages) for messages in logs["prompt"]],
            "completion": [strip(messages) for messages in logs["completion"]],
            **logs["rewards"],
            **logs["extra"],
            "advantage": logs["advantages"],
        }
        # A column that was first logged in a later batch than others of the table has no value for their rows.
        return {name: [None] * (rows - len(values)) + list(values)[-rows:] for name, values in table.items()}

    def _write(self, table: dict[str, list[Any]]) -> None:
        frame = pd.DataFrame(table)
        folder = os.path.join(self.args.output_dir, "completions")
        path = os.path.join(folder, f"completions_{self.state.global_step:05d}.parquet")
        self._attempt("writing the parquet file", lambda: _write_parquet(frame, folder, path))
        if is_rich_available():
            self._attempt("printing completions", lambda: self._print(table))
        reports = self.args.report_to or ()
        if "wandb" in reports and grpo_trainer.wandb.run is not None:
            self._attempt("the completions table of wandb", lambda: self._report(grpo_trainer.wandb, frame))
        if "trackio" in reports:
            self._attempt("the completions table of trackio", lambda: self._report(grpo_trainer.trackio, frame))

    def _print(self, table: Mapping[str, list[Any]]) -> None:
        logs = self._logs
        print_prompt_completions_sample(
            table["prompt"],
            table["completion"],
            {name: table[name] for name in logs["rewards"]},
            table["advantage"],
            self.state.global_step,
            self.num_completions_to_print,
            extra={name: table[name] for name in logs["extra"]},
        )

    def _report(self, backend: Any, frame: pd.DataFrame) -> None:
        if images := self._logs["images"]:
            shown = [[backend.Image(image) for image in found] if found else [] for found in images]
            frame = pd.concat([frame, pd.Series(shown, name="image")], axis=1)
        if self.log_unique_prompts:
            frame = frame[~frame["prompt"].astype(str).duplicated()]  # prompts may be lists of messages
        backend.log({"completions": backend.Table(dataframe=frame)})

    def _attempt(self, what: str, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._failed_records += 1
            self._say(f"{what} failed, and the run goes on: {type(error).__name__}: {error}")

    def _say(self, message: str) -> None:
        kind = message.split(":")[0]
        if kind not in self._said_records:
            self._said_records |= {kind}
            logger.warning("Completions table, step %d: %s", self.state.global_step, message)


def writable_table(table: Mapping[str, Sequence[Any]]) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """The columns as parquet can hold them, and for those that it cannot, how many values became text.

    A column of a table has one type. Where its values have none in common, or none that parquet knows, every value but
    None is written as text: a text as it is (lone surrogates escaped), anything else as JSON, or as Python shows it.
    """
    found: dict[str, list[Any]] = {}
    texts: dict[str, int] = {}
    for name, values in table.items():
        found[name] = list(values)
        if not _has_type(name, found[name]):
            found[name] = [_as_text(value) for value in values]
            texts[name] = sum(old is not new for old, new in zip(values, found[name], strict=True))
    return found, texts


def _has_type(name: str, values: list[Any]) -> bool:
    if any(too_deep(value) for value in values):
        return False
    try:
        pq.write_table(pa.Table.from_pandas(pd.DataFrame({name: values})), io.BytesIO())
    except Exception:  # pyarrow raises a dozen kinds, the values' own methods any
        return False
    return True


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value.encode("utf-8")
            return value
        except UnicodeEncodeError:
            return value.encode("utf-8", "backslashreplace").decode("utf-8")
    try:
        return json.dumps(value)
    except Exception:
        try:
            return repr(value).encode("utf-8", "backslashreplace").decode("utf-8")
        except Exception:
            return f"<{type(value).__name__}>"


def _write_parquet(frame: pd.DataFrame, folder: str, path: str) -> None:
    os.makedirs(folder, exist_ok=True)
    draft = f"{path}.part"
    frame.to_parquet(draft)
    os.replace(draft, path)  # a full disk leaves no half of a table
