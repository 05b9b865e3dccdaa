"""`python -m jvitmoe.train …` is `jvitmoe train …`."""

import sys

from jvitmoe.__main__ import run

if __name__ == "__main__":
    run("train", sys.argv)
