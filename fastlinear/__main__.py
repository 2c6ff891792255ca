"""`python -m fastlinear`: `info` says what can run here, `tune` measures what is fastest."""

import argparse
import json
import sys

from fastlinear.explanation import info
from fastlinear.tuning import command as tuning


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastlinear", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, settings, and what can run here")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    tuning.add_arguments(
        commands.add_parser(
            "tune",
            help="measure what is fastest on this device, for backend 'auto' to go by",
            description=tuning.__doc__,
        )
    )
    arguments = parser.parse_args()
    if arguments.command == "tune":
        sys.exit(tuning.run(arguments))
    found = info()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    rows = [
        *found.pop("versions").items(),
        *((f"on {name}", path) for name, path in found.pop("devices").items()),
        *((f"table for {name}", files) for name, files in found.pop("tables").items()),
    ]
    rows[4:4] = found.items()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {'not installed' if value is None else value}")


if __name__ == "__main__":
    main()
