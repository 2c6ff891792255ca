"""`python -m fastlinear info`: versions, settings, and what can run on this machine."""

import argparse
import json

from fastlinear.explain import info


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastlinear", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, settings, and what can run here")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    arguments = parser.parse_args()
    found = info()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    rows = [
        *found.pop("versions").items(),
        *((f"on {name}", path) for name, path in found.pop("devices").items()),
    ]
    rows[4:4] = found.items()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {'not installed' if value is None else value}")


if __name__ == "__main__":
    main()
