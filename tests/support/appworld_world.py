"""Makes the folder of a small AppWorld world, with AppWorld's own models, in AppWorld's own Python:

    python tests/support/appworld_world.py FOLDER

One person with one note, and two tasks: abc1234_1 (to change the note; difficulty 1) and abc1234_2 (to answer a
question; difficulty 2). People, notes, tasks and their tests are ours; no data of AppWorld's is in it.
"""

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

PERSON = {"first_name": "Ada", "last_name": "Berg", "email": "ada@example.com", "phone_number": "5551234567"}
PASSWORD = "secret1"
EVALUATION = """
def evaluate(test, public_data, private_data, main_user, models, ground_truth_answer):
    notes = models.end.simple_note.Note.all()
    with test("the note is as it should be"):
        test.case([sorted(note.content.split()) for note in notes], "==", [private_data["words"]])
    with test("the answer is right"):
        task, = models.end.supervisor.Task.all()
        given = None if "NOT_GIVEN" in task.answer else __import__("json").loads(task.answer)
        test.answer(given, ground_truth_answer)
"""


def main(folder: Path) -> None:
    os.environ["APPWORLD_ROOT"] = str(folder)
    from appworld import update_root

    update_root(str(folder))
    from appworld.apps import get_all_apps
    from appworld.collections.api_docs import ApiDocCollection
    from appworld.collections.models import ModelCollection

    docs = ApiDocCollection.build(tuple(get_all_apps(skip_admin=True)))
    for app, apis in docs.items():
        write(
            folder / f"data/api_docs/standard/{app}.json", {n: {**doc, "canary_string": ""} for n, doc in apis.items()}
        )
    base = folder / "data/base_dbs"
    base.mkdir()
    models = ModelCollection.load(str(base), str(base), load_apps=get_all_apps(), create_db=True)
    for doc in docs.simple_note.values():
        names = ("api_name", "path", "method", "description", "parameters", "response_schemas")
        models.api_docs.ApiDoc(app_name_="simple_note", **{name: doc[name] for name in names}).save()
    models.admin.MainUser(**PERSON, birthday="1990-01-01", sex="female").save()
    known = {name: PERSON[name] for name in ("first_name", "last_name", "email")}
    user = models.simple_note.User(**known, password=PASSWORD, verified=True)
    user.save()
    models.simple_note.Note(user_id=user.id, title="Shopping", content="milk").save()
    add_task(folder, "abc1234_1", 1, "Add eggs to my shopping note.", ["eggs", "milk"], None)
    add_task(folder, "abc1234_2", 2, "How many things are on my shopping note?", ["milk"], 1)
    (folder / "data/datasets").mkdir()
    (folder / "data/datasets/train.txt").write_text("abc1234_1\nabc1234_2\n")
    (folder / "data/datasets/dev.txt").write_text("abc1234_2:tagged\n")


def add_task(folder: Path, name: str, difficulty: int, instruction: str, words: list[str], answer: Any) -> None:
    from appworld.apps import get_all_apps
    from appworld.collections.models import ModelCollection
    from appworld.common.constants import DB_VERSION
    from appworld.task import Task
    from munch import munchify

    memory = f":memory:task_input-{name}"
    models = ModelCollection.load(memory, str(folder / "data/base_dbs"), load_apps=get_all_apps())
    supervisor = models.supervisor.Supervisor(**PERSON, birthday="1990-01-01", sex="female")
    supervisor.save()
    models.supervisor.Task(supervisor_id=supervisor.id, instruction=instruction).save()
    models.supervisor.AccountPassword(
        supervisor_id=supervisor.id, account_name="simple_note", password=PASSWORD
    ).save()
    task = Task(
        id=name,
        instruction=instruction,
        supervisor=munchify(PERSON),
        datetime=datetime(2023, 5, 18, 12),
        allowed_apps=get_all_apps(skip_admin=True),
        db_version=DB_VERSION,
        model_collection=models,
    )
    task.save(save_ground_truth=False, model_collection_format="changes")
    task.close()
    truth = folder / "data/tasks" / name / "ground_truth"
    counts = dict.fromkeys(("num_apps", "num_apis", "num_api_calls", "num_solution_code_lines"), 1)
    write(truth / "metadata.json", {"difficulty": difficulty, "mode": "minimal", **counts})
    write(truth / "public_data.json", {})
    write(truth / "private_data.json", {"words": words})
    write(truth / "answer.json", answer)
    labels = {"the note is as it should be": "no_op_fail", "the answer is right": "no_op_fail"}
    write(truth / "test_data.json", [{"requirement": text, "label": label} for text, label in labels.items()])
    (truth / "evaluation.py").write_text(EVALUATION)


def write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
