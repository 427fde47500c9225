"""`skipdit download`: plan, list, verify, fetch."""

import argparse
import json
import os
import sys
import threading
from pathlib import Path

from ..errors import UserError
from .catalogue import CHECKOUT, Catalogue, load_catalogue
from .execute import Outcome, carry_out
from .plan import Plan, check_space, make_plan
from .progress import Bars, Lines
from .records import Records
from .report import list_lines, plan_lines, tree_lines, words
from .schema import Entry
from .sources import Resolver, make_client
from .state import State, check
from .status import FetchError, Mismatch, MissingOffline, Status, worst

__all__ = ["add_arguments", "run"]

EPILOG = """examples:
  skipdit download                                    what class-to-video needs: ucf101-skip and the VAE
  skipdit download skip-dit/taichi-skip 'metrics/*'   by id or pattern
  skipdit download --system SAM-PT --set complete --root ../sam-pt
  skipdit download --list                             what is there, missing, damaged
  skipdit download --verify                           hash everything that is there
  skipdit download --registry mine.yaml               entries of your own (docs/checkpoints.md)

exit status: 0 all is there; 1 a source failed; 2 wrong usage; 3 size or hash mismatch (the file is kept as
.bad); 4 no space; 5 missing (with --offline or --verify); 6 something is left to do by hand; 130 Ctrl-C.
environment: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_HUB_CACHE as huggingface_hub reads them;
HTTPS_PROXY, HTTP_PROXY, NO_PROXY; REQUESTS_CA_BUNDLE."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("ids", nargs="*", metavar="ID", help="entries, by id or pattern such as 'sam-pt/raft/*'")
    parser.add_argument("--system", help="entries of one system: Skip-DiT, datasets, SAM-PT, Vitron, ...")
    parser.add_argument(
        "--set",
        dest="set_name",
        metavar="SET",
        help="minimal, complete, all, or a task such as class-to-image",
    )
    parser.add_argument("--root", type=Path, help="folder that paths are relative to (default: the project)")
    parser.add_argument(
        "--registry",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a registry file of your own",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="show what is there, missing, damaged; fetch nothing")
    action.add_argument("--tree", action="store_true", help="show the documented folder tree; fetch nothing")
    action.add_argument("--dry-run", action="store_true", help="show the plan; fetch nothing")
    action.add_argument(
        "--verify", nargs="?", const="hash", type=_level, metavar="size|hash",
        help="check what is there by size or (default) by hash; fetch nothing",
    )  # fmt: skip
    parser.add_argument("--offline", action="store_true", help="use no network; missing entries end in status 5")
    parser.add_argument(
        "--mirror", action="append", default=[], metavar="[PREFIX=]URL",
        help="URL: the hub's files come from there, no token is sent; PREFIX=URL: other links likewise",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=4, help="downloads at a time (default 4)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="silence that counts as a cut (60)"
    )
    parser.add_argument("--retries", type=int, default=6, help="tries in a row without a new byte (6)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON; messages go to stderr")


def _level(text: str) -> str:
    if text not in ("size", "hash"):
        raise argparse.ArgumentTypeError("write --verify=size or --verify=hash, and put entries before it")
    return text


def run(args: argparse.Namespace) -> int:
    """Carry out the command; the exit status (see `Status`)."""
    try:
        status = _run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader has seen enough (`--list | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Status.OK


def _run(args: argparse.Namespace) -> int:
    if args.jobs < 1 or args.retries < 1 or args.timeout <= 0:
        raise UserError("--jobs, --retries and --timeout must be positive.")
    catalogue = load_catalogue(args.registry)
    set_name = args.set_name
    if (args.list or args.tree) and set_name is None and not args.ids:
        set_name = "all"
    entries = _selected(catalogue, args, set_name)
    root = (args.root or default_root()).absolute()
    records = Records(root)
    if args.tree:
        return _tree(catalogue, entries)
    if args.list or args.verify:
        return _look(entries, root, records, args)
    return _fetch(entries, root, records, args)


def default_root() -> Path:
    """The working folder if it has `pretrained/` (a checkout, or a task folder in one); else the checkout."""
    if Path("pretrained").exists() or not (CHECKOUT / "pretrained" / "registry").is_dir():
        return Path.cwd()
    return CHECKOUT


def _selected(catalogue: Catalogue, args: argparse.Namespace, set_name: str | None) -> list[Entry]:
    if (args.list or args.tree) and not args.ids and args.system is None and not args.registry:
        return [entry for entry in catalogue.entries if set_name == "all" or _in_set(entry, set_name)]
    return catalogue.select(args.ids, args.system, set_name)


def _in_set(entry: Entry, set_name: str) -> bool:
    return set_name in entry.sets or (set_name == "complete" and "minimal" in entry.sets)


def _tree(catalogue: Catalogue, entries: list[Entry]) -> int:
    chosen = {entry.id for entry in entries}
    for system in catalogue.systems:
        own = [entry for entry in system.entries if entry.id in chosen]
        if own:
            print("\n".join(tree_lines(system, own)))
    return Status.OK


def _look(entries: list[Entry], root: Path, records: Records, args: argparse.Namespace) -> int:
    level = args.verify or "size"
    rows = [(entry, check(entry, root, records, level)) for entry in entries]
    if args.json:
        print(json.dumps([_state_row(entry, state) for entry, state in rows], indent=1))
    else:
        print(f"Root: {root}", *list_lines(rows), sep="\n")
    if args.list:
        return Status.OK
    found = {"there": Status.OK, "damaged": Status.MISMATCH, "missing": Status.MISSING}
    return worst([found[state.name] for _, state in rows])


def _state_row(entry: Entry, state: State) -> dict:
    return {
        "id": entry.id,
        "system": entry.system,
        "path": entry.path,
        "sets": list(entry.sets),
        "state": state.name,
        "detail": state.detail,
        "bytes": state.size,
        "licence": entry.licence,
    }


def _fetch(entries: list[Entry], root: Path, records: Records, args: argparse.Namespace) -> int:
    offline = args.offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    stop = threading.Event()
    client, endpoint = make_client(args.mirror, idle=args.timeout, tries=args.retries, stop=stop)

    def pinned(entry_id: str) -> str | None:
        record = records.get(entry_id)
        return record.revision if record else None

    resolver = None if offline else Resolver(client, endpoint, pinned)
    plan = make_plan(entries, root, records, resolver, args.jobs)
    if offline:
        missing = [entry for entry in entries if entry.id not in plan.there]
        for entry in missing:
            plan.problems[entry.id] = MissingOffline(f"{entry.id} is missing, and the network is not to be used.")
    say = print if not args.json else (lambda *words: print(*words, file=sys.stderr))
    for line in plan_lines(plan, root):
        say(line)
    errors: dict[str, FetchError] = dict(plan.problems)
    outcomes: dict[str, Outcome] = {}
    if plan.tasks:
        try:
            check_space(plan)
            if not args.dry_run:
                outcomes = _carry_out(plan, root, records, client, args.jobs)
        except FetchError as error:
            errors.update({entry.id: error for task in plan.tasks for entry in task.entries})
    errors.update({name: outcome.error for name, outcome in outcomes.items() if outcome.error})
    for entry in entries:
        measured = entry.sha256 or entry.md5
        if isinstance(errors.get(entry.id), Mismatch) and not measured and records.get(entry.id):
            where = records.path(entry.id)
            say(f"{entry.id}: measured by what the first fetch noted; to accept another file, remove {where}")
    _tell(plan, outcomes, errors, say)
    if args.json:
        print(json.dumps(_result(plan, outcomes, errors, root), indent=1))
    return worst([error.status for error in errors.values()])


def _carry_out(plan: Plan, root: Path, records: Records, client, jobs: int) -> dict[str, Outcome]:
    watcher = Bars(plan.bytes_to_fetch()[0]) if sys.stderr.isatty() else Lines()
    try:
        return carry_out(plan, root, records, client, jobs, watcher)
    finally:
        if isinstance(watcher, Bars):
            watcher.close()


def _tell(plan: Plan, outcomes: dict[str, Outcome], errors: dict[str, FetchError], say) -> None:
    for name, outcome in outcomes.items():
        if name in errors:
            continue
        say(f"{name}: fetched to {outcome.entry.path} ({words(sum(item.size for item in outcome.files))})")
        for item in outcome.first_hashes[:5]:
            say(f"  first fetch of {item.path}, no hash was known: sha256 {item.sha256} recorded")
    for text in dict.fromkeys(str(error) for error in errors.values()):
        print(f"skipdit: {text}", file=sys.stderr)


def _result(plan: Plan, outcomes: dict[str, Outcome], errors: dict[str, FetchError], root: Path) -> dict:
    size, unknown = plan.bytes_to_fetch()
    return {
        "root": str(root),
        "there": list(plan.there),
        "to_fetch": [
            {
                "entries": [entry.id for entry in task.entries],
                "from": task.remote.locator,
                "bytes": task.bytes_to_fetch(),
            }
            for task in plan.tasks
        ],
        "bytes_left": size,
        "unknown_sizes": unknown,
        "fetched": {
            name: [{"path": item.path, "bytes": item.size, "sha256": item.sha256} for item in outcome.files]
            for name, outcome in outcomes.items()
            if outcome.error is None
        },
        "errors": {name: {"status": int(error.status), "message": str(error)} for name, error in errors.items()},
    }
