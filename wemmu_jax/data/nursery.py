"""What the server that workers are forked from has in memory, so that they share it: a tokenizer and what it imports
take 350 MB, eight times otherwise. Imported by that server alone, see `workers`; whoever asks for other rows than the
first in a process loads them by himself."""

import gc
import os
import pickle

VARIABLE = "WEMMU_ROWS"  # while the server starts: a number of its own and the file of a pickled `RowMaker`


def load(name: str):
    """The `RowMaker` of that name."""
    with open(name.partition(" ")[2], "rb") as file:
        return pickle.load(file)


name, maker = os.environ.get(VARIABLE, ""), None
if name:
    try:
        maker = load(name)
    except (
        Exception
    ):  # it is of a module that only a worker's own start can import; then they load it
        name = ""
    gc.freeze()
