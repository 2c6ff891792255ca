"""Plants bugs in the kernels and around them, one at a time, and checks that the suite notices.

Run it as `python tests/mutation.py`.

The bugs lie beside the tests, in the mutants.py of each room. Each mutant is a copy of the package
with one line changed, tested in a process of its own by the tests that should notice. Exits with 1
where a mutant survives, or where a bug can no longer be planted because the line has changed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("helpers")))

from mutant import outcomes, planted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="plant the bugs whose name contains this")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in planted() if arguments.only in mutant.name]
    killed = 0
    for mutant, end, how in outcomes(mutants, jobs=None, limit=300):
        noticed = end in ("failed", "hangs")
        killed += noticed
        print(f"{'killed' if noticed else 'ALIVE '}  {mutant.name}: {how}", flush=True)
    print(f"{killed} killed / {len(mutants)} planted")
    sys.exit(killed != len(mutants))


if __name__ == "__main__":
    main()
