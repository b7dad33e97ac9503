"""`srpo push OUTPUT REPO`: a finished run's policy, `router.yaml` and model card to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from srpo.cli import Parser

ROUTER = "router.yaml"


def main(argv: Sequence[str] | None = None) -> None:
    """`srpo push FOLDER REPO`; prints the URL of the commit.

    Raises:
        ValueError: the folder holds no router, or the Hub refuses; in one sentence.
    """
    parser = Parser(
        description="Upload a trained router: its policy, router.yaml and card, and nothing else of the folder.",
        epilog="example: srpo push outputs/quickstart/srpo my-name/my-router --private",
    )
    parser.add_argument("folder", type=Path, help="OUTPUT of a run, or a checkpoint or start/ in it")
    parser.add_argument("repo", help="name or owner/name; it is created where it is missing")
    parser.add_argument("--private", action="store_true", help="where it is created")
    parser.add_argument("--revision", help="branch (default: main)")
    parser.add_argument("--message", default="Upload router", help="of the commit")
    args = parser.parse_args(argv)

    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: there is no such folder")
    if not (args.folder / ROUTER).is_file():
        raise ValueError(f"{args.folder} holds no {ROUTER}, which says how to use the policy: name a run's OUTPUT")
    from srpo.hub.errors import explain
    from srpo.hub.files import files_to_push
    from srpo.hub.hub import push_checkpoint

    names = files_to_push(args.folder)
    try:
        url = push_checkpoint(
            args.folder,
            args.repo,
            commit_message=args.message,
            private=args.private or None,
            revision=args.revision,
        )
    except Exception as error:
        raise ValueError(f"nothing was pushed: {explain(error)}") from error
    print(f"{url}  ({len(names)} files)")
